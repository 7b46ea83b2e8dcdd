//go:build linux

package lab

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// The anycast cluster: three servers behind one address, real BGP, and every
// fault that a test wants to make. Servers are called by number, 1 to 3, and
// links by the two hosts they join.
//
//	              ┌─ wan ──┐                 ┌─ s1
//	app ── nat ───┤        ├ access ── core ─┼─ s2
//	  │           └─ wan2 ─┘   │         │ │ └─ s3 ─┐
//	  └──────── mobile ────────┘       dst └─ edge ─┘
//	                                           └─ dst2
//
//	c := newCluster3(t, cluster3Options{})   hosts, routers, destinations, servers, the client; all connected
//	c.app, c.nat, c.access, c.core, c.edge, c.dst, c.dst2, c.host("s1")
//	c.place                                  what the scenarios of the large place want (client, site, proxy)
//	c.proxy                                  anytun-proxy on app, SOCKS and HTTP at proxyAddr
//	c.server(1).daemon                       anytun-server on s1; its admin page at serverAdminPort of its loopback
//
//	c.kill(t, 1)                kill -9, waited for
//	c.stop(t, 1); c.cont(t, 1)  SIGSTOP, SIGCONT: the process hangs, its kernel doesn't
//	c.drain(t, 1)               SIGTERM, and waits until it has ended
//	c.start(t, 1, args...)      starts it (again) and waits until its socket is there
//	c.cut(t, 1); c.heal(t, 1)   the cables of s1 carry nothing: the host is dead, nobody says so
//
//	c.announced(t, 1)           waits until the routers send packets to s1
//	c.withdrawn(t, 1, since)    waits until no router does; the time from since until the last of their routes changed
//	c.route(t, 2)               everything to s2, whatever BGP prefers; 0: as BGP says (ECMP over all that announce)
//	c.routeService(t, 2)        only what clients send
//	c.routeEgress(t, 2)         only what destinations send to the egress addresses
//	c.spray(t)                  every packet of both takes a random server; c.route(t, 0) ends it
//	                            A server that has withdrawn its routes gets nothing by route or spray either.
//	c.roam(t, "wan2")           the client's uplink: "wan", "wan2" (another address of its NAT) or "mobile" (past the NAT)
//	c.shape(t, "core-dst", shape{Delay: 20 * time.Millisecond, Loss: 0.01})   both ways; shape{} undoes it
//	c.shapeFrom(t, "core", "dst", shape{...})                                  only core's packets to dst
//
//	c.counts(t)                 packets that have arrived at each server, by kind
//	c.serving(t)                the server that gets the client's packets now
//
// Everything takes the t of the test or subtest that asks; what it starts ends
// with the cluster.
type cluster3 struct {
	*place
	app, nat, access, core, edge, dst, dst2 *host

	t        *testing.T
	options  cluster3Options
	keys     *cluster
	invite   string
	hosts    map[string]*host
	servers  []*server3
	atCore   *routeWatch
	atEdge   *routeWatch
	services addressPair
	egress   addressPair
	uplink   string
	shapes   map[string]*shaped // by "from-to"
}

// cluster3Options: the zero value is the cluster of the usual tests.
type cluster3Options struct {
	SameAddress bool     // traffic leaves from the service address itself
	OuterIPv6   bool     // the client reaches the servers by IPv6
	ServerArgs  []string // further flags of anytun-server
	ProxyArgs   []string // further flags of anytun-proxy
	Offload     bool     // let 64 KiB super-packets cross the cables: faster, but a spray then sprays super-packets
	StandIns    bool     // no programs of ours: a BIRD and a UDP echo on every server
	NoServers   bool     // hosts, routers and destinations only; start servers and proxy by hand
	NoProxy     bool
}

// An addressPair is one IPv4 and one IPv6 address.
type addressPair struct{ v4, v6 netip.Addr }

// A server3 is one server of the cluster.
type server3 struct {
	*host
	number int
	daemon *daemon // nil before its first start
}

// newCluster3 builds the cluster and waits until routes stand and the client is
// connected.
func newCluster3(t *testing.T, o cluster3Options) *cluster3 {
	t.Helper()
	requireNamespaces(t)
	require(t, "bird", "birdc", "tc", "ethtool", "iperf3", "ss")
	c := &cluster3{
		t: t, options: o, shapes: make(map[string]*shaped), uplink: "wan",
		services: addressPair{service4, service6}, egress: addressPair{egress4, egress6},
	}
	if o.SameAddress {
		c.egress = c.services
	}
	c.build(t)
	c.routers(t)
	for _, d := range []struct {
		host *host
		at   addressPair
	}{{c.dst2, addressPair{dst24, dst26}}, {c.dst, addressPair{dst4, dst6}}} {
		c.place = &place{client: c.app, site: serve(t, d.host, d.at.v4, d.at.v6), public: true}
		d.host.start(t, "iperf3", "iperf3", "-s").listening(t, "tcp", 5201)
	}
	if o.NoServers {
		return c
	}
	if !o.StandIns {
		c.enrol(t)
	}
	for _, s := range c.servers {
		c.start(t, s.number)
	}
	for _, s := range c.servers {
		c.announced(t, s.number)
	}
	if !o.StandIns && !o.NoProxy {
		c.startProxy(t)
	}
	return c
}

// enrol makes the cluster's key and one client.
func (c *cluster3) enrol(t *testing.T) {
	t.Helper()
	c.keys = newCluster(t, c.host("s1"))
	outer := c.services.v4
	if c.options.OuterIPv6 {
		outer = c.services.v6
	}
	c.invite = c.keys.invite(t, "laptop", netip.AddrPortFrom(outer, serverPort).String())
}

// startProxy starts the client and waits until it is connected.
func (c *cluster3) startProxy(t *testing.T) {
	t.Helper()
	args := append([]string{"--server", c.invite, "--dial-timeout", "8s"}, c.options.ProxyArgs...)
	c.proxy = startProxy(c.t, c.app, args...)
	c.endQuickly(c.proxy)
	eventually(t, 30*time.Second, func() error {
		code := c.app.try(t, 10*time.Second, curlArgs(5*time.Second, "-o", "/dev/null", "-w", "%{http_code}",
			fmt.Sprintf("http://127.0.0.1:%d/readyz", proxyAdminPort))...).stdout
		if code != "200" {
			return fmt.Errorf("the proxy isn't connected: /readyz says %s", code)
		}
		return nil
	})
}

// host finds a host by its name in the drawing.
func (c *cluster3) host(name string) *host {
	h, ok := c.hosts[name]
	if !ok {
		c.t.Fatalf("no host is called %q", name)
	}
	return h
}

// server is the server with the number, counted from 1.
func (c *cluster3) server(number int) *server3 {
	if number < 1 || number > len(c.servers) {
		c.t.Fatalf("no server has the number %d", number)
	}
	return c.servers[number-1]
}

// names are the hosts, sorted.
func (c *cluster3) names() []string {
	var names []string
	for n := range c.hosts {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
