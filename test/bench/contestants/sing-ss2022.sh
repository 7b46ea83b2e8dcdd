# sing-box on both sides: shadowsocks 2022-blake3-aes-128-gcm, a connection over
# TCP for each connection.
NEEDS=sing-box
SOCKS=127.0.0.1:$PORT
up() {
  local key
  key=$(head -c16 /dev/urandom | base64)
  cat >"$W/server.json" <<C
{"log": {"level": "warn"},
 "inbounds": [{"type": "shadowsocks", "listen": "0.0.0.0", "listen_port": $PORT, "method": "2022-blake3-aes-128-gcm", "password": "$key"}],
 "outbounds": [{"type": "direct"}]}
C
  cat >"$W/client.json" <<C
{"log": {"level": "warn"},
 "inbounds": [{"type": "socks", "listen": "127.0.0.1", "listen_port": $PORT}],
 "outbounds": [{"type": "shadowsocks", "server": "$SRV", "server_port": $PORT, "method": "2022-blake3-aes-128-gcm", "password": "$key"}]}
C
  srv_run sing-box run -c "$W/server.json"
  cli_run sing-box run -c "$W/client.json"
}
