package main

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/cmd"
)

// Kinds of --egress.
const (
	egressSockets = "sockets"
	egressTun     = "tun"
)

// egressConfig is what the flags say about the way out.
type egressConfig struct {
	tun      bool
	device   string
	prefixes []netip.Prefix // the egress addresses
	plan     portblock.Plan
}

func (c *config) parseEgress(s *cmd.Settings) error {
	switch kind := s.String("egress"); kind {
	case egressSockets:
		if len(s.Strings("egress-address")) > 0 {
			return cmd.Usage("add --egress tun, or leave --egress-address out", "--egress-address is for --egress tun")
		}
		return nil
	case egressTun:
	default:
		return cmd.Usage("give --egress sockets or --egress tun", "--egress: %q is not a kind of egress", kind)
	}
	c.egress.tun, c.egress.device = true, s.String("tun")
	if c.egress.device == "" || len(c.egress.device) > 15 || strings.ContainsAny(c.egress.device, "/ ") {
		return cmd.Usage("give a name such as anytun0, at most 15 characters", "--tun: %q can't be the name of a device", c.egress.device)
	}
	var v4, v6 []netip.Addr
	var prefix6 netip.Prefix
	for _, text := range s.Strings("egress-address") {
		p, err := parseEgressAddress(text)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(c.egress.prefixes, p.Overlaps) {
			return cmd.Usage("give each address once", "--egress-address: %s stands there twice", text)
		}
		c.egress.prefixes = append(c.egress.prefixes, p)
		switch {
		case p.Addr().Is4():
			v4 = append(v4, p.Addr())
		case p.IsSingleIP():
			v6 = append(v6, p.Addr())
		case prefix6.IsValid():
			return cmd.Usage("give one IPv6 prefix; it has an address for every client", "--egress-address: %s is a second prefix", text)
		default:
			prefix6 = p
		}
	}
	if len(c.egress.prefixes) == 0 {
		return cmd.Usage("give the address that clients' traffic is to leave from, such as --egress-address 198.51.100.1",
			"--egress tun: --egress-address is missing")
	}
	if prefix6.IsValid() && len(v6) > 0 {
		return cmd.Usage("give IPv6 addresses or one prefix", "--egress-address: there are both IPv6 addresses and the prefix %s", prefix6)
	}
	blocks, err := portblock.New(s.Int("ports-per-client"))
	if err != nil {
		return err
	}
	if c.egress.plan, err = portblock.NewPlan(blocks, v4, v6, prefix6); err != nil {
		return cmd.Usage("check the list of --egress-address", "--egress-address: %w", err)
	}
	for _, e := range c.clients {
		if e.Number > c.egress.plan.Clients() {
			return cmd.Usage("give more --egress-address, or fewer --ports-per-client",
				"client %s has the number %d, but the egress addresses have port blocks for %d clients", e.Name, e.Number, c.egress.plan.Clients())
		}
	}
	return nil
}

func parseEgressAddress(text string) (netip.Prefix, error) {
	if strings.Contains(text, "/") {
		p, err := netip.ParsePrefix(text)
		if err == nil && (p.IsSingleIP() || p.Addr().Is6() && p.Bits() <= portblock.MaxPrefixBits) {
			return p.Masked(), nil
		}
		return netip.Prefix{}, cmd.Usage("give single IPv4 addresses, and for IPv6 single addresses or a prefix such as 2001:db8:1::/64",
			"--egress-address: %q is not an egress address", text)
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return netip.Prefix{}, cmd.Usage("give an address such as 198.51.100.1", "--egress-address: %q is not an egress address", text)
	}
	return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
}
