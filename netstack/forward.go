package netstack

import (
	"errors"
	"net/netip"
)

// TCPRequest is a connection a client of the tunnel asks for. Its SYN has not
// been answered: exactly one of Accept and Reject is to be called, and a
// request whose handler returns without either is dropped in silence.
type TCPRequest struct{}

// ForwardTCP hands every new connection to an address at which nobody listens
// to handler, each on a goroutine of its own. At most maxInFlight requests
// exist that were neither accepted nor rejected; SYNs beyond are dropped and
// counted in Stats.TCPForwardFull, and the client's retransmission asks again.
// The stack must have been made with Config.Forward. To be called once, before
// the first Input.
func (s *Stack) ForwardTCP(maxInFlight int, handler func(*TCPRequest)) {}

// Source returns the client's address and port.
func (r *TCPRequest) Source() netip.AddrPort { return netip.AddrPort{} }

// Destination returns where the client wants to.
func (r *TCPRequest) Destination() netip.AddrPort { return netip.AddrPort{} }

// Accept completes the handshake with the client. It returns when that is
// done, or with an error when the client has gone away.
func (r *TCPRequest) Accept() (*Conn, error) { return nil, errors.ErrUnsupported }

// Reject answers the SYN with what err says: ECONNREFUSED gives a RST;
// EHOSTUNREACH, ENETUNREACH and EACCES the ICMP unreachable of that meaning;
// nil, ETIMEDOUT and a deadline's error silence. Any other error gives a RST.
func (r *TCPRequest) Reject(err error) {}

// ForwardUDP hands every datagram for an address and port where no socket of
// the stack is bound to handler, inline from Input and whole: fragments have
// been put together. payload is valid until handler returns. The stack must
// have been made with Config.Forward. To be called once, before the first
// Input.
func (s *Stack) ForwardUDP(handler func(from, to netip.AddrPort, payload []byte)) {}

// WriteUDP sends a datagram that bears any source address, in fragments when
// it exceeds the MTU. Errors wrap EMSGSIZE or ENETUNREACH.
func (s *Stack) WriteUDP(from, to netip.AddrPort, payload []byte) error { return errors.ErrUnsupported }

// Unreachable says why a datagram could not be delivered.
type Unreachable uint8

const (
	// UnreachablePort means that nobody listens at the port.
	UnreachablePort Unreachable = iota
	// UnreachableHost means that the host could not be reached.
	UnreachableHost
	// UnreachableNet means that there is no route.
	UnreachableNet
	// UnreachableProhibited means that a rule forbids it.
	UnreachableProhibited
)

// RejectUDP answers a datagram that ForwardUDP delivered with the ICMP (or
// ICMPv6) unreachable message for code, sent from to.Addr() to from and
// quoting the datagram.
func (s *Stack) RejectUDP(from, to netip.AddrPort, payload []byte, code Unreachable) {}
