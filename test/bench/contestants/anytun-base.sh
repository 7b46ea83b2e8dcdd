# Other builds of this project's programs, in $BASE, to compare two versions.
. "$bench/contestants/_anytun.inc"
CLASS=variant
programs=${BASE:-no-BASE}/
NEEDS="${programs}anytun-server ${programs}anytun-proxy"
up() { anytun_alone base --egress tun --egress-address "${EGRESS[base]}" --ports-per-client 64512; }
