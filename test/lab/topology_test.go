//go:build linux

package lab

import (
	"net/netip"
	"strings"
	"testing"
)

// The addresses of the large place. Those of the public side are from the blocks
// set aside for documentation; app's are private.
var (
	loop4 = netip.MustParseAddr("127.0.0.1")
	loop6 = netip.MustParseAddr("::1")

	natOuter4 = netip.MustParseAddr("198.51.100.2")
	srv4      = netip.MustParseAddr("203.0.113.2")
	srv6      = netip.MustParseAddr("2001:db8:2::2")
	dst4      = netip.MustParseAddr("192.0.2.2")
	dst6      = netip.MustParseAddr("2001:db8:3::2")

	silent4    = netip.MustParseAddr("192.0.2.99") // a host that drops what it gets
	absent4    = netip.MustParseAddr("192.0.2.77") // on dst's link, but nobody there
	unrouted4  = netip.MustParseAddr("198.18.0.1") // srv has no route
	forbidden4 = netip.MustParseAddr("198.18.1.1") // srv's routes prohibit it
)

// five is the large place.
type five struct{ app, nat, router, srv, dst *host }

// newFive builds the hosts of the large place and the links between them.
//
// Nothing but srv's own sockets reaches dst and gets an answer: router has no
// route to dst, and dst none to anything but its own link.
func newFive(t *testing.T) *five {
	t.Helper()
	requireNamespaces(t)
	f := &five{
		// A resolver that app could ask, if it did what it must not: its
		// packets would pass app's interface, where they are looked for.
		app:    newHost(t, "app", "198.51.100.1"),
		nat:    newHost(t, "nat", "198.51.100.1"),
		router: newHost(t, "router", "127.0.0.1"),
		srv:    newHost(t, "srv", dst4.String()),
		dst:    newHost(t, "dst", "127.0.0.1"),
	}
	link(t, f.app, "eth0", f.nat, "lan")
	link(t, f.nat, "wan", f.router, "left")
	link(t, f.router, "right", f.srv, "eth0")
	link(t, f.srv, "eth1", f.dst, "eth0")

	f.app.address(t, "eth0", "192.168.77.2/24", "fd77::2/64")
	f.nat.address(t, "lan", "192.168.77.1/24", "fd77::1/64")
	f.nat.address(t, "wan", natOuter4.String()+"/30", "2001:db8:1::2/64")
	f.router.address(t, "left", "198.51.100.1/30", "2001:db8:1::1/64")
	f.router.address(t, "right", "203.0.113.1/24", "2001:db8:2::1/64")
	f.srv.address(t, "eth0", srv4.String()+"/24", srv6.String()+"/64")
	f.srv.address(t, "eth1", "192.0.2.1/24", "2001:db8:3::1/64")
	f.dst.address(t, "eth0", dst4.String()+"/24", silent4.String()+"/24", dst6.String()+"/64")

	f.app.route(t, "default via 192.168.77.1", "default via fd77::1")
	f.nat.route(t, "default via 198.51.100.1", "default via 2001:db8:1::1")
	f.srv.route(t, "198.51.100.0/30 via 203.0.113.1", "2001:db8:1::/64 via 2001:db8:2::1",
		"prohibit "+forbidden4.String()+"/32")

	for _, h := range []*host{f.nat, f.router} {
		h.sysctl(t, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	}
	f.app.sysctl(t, "net.ipv4.ip_local_port_range=10000 65000")
	f.srv.sysctl(t, "net.ipv4.ip_local_port_range=10000 65000", "net.ipv4.ping_group_range=0 2147483647")
	f.nat.nft(t, `
table inet nat {
  chain post { type nat hook postrouting priority srcnat;
    oifname "wan" masquerade
  }
  chain forward { type filter hook forward priority filter;
    iifname "wan" ct state != { established, related } drop
  }
}`)
	f.dst.nft(t, `
table inet silent {
  chain input { type filter hook input priority filter;
    ip daddr `+silent4.String()+` drop
  }
}`)
	return f
}

// newOne builds the small place: one host whose only interface is its loopback.
// Without the means for that it is the machine itself, whose ports are shared.
func newOne(t *testing.T) *host {
	t.Helper()
	requireNamespaces(t)
	h := newHost(t, "one", "127.0.0.1")
	h.sysctl(t, "net.ipv4.ip_local_port_range=10000 65000", "net.ipv4.ping_group_range=0 2147483647")
	return h
}

// link joins two hosts with a virtual Ethernet cable.
func link(t *testing.T, a *host, aName string, b *host, bName string) {
	t.Helper()
	ip(t, "link", "add", aName, "netns", a.ns, "type", "veth", "peer", "name", bName, "netns", b.ns)
	ip(t, "-n", a.ns, "link", "set", aName, "up")
	ip(t, "-n", b.ns, "link", "set", bName, "up")
}

// address gives a device addresses, usable at once.
func (h *host) address(t *testing.T, device string, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		args := []string{"-n", h.ns, "address", "add", a, "dev", device}
		if strings.Contains(a, ":") {
			args = append(args, "nodad")
		}
		ip(t, args...)
	}
}

// route adds routes, written as ip route takes them.
func (h *host) route(t *testing.T, routes ...string) {
	t.Helper()
	for _, r := range routes {
		args := []string{"-n", h.ns, "route", "add"}
		if strings.Contains(r, ":") {
			args = []string{"-n", h.ns, "-6", "route", "add"}
		}
		ip(t, append(args, strings.Fields(r)...)...)
	}
}

// sysctl sets kernel parameters of the host.
func (h *host) sysctl(t *testing.T, settings ...string) {
	t.Helper()
	ip(t, append([]string{"netns", "exec", h.ns, "sysctl", "-qw"}, settings...)...)
}
