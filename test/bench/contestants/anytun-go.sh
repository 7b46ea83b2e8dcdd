# anytun in Go: anytun-server in srv, anytun-proxy in cli, both as built by "make build"
. "$here/contestants/_wg.inc"
SOCKS=127.0.0.1:1080
up() {
  rm -f "$W/anytun.key" "$W/anytun.clients"
  "$BIN/anytun-server" keygen --out "$W/anytun.key" >/dev/null || return 1
  local url
  url=$("$BIN/anytun-server" invite --cluster-key "$W/anytun.key" --clients "$W/anytun.clients" \
    --name bench --address "$SRV:4444" | grep -o 'anytun://[^ ]*') || return 1
  srv_run "$BIN/anytun-server" --listen 0.0.0.0:4444 --cluster-key "$W/anytun.key" --clients "$W/anytun.clients" --log-level warn
  cli_run "$BIN/anytun-proxy" --listen 127.0.0.1:1080 --server "$url" --log-level warn
  wait_tcp cli 127.0.0.1 1080 && wait_via
}
