# microsocks as a plain SOCKS5 proxy in srv, in C: nothing is encrypted.
CLASS=relay
NEEDS=microsocks
SOCKS=$SRV:$PORT
SKIP="echo64 udpup1200 udpdown1200" # TCP only
up() { srv_run microsocks -i 0.0.0.0 -p "$PORT"; }
