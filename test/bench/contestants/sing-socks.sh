# sing-box as a plain SOCKS5 proxy in srv: nothing is encrypted.
CLASS=relay
NEEDS=sing-box
SOCKS=$SRV:$PORT
up() {
  cat >"$W/server.json" <<C
{"log": {"level": "warn"}, "inbounds": [{"type": "socks", "listen": "0.0.0.0", "listen_port": $PORT}], "outbounds": [{"type": "direct"}]}
C
  srv_run sing-box run -c "$W/server.json"
}
