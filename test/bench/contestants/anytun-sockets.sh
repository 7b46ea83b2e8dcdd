# This project: a server whose traffic leaves by sockets, so it needs no root.
. "$bench/contestants/_anytun.inc"
up() { anytun_alone srv --egress sockets; }
