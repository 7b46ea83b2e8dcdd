# wireproxy, SOCKS5 over WireGuard and netstack, to wireguard-go in srv.
NEEDS="wireproxy wireguard wg"
SOCKS=127.0.0.1:$PORT
. "$bench/contestants/_wireguard.inc"
up() {
  wg_files && wg_server abwps$$ 10.99.2 || return 1
  cat >"$W/client.conf" <<C
[Interface]
Address = 10.99.2.2/32
PrivateKey = $(cat "$W/client.key")
MTU = 1420
[Peer]
PublicKey = $(cat "$W/server.pub")
Endpoint = $SRV:$PORT
AllowedIPs = 0.0.0.0/0
[Socks5]
BindAddress = $SOCKS
C
  cli_run wireproxy -s -c "$W/client.conf"
}
