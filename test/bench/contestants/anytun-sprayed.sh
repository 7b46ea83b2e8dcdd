# This project with two servers, each packet to and from them to a random one.
. "$bench/contestants/_anytun.inc"
CLASS=variant
SKIP="mem conn32 keep1 echo64 udpup1200 udpdown1200" # what spraying costs shows in streams
up() {
  anytun_files "$ANYCAST:$PORT" || return 1
  local s other
  for s in one two; do
    other=$([ $s = one ] && echo two || echo one)
    mkdir -p "$W/$s" # where a server's own NATS keeps what it knows
    anytun_server $s "$ANYCAST:$PORT" --state-dir "$W/$s" --egress tun --egress-address "${EGRESS[anycast]}" --ports-per-client 64512 \
      --cluster-listen "${ADDRESS[$s]}:$((PORT + 1))" --cluster-join "${ADDRESS[$other]}:$((PORT + 1))"
  done
  anytun_client
}
