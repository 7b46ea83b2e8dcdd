# xray on both sides: VLESS over TLS 1.3.
NEEDS="xray openssl"
SOCKS=127.0.0.1:$PORT
. "$bench/contestants/_tls.inc"
up() {
  tls_files || return 1
  local user=0f3c2f3a-6c8f-4a33-9f5e-1d2c3b4a5968 pin
  pin=$(openssl x509 -in "$W/tls.crt" -outform der | sha256sum | cut -d' ' -f1)
  cat >"$W/server.json" <<C
{"log": {"loglevel": "warning"},
 "inbounds": [{"listen": "0.0.0.0", "port": $PORT, "protocol": "vless", "settings": {"clients": [{"id": "$user"}], "decryption": "none"},
   "streamSettings": {"network": "raw", "security": "tls",
     "tlsSettings": {"certificates": [{"certificateFile": "$W/tls.crt", "keyFile": "$W/tls.key"}]}}}],
 "outbounds": [{"protocol": "freedom", "settings": {"finalRules": [{"action": "allow"}]}}]}
C
  cat >"$W/client.json" <<C
{"log": {"loglevel": "warning"},
 "inbounds": [{"listen": "127.0.0.1", "port": $PORT, "protocol": "socks", "settings": {"udp": true, "auth": "noauth"}}],
 "outbounds": [{"protocol": "vless",
   "settings": {"vnext": [{"address": "$SRV", "port": $PORT, "users": [{"id": "$user", "encryption": "none"}]}]},
   "streamSettings": {"network": "raw", "security": "tls", "tlsSettings": {"serverName": "bench.test", "pinnedPeerCertSha256": "$pin"}}}]}
C
  srv_run xray run -c "$W/server.json"
  cli_run xray run -c "$W/client.json"
}
