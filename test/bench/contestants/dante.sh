# dante as a plain SOCKS5 proxy in srv, in C: nothing is encrypted.
CLASS=relay
NEEDS=danted
SOCKS=$SRV:$PORT
up() {
  cat >"$W/danted.conf" <<C
internal: 0.0.0.0 port = $PORT
external: s1
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 protocol: tcp udp }
C
  srv_run danted -N 2 -p "$W/danted.pid" -f "$W/danted.conf"
}
