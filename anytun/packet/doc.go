// Package packet looks at inner packets and changes them in place: IPv4 and IPv6,
// and as much of TCP, UDP and ICMP as a gateway needs. Nothing in it allocates
// memory, except for a [Reassembler]; a [View] is made to be reused.
//
// It knows nothing of anytun: no client numbers, no tunnels. What to do with a
// packet is decided elsewhere.
//
// # Checksums
//
// Parse verifies none. Inside the tunnel the AEAD stands for them, and TCP and UDP
// checksums in there may be anything. The setters ([View.SetSource] and so on)
// keep a valid checksum valid, at a cost that does not depend on the packet's
// length; where packets leave for the world, [View.FillChecksums] computes them
// anew.
//
// # Ports
//
// The identifier of an ICMP echo counts as a port, on the side of the one who
// asks: it is the source port of a request and the destination port of a
// reply.
package packet
