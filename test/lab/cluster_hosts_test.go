//go:build linux

package lab

import (
	"net/netip"
	"strings"
	"testing"
)

// The addresses of the cluster. What the Internet sees is from the blocks set
// aside for documentation, what joins routers is private.
var (
	service4 = netip.MustParseAddr("203.0.113.1")
	service6 = netip.MustParseAddr("2001:db8:2::1")
	egress4  = netip.MustParseAddr("203.0.113.2")
	egress6  = netip.MustParseAddr("2001:db8:2::2")
	dst24    = netip.MustParseAddr("192.0.2.130")
	dst26    = netip.MustParseAddr("2001:db8:4::2")
)

// A port is one end of a cable: a device of a host and its addresses.
type port struct{ host, device, v4, v6 string }

// A cable's name is that of its two hosts, or of its device at the client's side
// where that says more.
type cable struct {
	name string
	a, b port
}

// clusterCables is the whole network.
var clusterCables = []cable{
	{"app-nat", port{"app", "eth0", "192.168.77.2/24", "fd77::2/64"}, port{"nat", "lan", "192.168.77.1/24", "fd77::1/64"}},
	{"wan", port{"nat", "wan", "198.51.100.2/30", "2001:db8:1:1::2/64"}, port{"access", "left", "198.51.100.1/30", "2001:db8:1:1::1/64"}},
	{"wan2", port{"nat", "wan2", "198.51.100.6/30", "2001:db8:1:2::2/64"}, port{"access", "left2", "198.51.100.5/30", "2001:db8:1:2::1/64"}},
	{"mobile", port{"app", "mobile", "198.51.100.10/30", "2001:db8:1:3::2/64"}, port{"access", "mobile", "198.51.100.9/30", "2001:db8:1:3::1/64"}},
	{"access-core", port{"access", "core", "10.0.0.2/30", "fd00:0::2/64"}, port{"core", "access", "10.0.0.1/30", "fd00:0::1/64"}},
	{"core-s1", port{"core", "s1", "10.0.1.1/30", "fd00:1::1/64"}, port{"s1", "eth0", "10.0.1.2/30", "fd00:1::2/64"}},
	{"core-s2", port{"core", "s2", "10.0.2.1/30", "fd00:2::1/64"}, port{"s2", "eth0", "10.0.2.2/30", "fd00:2::2/64"}},
	{"core-s3", port{"core", "s3", "10.0.3.1/30", "fd00:3::1/64"}, port{"s3", "eth0", "10.0.3.2/30", "fd00:3::2/64"}},
	{"core-dst", port{"core", "dst", "192.0.2.1/25", "2001:db8:3::1/64"}, port{"dst", "eth0", "192.0.2.2/25", "2001:db8:3::2/64"}},
	{"core-edge", port{"core", "edge", "10.0.10.1/30", "fd00:10::1/64"}, port{"edge", "core", "10.0.10.2/30", "fd00:10::2/64"}},
	{"edge-s3", port{"edge", "s3", "10.0.13.1/30", "fd00:13::1/64"}, port{"s3", "eth1", "10.0.13.2/30", "fd00:13::2/64"}},
	{"edge-dst2", port{"edge", "dst2", "192.0.2.129/25", "2001:db8:4::1/64"}, port{"dst2", "eth0", "192.0.2.130/25", "2001:db8:4::2/64"}},
}

// clusterDefaults are the hosts that know nothing but their gateway.
var clusterDefaults = map[string][]string{
	"app":  {"default via 192.168.77.1", "default via fd77::1"},
	"nat":  {"default via 198.51.100.1", "default via 2001:db8:1:1::1"},
	"s1":   {"default via 10.0.1.1", "default via fd00:1::1"},
	"s2":   {"default via 10.0.2.1", "default via fd00:2::1"},
	"s3":   {"default via 10.0.3.1", "default via fd00:3::1"},
	"dst":  {"default via 192.0.2.1", "default via 2001:db8:3::1"},
	"dst2": {"default via 192.0.2.129", "default via 2001:db8:4::1"},
}

// clusterServers is how many servers the drawing has.
const clusterServers = 3

// build makes the hosts and lays the cables.
func (c *cluster3) build(t *testing.T) {
	t.Helper()
	c.hosts = make(map[string]*host)
	for _, cable := range clusterCables {
		for _, p := range []port{cable.a, cable.b} {
			if c.hosts[p.host] == nil {
				c.hosts[p.host] = newHost(t, p.host, dst4.String())
				c.hosts[p.host].sysctl(t,
					"net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
					"net.ipv4.ip_local_port_range=10000 65000", "net.core.somaxconn=4096",
					"net.ipv4.tcp_max_syn_backlog=4096",
					"net.ipv6.conf.all.keep_addr_on_down=1", "net.ipv6.conf.default.keep_addr_on_down=1")
			}
		}
		a, b := c.host(cable.a.host), c.host(cable.b.host)
		link(t, a, cable.a.device, b, cable.b.device)
		a.address(t, cable.a.device, cable.a.v4, cable.a.v6)
		b.address(t, cable.b.device, cable.b.v4, cable.b.v6)
		if !c.options.Offload {
			a.segmentsAlone(t, cable.a.device)
			b.segmentsAlone(t, cable.b.device)
		}
	}
	for name, routes := range clusterDefaults {
		c.host(name).route(t, routes...)
	}
	for _, name := range []string{"nat", "access", "core", "edge", "s1", "s2", "s3"} {
		c.host(name).sysctl(t, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	}
	// Flows, not pairs of addresses, are spread over the servers.
	for _, name := range []string{"access", "core", "edge"} {
		c.host(name).sysctl(t, "net.ipv4.fib_multipath_hash_policy=1", "net.ipv6.fib_multipath_hash_policy=1")
	}
	c.app, c.nat, c.access, c.core = c.host("app"), c.host("nat"), c.host("access"), c.host("core")
	c.edge, c.dst, c.dst2 = c.host("edge"), c.host("dst"), c.host("dst2")
	for i := range clusterServers {
		s := &server3{host: c.host(serverName(i + 1)), number: i + 1}
		s.address(t, "lo", c.services.v4.String()+"/32", c.services.v6.String()+"/128")
		s.nft(t, c.countingRules())
		c.servers = append(c.servers, s)
	}
	c.nat.nft(t, `
table inet nat {
  chain post { type nat hook postrouting priority srcnat;
    oifname { "wan", "wan2" } masquerade
  }
  chain forward { type filter hook forward priority filter;
    iifname { "wan", "wan2" } ct state != { established, related } drop
  }
}`)
}

// segmentsAlone lets nothing larger than the MTU leave by a device, as a
// physical cable would.
func (h *host) segmentsAlone(t *testing.T, device string) {
	t.Helper()
	ip(t, "netns", "exec", h.ns, "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off",
		"tx-udp-segmentation", "off")
}

// addressOf is the IPv4 address of a host on its cable to another.
func (c *cluster3) addressOf(name, towards string) string {
	for _, cable := range clusterCables {
		for _, ends := range [][2]port{{cable.a, cable.b}, {cable.b, cable.a}} {
			if ends[0].host == name && ends[1].host == towards {
				address, _, _ := strings.Cut(ends[0].v4, "/")
				return address
			}
		}
	}
	c.t.Fatalf("no cable joins %s to %s", name, towards)
	return ""
}
