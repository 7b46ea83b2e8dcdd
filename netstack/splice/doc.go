// Package splice copies between connections, most of all between those of a netstack and the kernel's sockets: bytes go
// between the socket and the stack's own buffers without a copy in between, and nothing is held while nothing arrives.
//
//	Copy       one direction, until its end
//	Reader     the way that works for every connection, by a buffer
//	direct     the way between a netstack's connection and a kernel socket
//	calls_*    what systems do differently
package splice
