// Package udp is the outer socket: it moves batches of datagrams between the
// kernel and the engines, with segmentation offload where the kernel has it.
//
// On Linux one ReadBatch is one recvmmsg(2) of messages that UDP_GRO has
// joined, one WriteBatch is usually one sendmmsg(2) of messages that
// UDP_SEGMENT cuts, and replies leave from the local address that was asked
// (IP_PKTINFO), because that is the anycast address. Elsewhere the same
// interface stands on net.UDPConn, one datagram per system call. Nobody outside
// this package knows the difference.
//
// The package knows nothing of anytun's packets, sessions or keys. Others that
// move many datagrams, such as a proxy towards its applications, get a [Socket].
//
// # Lost packets are not errors
//
// A UDP socket reports many things that concern one datagram only: a firewall
// rule (EPERM), a full queue (ENOBUFS), a missing route (ENETUNREACH), an ICMP
// message of an earlier datagram (ECONNREFUSED), a datagram that is too long
// (EMSGSIZE). Such datagrams are counted by [DropReason] and forgotten; an
// error from ReadBatch or WriteBatch means that the socket is closed or broken.
//
// # Path MTU
//
// Outer packets never carry the don't-fragment bit, because a datagram that is
// too long for some link on the way would then fail for good: the sender is an
// anycast address, and the router's "fragmentation needed" may well be routed
// to another server than the one that sent the datagram.
//
// IPv4 sockets use IP_PMTUDISC_OMIT. It leaves DF clear, lets this host
// fragment what exceeds its own interface, lets routers fragment the rest, and
// ignores "fragmentation needed" messages, which anybody can forge towards an
// anycast address to make a server fragment everything into 552 bytes
// (IP_PMTUDISC_DONT, the choice of kernels before 3.15, would believe them).
//
// IPv6 routers don't fragment (RFC 8200 section 5), so a socket that ignored
// "packet too big" would lose long datagrams for good. IPv6 sockets use
// IPV6_PMTUDISC_DONT: the kernel learns the path MTU and fragments at the
// source.
//
// Fragments are a last resort all the same; the inner MTU is chosen so that
// outer packets fit the path.
//
// # Locks
//
// None on the usual road: a Conn's read state belongs to its one reader, write
// state is taken from a free list for the length of a WriteBatch. One mutex guards
// the names of interfaces, which only link-local addresses need.
package udp
