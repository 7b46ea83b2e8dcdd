# This project: a server whose traffic leaves by a TUN device.
. "$bench/contestants/_anytun.inc"
up() { anytun_alone srv --egress tun --egress-address "${EGRESS[srv]}" --ports-per-client 64512; }
