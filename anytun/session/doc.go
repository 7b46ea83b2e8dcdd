// Package session is the cryptography and the timing of anytun: the Noise IK
// handshake, the key derivation that lets any server of a cluster open any
// packet, replay windows, cookies, and the client's schedule of handshakes and
// keep-alives. PROTOCOL.md in anytun/wire is its text.
//
// It does no I/O and reads no clock: the time is an argument everywhere. It
// doesn't know what a socket, a packet's address or a netstack is.
//
// A Cluster is safe for concurrent use, a Sealer too; an Opener, an Initiator
// and a Schedule belong to one goroutine at a time.
package session
