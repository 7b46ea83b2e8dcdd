# sing-box on both sides: hysteria2, which is QUIC, with its default congestion control.
NEEDS="sing-box openssl"
SOCKS=127.0.0.1:$PORT
. "$bench/contestants/_tls.inc"
up() {
  tls_files || return 1
  cat >"$W/server.json" <<C
{"log": {"level": "warn"},
 "inbounds": [{"type": "hysteria2", "listen": "0.0.0.0", "listen_port": $PORT, "users": [{"password": "x"}],
   "tls": {"enabled": true, "certificate_path": "$W/tls.crt", "key_path": "$W/tls.key"}}],
 "outbounds": [{"type": "direct"}]}
C
  cat >"$W/client.json" <<C
{"log": {"level": "warn"},
 "inbounds": [{"type": "socks", "listen": "127.0.0.1", "listen_port": $PORT}],
 "outbounds": [{"type": "hysteria2", "server": "$SRV", "server_port": $PORT, "password": "x",
   "tls": {"enabled": true, "insecure": true, "server_name": "bench.test"}}]}
C
  srv_run sing-box run -c "$W/server.json"
  cli_run sing-box run -c "$W/client.json"
}
