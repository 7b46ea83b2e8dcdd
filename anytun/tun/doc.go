// Package tun is the server's way out: a TUN device through which the host's
// kernel forwards the clients' packets, and the host settings that go with it.
//
// The device carries virtio-net headers. So one system call moves up to 64 KiB
// of a TCP stream (TSO) or of a UDP flow (USO), and the kernel computes the
// checksums of what leaves. Nobody outside this package sees either: a
// [Device] reads and writes batches of ordinary packets of the MTU's size.
//
// The roads of a packet:
//
//	kernel → server   read_linux.go  read(2) until the queue is empty
//	                  cut.go         super-packets spread into packets, in place
//	server → kernel   join.go        runs of one flow's packets, partial checksums
//	                  write_linux.go writev(2), one per run
//
// [Host] leads the egress addresses to the device (host_linux.go) and, where
// such an address is one of the host's own, leaves the service's port to the
// host (rules_linux.go).
//
// The package knows nothing of clients, blocks of ports or sessions.
//
// # Checksums
//
// Packets from the kernel may have TCP and UDP checksums that were never
// computed; those to the kernel may have any, since the kernel computes them.
// Everything else has its checksums in both directions, but for ICMPv6 to the
// kernel, which is treated like TCP.
//
// # Locks
//
// None on the packets' roads: the read state belongs to the one reader, write
// state is taken from a free list for the length of a WriteBatch. One mutex keeps
// Stats and Close apart.
package tun
