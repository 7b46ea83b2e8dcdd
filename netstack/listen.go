package netstack

import (
	"errors"
	"net"
	"net/netip"
)

// Listener is a listening TCP socket of a Stack; it implements net.Listener.
type Listener struct{}

// ListenTCP listens at an address of the stack. The unspecified address (or
// the zero Addr) means all of them, both families. Port 0 takes a port of the
// range. A listener at a concrete address wins over ForwardTCP. Errors wrap
// EADDRINUSE or EADDRNOTAVAIL.
func (s *Stack) ListenTCP(at netip.AddrPort) (*Listener, error) { return nil, errors.ErrUnsupported }

// Accept waits for the next connection, a *Conn.
func (l *Listener) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }

// Addr returns the *net.TCPAddr listened at.
func (l *Listener) Addr() net.Addr { return nil }

// Close ends the listener; waiting and later Accepts fail with net.ErrClosed.
func (l *Listener) Close() error { return nil }
