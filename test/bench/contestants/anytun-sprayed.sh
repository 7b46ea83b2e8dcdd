# This project with two servers, each packet to and from them to a random one.
. "$bench/contestants/_anytun.inc"
up() {
  anytun_files "$ANYCAST:$PORT" || return 1
  local egress="--egress tun --tun any2 --egress-address $EGRESS_SPRAYED --ports-per-client 64512"
  # shellcheck disable=SC2046,SC2086 # words
  srv_run $(anytun_server) --listen "$ANYCAST:$PORT" $egress --cluster-listen "$SRV:$((PORT + 1))" --cluster-join "$SRV2:$((PORT + 1))"
  # shellcheck disable=SC2046,SC2086 # words
  srv2_run $(anytun_server) --listen "$ANYCAST:$PORT" $egress --cluster-listen "$SRV2:$((PORT + 1))" --cluster-join "$SRV:$((PORT + 1))"
  anytun_client
}
