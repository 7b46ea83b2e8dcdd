# shadowsocks-libev on both sides, in C: chacha20-ietf-poly1305.
NEEDS="ss-server ss-local"
SOCKS=127.0.0.1:$PORT
up() {
  srv_run ss-server -s 0.0.0.0 -p "$PORT" -k bench -m chacha20-ietf-poly1305 -u --no-delay
  cli_run ss-local -s "$SRV" -p "$PORT" -b 127.0.0.1 -l "$PORT" -k bench -m chacha20-ietf-poly1305 -u --no-delay
}
