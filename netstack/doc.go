// Package netstack is a user-space TCP/IP stack whose wire is a tunnel: IP
// packets go out through Config.Output and come in through Stack.Input, in
// batches. It is the only package that speaks gVisor; everybody else sees
// net.Conn, netip addresses and []byte.
//
// A client dials through it (Stack.DialTCP, Dialer, ListenUDP, Resolver). A
// server that re-opens its clients' flows as sockets of its own host sets
// Config.Forward and takes the flows from ForwardTCP and ForwardUDP.
//
// The transport checksum of a TCP or UDP packet inside the tunnel is neither
// computed nor verified: the AEAD around the packet stands for it. Whoever
// lets such a packet out to a real network has to compute it.
//
// Locks: Stack.addrMu before ports.mu before Stack.mu before tcpForwarder.mu
// before gVisor's before flowSet.mu before holder.mu and reorderPath.mu; outbox.mu
// is the last. None of them is held while Config.Output runs, except that a dial's
// SYN leaves under Stack.mu held for reading and, when ports run out, ports.mu.
// gVisor sends while it holds the lock of an endpoint; so Output must not call into
// the stack it belongs to.
//
// The package does not know what carries the packets, who the clients are, or
// which destinations are allowed.
package netstack
