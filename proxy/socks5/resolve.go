package socks5

import (
	"context"
	"net"
	"net/netip"
	"strings"

	"github.com/things-go/go-socks5/statute"

	"github.com/anytun-go/anytun/proxy"
)

// resolve is Tor's RESOLVE: the reply's address is the name's. One address fits, and IPv4 is what applications of this
// extension expect.
func resolve(ctx context.Context, s *proxy.Server, c *proxy.Conn, target proxy.Target) {
	addr := target.Addr
	err := lookup(ctx, s, c, func(ctx context.Context) error {
		if addr.IsValid() {
			return nil
		}
		addrs, err := s.Network().LookupNetIP(ctx, "ip", target.Name)
		if err != nil {
			return err
		}
		addr, err = preferIPv4(target.Name, addrs)
		return err
	})
	if err != nil {
		c.CloseWith(reply(proxy.ReasonOf(err), netip.AddrPort{}))
		return
	}
	c.CloseWith(reply(proxy.ReasonNone, netip.AddrPortFrom(addr, 0)))
}

// resolvePTR is Tor's RESOLVE_PTR: the reply carries the address's name.
func resolvePTR(ctx context.Context, s *proxy.Server, c *proxy.Conn, target proxy.Target) {
	if !target.Addr.IsValid() {
		s.Counters().Failure(proxy.ReasonAddressType)
		c.CloseWith(reply(proxy.ReasonAddressType, netip.AddrPort{}))
		return
	}
	var name string
	err := lookup(ctx, s, c, func(ctx context.Context) error {
		found, err := s.Network().LookupAddr(ctx, target.Addr)
		name = strings.TrimSuffix(found, ".")
		if err == nil && (name == "" || len(name) > 255) {
			err = notFound(target.Addr.String())
		}
		return err
	})
	if err != nil {
		c.CloseWith(reply(proxy.ReasonOf(err), netip.AddrPort{}))
		return
	}
	b := []byte{statute.VersionSocks5, statute.RepSuccess, 0, statute.ATYPDomain, byte(len(name))}
	b = append(b, name...)
	c.CloseWith(append(b, 0, 0))
}

// lookup asks within the dial's time limit and while the application stays.
func lookup(ctx context.Context, s *proxy.Server, c *proxy.Conn, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.DialTimeout())
	defer cancel()
	ctx, stop := c.Watch(ctx)
	err := ask(ctx)
	if hungUp := stop(); hungUp != nil {
		err = hungUp
	}
	if err != nil {
		s.Counters().Failure(proxy.ReasonOf(err))
	}
	return err
}

// preferIPv4 chooses the address every far end can reach, where there is one.
func preferIPv4(name string, addrs []netip.Addr) (netip.Addr, error) {
	for _, a := range addrs {
		if a.Unmap().Is4() {
			return a.Unmap(), nil
		}
	}
	if len(addrs) == 0 {
		return netip.Addr{}, notFound(name)
	}
	return addrs[0], nil
}

func notFound(name string) error {
	return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}
