# wireguard-go with kernel TUN devices on both sides: no proxy, needs root, and
# TCP is the kernel's from end to end.
NEEDS="wireguard wg"
TO=$DST_ROUTED
SKIP=mem # connections are the kernel's
. "$bench/contestants/_wireguard.inc"
up() {
  wg_files && wg_server abwgs$$ 10.99.1 || return 1
  cli_run env WG_PROCESS_FOREGROUND=1 LOG_LEVEL=error wireguard -f abwgc$$
  wg_device cli abwgc$$ 10.99.1.2 client peer "$(cat "$W/server.pub")" endpoint "$SRV:$PORT" allowed-ips 0.0.0.0/0 || return 1
  in_ns cli ip route add "$DST_ROUTED/32" dev abwgc$$
}
