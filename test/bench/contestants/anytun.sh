# This project: a server whose traffic leaves by a TUN device.
. "$bench/contestants/_anytun.inc"
up() { anytun_alone --egress tun --tun any0 --egress-address $EGRESS --ports-per-client 64512; }
