// Package anytun is the map of the protocol and its two engines; it holds no
// code.
//
//	wire       bytes of every message; PROTOCOL.md
//	session    keys, handshake, epochs, replay windows, the client's schedule
//	packet     views of inner packets, checksums, ICMP errors
//	portblock  client number to public addresses and ports, and back
//	nat        ports of clients that don't keep to theirs
//	udp, tun   outer sockets, and the TUN device, in batches; nowait how they call the kernel
//	registry   where clients are: what servers tell each other; registry/nats how
//	announce   what routers are told: BGP
//	client     the client's engine: control.go, send.go, receive.go
//	server     the server's: receive.go, router.go, send.go, cluster.go, ports.go,
//	           tun*.go (egress by a device), sockets*.go (by sockets), dns*.go
//
// The roads of a byte, file by file:
//
//	client out  proxy/socks5 → netstack dial → netstack device → client/send.go Seal → udp WriteBatch
//	client in   udp ReadBatch → client/receive.go Open → netstack Input → net.Conn → netstack/splice
//	server out  udp ReadBatch → server/receive.go Open → router.go verdict → sockets.go → the host's sockets
//	            or router.go verdict → tun_out.go public address → tun WriteBatch
//	server in   the host's sockets → sockets*.go → server/send.go Seal → udp WriteBatch
//	            or tun ReadBatch → tun_in.go whose port → sessions.go where is it → server/send.go
//
// Packets travel in batches ([][]byte) through every seam. Receive is always
// from the network, send always to it. test/imports_test.go says who may import
// whom.
package anytun
