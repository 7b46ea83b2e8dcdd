package tun

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What Up makes, in the order it is made; everything carries the protocol number
// below, by which a successor knows it again.
//
//	settings  of the device (sysctl_linux.go)
//	routes    per egress prefix: one to the device and, behind it, a black hole
//	rules     for egress prefixes with an address of the host's own (rules_linux.go)
//
// The black hole is for the server's death: the device and its route are gone
// then, but packets go on arriving until other routers know. Answering them
// (unreachable, or a reset by the host's own TCP) would end connections that
// another server is about to carry on; losing them doesn't.
//
// Up compares what is there with what should be and changes the difference. So
// a successor of a killed server opens no gap in which the host would answer.
const (
	// protocol marks our routes and rules ("ip route show proto 141"). Numbers
	// are handed out by nobody; this one is not in rt_protos.
	protocol = 141

	// table holds the routes of prefixes that need rules.
	table = 141141

	// The device's route wins over the black hole, and over what a routing daemon
	// adds for the same prefix. (In IPv6 0 would mean 1024.)
	metricDevice    = 1
	metricBlackhole = 1 << 30
)

// state is one Up in the making, or what down takes away.
type state struct {
	h      Host
	nl     *netlink.Handle // stays in the namespace that Up was called in
	index  int             // of the device
	routes []netlink.Route // ours, there before
	local  []netip.Prefix  // the host's own addresses
	undo   []setting
}

// Up leads the egress addresses to the device and returns what undoes it. It
// repairs what a killed predecessor left. It needs CAP_NET_ADMIN. Only one
// server's Host can be up in a network namespace.
//
// down restores what was there before the first Up. It may be called after the
// device has been closed, and repeatedly, but not at the same time.
func (h Host) Up(ctx context.Context) (down func() error, err error) {
	s := &state{h: h}
	if s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("tun host: %w", err)
	}
	if err := s.up(ctx); err != nil {
		return nil, fmt.Errorf("tun host: %w", errors.Join(err, s.down()))
	}
	return s.down, nil
}

func (s *state) up(ctx context.Context) error {
	if err := checkPrefixes(s.h.Egress); err != nil {
		return err
	}
	s.h.Egress = distinct(s.h.Egress)
	link, err := s.nl.LinkByName(s.h.Device)
	if err != nil {
		return fmt.Errorf("find interface %q: %w", s.h.Device, err)
	}
	s.index = link.Attrs().Index
	if err := s.look(); err != nil {
		return err
	}
	ruled := s.ruled()
	if err := s.set(ruled); err != nil {
		return err
	}
	for _, step := range []func([]netip.Prefix) error{s.upRoutes, s.upRules, s.warn} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step(ruled); err != nil {
			return err
		}
	}
	return nil
}

// down takes away all that is ours, whoever made it.
func (s *state) down() error {
	if s.nl == nil {
		return nil
	}
	err := s.downRules()
	if e := s.look(); e != nil {
		err = errors.Join(err, e)
	}
	for i := range s.routes {
		// The kernel took the device's routes away with the device.
		if e := s.nl.RouteDel(&s.routes[i]); e != nil && !errors.Is(e, unix.ESRCH) && !errors.Is(e, unix.ENODEV) {
			err = errors.Join(err, fmt.Errorf("delete route %s: %w", s.routes[i].Dst, e))
		}
	}
	err = errors.Join(err, s.restore())
	s.nl.Close()
	s.nl = nil
	if err != nil {
		return fmt.Errorf("tun host: %w", err)
	}
	return nil
}

// look reads the routing tables: which routes are ours, which addresses are the
// host's.
func (s *state) look() error {
	s.routes, s.local = nil, nil
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		var ours []netlink.Route
		var local []netip.Prefix
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err := again(func() error {
			ours, local = nil, nil
			return s.nl.RouteListFilteredIter(family, all, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
				switch {
				case r.Protocol == protocol:
					ours = append(ours, r)
				case r.Table == unix.RT_TABLE_LOCAL && r.Type == unix.RTN_LOCAL:
					if p, ok := prefixOf(r.Dst); ok {
						local = append(local, p)
					}
				}
				return true
			})
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		s.routes, s.local = append(s.routes, ours...), append(s.local, local...)
	}
	return nil
}

// again repeats a listing that others' changes spoil. With a routing daemon at
// work that may be each time; what is listed is of use even so, since it is hardly
// ours that changes.
func again(list func() error) error {
	for try := 1; ; try++ {
		err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
		if try == 3 {
			return nil
		}
	}
}

// ruled are the egress prefixes that need rules, because one of their addresses
// is the host's own.
func (s *state) ruled() []netip.Prefix {
	var ps []netip.Prefix
	for _, p := range s.h.Egress {
		if slices.ContainsFunc(s.local, p.Overlaps) {
			ps = append(ps, p)
		}
	}
	return ps
}

// upRoutes makes the routes what they should be.
func (s *state) upRoutes(ruled []netip.Prefix) error {
	var want []netlink.Route
	for _, p := range s.h.Egress {
		r := netlink.Route{Dst: ipNet(p), Protocol: protocol, Table: unix.RT_TABLE_MAIN, Priority: metricBlackhole}
		if slices.Contains(ruled, p) {
			r.Table = table
		}
		hole := r
		hole.Type = unix.RTN_BLACKHOLE
		r.Type, r.Priority = unix.RTN_UNICAST, metricDevice
		r.LinkIndex, r.Scope = s.index, netlink.SCOPE_LINK
		want = append(want, hole, r)
	}
	for i := range want {
		r := &want[i]
		if slices.ContainsFunc(s.routes, func(old netlink.Route) bool { return sameRoute(&old, r) }) {
			continue
		}
		if err := s.nl.RouteAdd(r); errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("there is another route to %s with metric %d", r.Dst, r.Priority)
		} else if err != nil {
			return fmt.Errorf("add route to %s: %w", r.Dst, err)
		}
	}
	for i := range s.routes {
		old := &s.routes[i]
		if slices.ContainsFunc(want, func(r netlink.Route) bool { return sameRoute(old, &r) }) {
			continue
		}
		if err := s.nl.RouteDel(old); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete old route to %s: %w", old.Dst, err)
		}
	}
	return nil
}

func sameRoute(a, b *netlink.Route) bool {
	pa, _ := prefixOf(a.Dst)
	pb, _ := prefixOf(b.Dst)
	if pa != pb || a.Table != b.Table || a.Type != b.Type || a.Priority != b.Priority {
		return false
	}
	// IPv6 gives a black hole the loopback interface.
	return a.Type == unix.RTN_BLACKHOLE || a.LinkIndex == b.LinkIndex
}

// warn says when an operator may lose more than he thinks.
func (s *state) warn(ruled []netip.Prefix) error {
	for _, p := range ruled {
		addrs, err := s.nl.AddrList(nil, family(p.Addr()))
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, a := range addrs {
			own, ok := prefixOf(a.IPNet)
			if !ok || !p.Contains(own.Addr()) {
				continue
			}
			link, err := s.nl.LinkByIndex(a.LinkIndex)
			if err != nil || link.Type() == "dummy" || link.Attrs().Flags&net.FlagLoopback != 0 {
				continue
			}
			s.h.logger().Warn("egress address is this host's own: all its traffic but the service's goes to the tunnel, ssh too",
				"address", own.Addr(), "interface", link.Attrs().Name)
		}
	}
	return nil
}

// checkPrefixes refuses what would take the host off the network.
func checkPrefixes(ps []netip.Prefix) error {
	for _, p := range ps {
		a := p.Addr()
		switch {
		case !p.IsValid():
			return fmt.Errorf("egress address %s is invalid", p)
		case a.Is4In6():
			return fmt.Errorf("egress address %s is an IPv4 address in IPv6 clothes", p)
		case p.Bits() == 0, a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
			return fmt.Errorf("%s can't be an egress address", p)
		}
	}
	return nil
}

// distinct masks the prefixes and leaves each once.
func distinct(ps []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range ps {
		if p = p.Masked(); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func ipNet(p netip.Prefix) *net.IPNet {
	p = p.Masked()
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is ipNet backwards; false for nil, which is netlink's default route.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if a = a.Unmap(); !ok || size != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}
