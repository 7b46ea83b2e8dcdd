//go:build linux

package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// TestClusterNetwork: the network of the cluster does what the tests of the
// servers rely on, shown with BIRD and a UDP echo in the place of each server.
func TestClusterNetwork(t *testing.T) {
	c := newCluster3(t, cluster3Options{StandIns: true})
	for _, s := range []struct {
		name string
		test func(*testing.T, *cluster3)
	}{
		{"ecmp", testNetworkECMP},
		{"route", testNetworkRoute},
		{"spray", testNetworkSpray},
		{"death", testNetworkDeath},
		{"roam", testNetworkRoam},
		{"shape", testNetworkShape},
	} {
		t.Run(s.name, func(t *testing.T) { s.test(t, c) })
	}
}

// all are the anycast addresses.
func (c *cluster3) all() []netip.Addr {
	var all []netip.Addr
	for _, p := range c.anycast() {
		all = append(all, p.Addr())
	}
	return all
}

// testNetworkECMP: flows to every anycast address are spread over all servers;
// from behind edge they enter at s3.
func testNetworkECMP(t *testing.T, c *cluster3) {
	for _, to := range c.all() {
		before := c.counts(t)
		for _, from := range []*host{c.app, c.dst} {
			if got, _ := from.asked(t, to, 60); got["s1"]+got["s2"]+got["s3"] != 60 || min(got["s1"], got["s2"], got["s3"]) < 5 {
				t.Errorf("%s to %v: answered by %v, want all three", from.ns, to, got)
			}
		}
		after := c.counts(t)
		for i := range after {
			service, egress := after[i].Service-before[i].Service, after[i].Egress-before[i].Egress
			if toService := to == c.services.v4 || to == c.services.v6; toService && (service < 10 || egress != 0) || !toService && (egress < 10 || service != 0) {
				t.Errorf("to %v: %s", to, sharesOf(before, after))
			}
		}
		if got, _ := c.dst2.asked(t, to, 20); got["s3"] != 20 {
			t.Errorf("dst2 to %v: answered by %v, want s3", to, got)
		}
	}
}

// testNetworkRoute: steering is obeyed at both routers, apart for the two kinds.
func testNetworkRoute(t *testing.T, c *cluster3) {
	defer c.route(t, 0)
	for number := range clusterServers {
		c.route(t, number+1)
		for _, to := range c.all() {
			for _, from := range []*host{c.app, c.dst, c.dst2} {
				// The services of stand-ins are those of servers: edge leaves clients' packets alone.
				if got, _ := from.asked(t, to, 10); got[serverName(number+1)] != 10 {
					t.Errorf("%s to %v: answered by %v, want %s", from.ns, to, got, serverName(number+1))
				}
			}
		}
	}
	c.routeService(t, 1)
	c.routeEgress(t, 2)
	if got, _ := c.app.asked(t, c.services.v4, 10); got["s1"] != 10 {
		t.Errorf("service: answered by %v, want s1", got)
	}
	if got, _ := c.dst.asked(t, c.egress.v6, 10); got["s2"] != 10 {
		t.Errorf("egress: answered by %v, want s2", got)
	}
}

// testNetworkSpray: every packet of one flow takes its chance, and one that has
// withdrawn gets none.
func testNetworkSpray(t *testing.T, c *cluster3) {
	defer c.route(t, 0)
	if got := c.app.paced(t, c.services.v4, 60, time.Millisecond); len(got.Servers) != 1 || got.Answered != 60 {
		t.Errorf("before: %+v, want one server", got)
	}
	c.spray(t)
	for _, to := range []netip.Addr{c.services.v4, c.egress.v6} {
		for _, from := range []*host{c.app, c.dst, c.dst2} {
			got := from.paced(t, to, 300, time.Millisecond)
			if got.Answered != 300 || min(got.Servers["s1"], got.Servers["s2"], got.Servers["s3"]) < 60 {
				t.Errorf("%s to %v: %+v, want a third each", from.ns, to, got)
			}
		}
	}
	c.drain(t, 2)
	c.withdrawn(t, 2, time.Now())
	if got := c.dst.paced(t, c.egress.v4, 100, time.Millisecond); got.Answered != 100 || got.Servers["s2"] != 0 || len(got.Servers) != 2 {
		t.Errorf("without s2: %+v", got)
	}
	c.start(t, 2)
	c.announced(t, 2)
}

// testNetworkDeath: routers stop sending to a server that dies, hangs or is cut
// off, and send again when it is back.
func testNetworkDeath(t *testing.T, c *cluster3) {
	for _, d := range []struct {
		name        string
		break_, fix func(*testing.T, int)
	}{
		{"kill", c.kill, func(t *testing.T, n int) { c.start(t, n) }},
		{"stop", c.stop, c.cont},
		{"cut", c.cut, c.heal},
	} {
		for _, number := range []int{1, 3} {
			began := time.Now()
			d.break_(t, number)
			t.Logf("%s %s: no route leads there after %v", d.name, serverName(number), c.withdrawn(t, number, began))
			for _, from := range []*host{c.app, c.dst, c.dst2} {
				if got, _ := from.asked(t, c.egress.v4, 12); got["nobody"]+got[serverName(number)] != 0 {
					t.Errorf("%s %d: %s answered by %v", d.name, number, from.ns, got)
				}
			}
			began = time.Now()
			d.fix(t, number)
			c.announced(t, number)
			t.Logf("%s is back after %v", serverName(number), time.Since(began))
		}
	}
}

// testNetworkRoam: each uplink has addresses of its own.
func testNetworkRoam(t *testing.T, c *cluster3) {
	for _, w := range []struct{ uplink, v4, v6 string }{
		{"wan", "198.51.100.2", "2001:db8:1:1::2"},
		{"wan2", "198.51.100.6", "2001:db8:1:2::2"},
		{"mobile", "198.51.100.10", "2001:db8:1:3::2"},
		{"wan2", "198.51.100.6", "2001:db8:1:2::2"},
		{"mobile", "198.51.100.10", "2001:db8:1:3::2"},
		{"wan", "198.51.100.2", "2001:db8:1:1::2"},
	} {
		c.roam(t, w.uplink)
		for to, want := range map[netip.Addr]string{c.services.v4: w.v4, c.services.v6: w.v6} {
			if _, seen := c.app.asked(t, to, 5); seen[want] != 5 {
				t.Errorf("by %s the servers see %v, want %s", w.uplink, seen, want)
			}
		}
	}
}

// testNetworkShape: cables become slow, lossy and disorderly, and good again.
func testNetworkShape(t *testing.T, c *cluster3) {
	c.route(t, 1)
	defer c.route(t, 0)
	pace := func() pacing { return c.dst.paced(t, c.egress.v4, 600, time.Millisecond) }
	good := func(when string) {
		t.Helper()
		if p := pace(); p.Answered != p.Sent || p.Overtaken != 0 || p.Fastest > 20*time.Millisecond {
			t.Errorf("%s: %+v", when, p)
		}
	}
	good("before")
	c.shape(t, "core-dst", shape{Delay: 25 * time.Millisecond})
	if p := pace(); p.Answered != p.Sent || p.Overtaken != 0 || p.Fastest < 50*time.Millisecond {
		t.Errorf("delay: %+v", p)
	} else {
		t.Logf("25 ms each way: %v to %v", p.Fastest, p.Slowest)
	}
	c.shapeFrom(t, "dst", "core", shape{Delay: 5 * time.Millisecond, Late: 20 * time.Millisecond, LateShare: 0.02})
	c.shapeFrom(t, "core", "dst", shape{})
	if p := pace(); p.Answered != p.Sent || p.Overtaken < 2 || p.Overtaken > 100 || p.Fastest < 5*time.Millisecond || p.Fastest > 25*time.Millisecond {
		t.Errorf("a share late: %+v", p)
	}
	c.shape(t, "core-dst", shape{Jitter: 10 * time.Millisecond})
	if p := pace(); p.Answered != p.Sent || p.Overtaken < 150 {
		t.Errorf("jitter: %+v", p)
	}
	c.shape(t, "core-dst", shape{Loss: 0.1})
	if p := pace(); p.Answered < 410 || p.Answered > 550 || p.Overtaken != 0 {
		t.Errorf("a tenth lost each way: %+v", p)
	}
	c.shape(t, "core-dst", shape{Rate: 20e6})
	rate, reverse := c.throughput(t, c.access, dst4)
	t.Logf("at 20 Mbit/s: %.1f and %.1f Mbit/s", rate/1e6, reverse/1e6)
	if rate > 20e6 || reverse > 20e6 {
		t.Errorf("%.1f and %.1f Mbit/s through a cable of 20", rate/1e6, reverse/1e6)
	}
	c.shape(t, "core-dst", shape{})
	good("after")
	if rate, reverse = c.throughput(t, c.access, dst4); rate < 20e6 || reverse < 20e6 {
		t.Errorf("%.1f and %.1f Mbit/s through a good cable", rate/1e6, reverse/1e6)
	}
	t.Logf("without: %.0f and %.0f Mbit/s", rate/1e6, reverse/1e6)
}

// throughput is what TCP carries to and from a destination, in bits a second.
func (c *cluster3) throughput(t *testing.T, from *host, to netip.Addr) (there, back float64) {
	t.Helper()
	for _, d := range []struct {
		rate *float64
		args []string
	}{{&there, nil}, {&back, []string{"-R"}}} {
		out := from.run(t, time.Minute, append([]string{"iperf3", "-J", "-t", "2", "-c", to.String()}, d.args...)...)
		var report struct {
			End struct {
				Received struct {
					Rate float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			}
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(fmt.Errorf("iperf3: %w", err))
		}
		*d.rate = report.End.Received.Rate
	}
	return there, back
}
