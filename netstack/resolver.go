package netstack

import (
	"context"
	"errors"
	"net/netip"
)

// Resolver asks DNS servers through the tunnel. It never consults the host's
// resolver, hosts file or search list: every name is taken as fully qualified.
// Answers are kept for their TTL in a small cache.
type Resolver struct{}

// Resolver returns a resolver that asks servers, in order.
func (s *Stack) Resolver(servers []netip.AddrPort) *Resolver { return nil }

// LookupNetIP returns the addresses of name; network is "ip" (IPv4 and IPv6,
// asked for in parallel), "ip4" or "ip6". A literal address is returned as it
// is. Errors are *net.DNSError values, IsNotFound set when the name does not
// exist or has no such address.
func (r *Resolver) LookupNetIP(ctx context.Context, network, name string) ([]netip.Addr, error) {
	return nil, errors.ErrUnsupported
}

// LookupAddr returns the name of an address, without the final dot.
func (r *Resolver) LookupAddr(ctx context.Context, addr netip.Addr) (string, error) {
	return "", errors.ErrUnsupported
}
