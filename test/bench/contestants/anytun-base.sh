# Other builds of this project's programs, in $BASE, to compare two versions.
. "$bench/contestants/_anytun.inc"
programs=${BASE:-no-BASE}/
NEEDS="${programs}anytun-server ${programs}anytun-proxy"
up() { anytun_alone --egress tun --tun any1 --egress-address $EGRESS_BASE --ports-per-client 64512; }
