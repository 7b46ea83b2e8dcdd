package netstack

import (
	"errors"
	"net"
	"net/netip"
	"time"
)

// PacketConn is an unconnected UDP socket of a Stack, with the method names of
// net.UDPConn. It is safe for concurrent use.
type PacketConn struct{}

// ListenUDP opens a UDP socket. The unspecified address (or the zero Addr)
// means all of the stack's addresses, both families. Port 0 takes a port of the
// range. A socket at a concrete address wins over ForwardUDP. Errors wrap
// EADDRINUSE or EADDRNOTAVAIL.
func (s *Stack) ListenUDP(at netip.AddrPort) (*PacketConn, error) { return nil, errors.ErrUnsupported }

// ReadFromUDPAddrPort reads one datagram; what exceeds b is lost.
func (c *PacketConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	return 0, netip.AddrPort{}, errors.ErrUnsupported
}

// WriteToUDPAddrPort sends one datagram, in fragments when it exceeds the MTU.
// A payload above 65507 bytes (IPv4) or 65527 (IPv6) gives EMSGSIZE.
func (c *PacketConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	return 0, errors.ErrUnsupported
}

// LocalAddr returns the *net.UDPAddr the socket is bound to.
func (c *PacketConn) LocalAddr() net.Addr { return nil }

// SetDeadline sets both deadlines; the zero time means none.
func (c *PacketConn) SetDeadline(t time.Time) error { return errors.ErrUnsupported }

// SetReadDeadline sets the deadline of ReadFromUDPAddrPort.
func (c *PacketConn) SetReadDeadline(t time.Time) error { return errors.ErrUnsupported }

// SetWriteDeadline sets the deadline of WriteToUDPAddrPort.
func (c *PacketConn) SetWriteDeadline(t time.Time) error { return errors.ErrUnsupported }

// Close closes the socket and fails what waits on it with net.ErrClosed.
func (c *PacketConn) Close() error { return nil }
