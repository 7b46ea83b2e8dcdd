//go:build linux

package lab

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// Errors from the path, and ports that run out: what the cluster does for whole
// hosts and for applications that are greedy.

// testTrace: every hop between a server and a destination answers the client's
// kernel, whatever the probes are, and however its packets enter and leave.
func testTrace(t *testing.T, c *cluster3) {
	require(t, "traceroute", "tracepath", "ping")
	defer c.route(t, 0)
	for _, h := range []*host{c.core, c.edge, c.dst, c.dst2} { // all probes come from one address: answer each
		h.sysctl(t, "net.ipv4.icmp_ratemask=0", "net.ipv4.icmp_msgs_per_sec=10000", "net.ipv6.icmp.ratelimit=0")
	}
	for _, steer := range []struct {
		name            string
		service, egress int
	}{{"answers enter elsewhere", 1, 2}, {"sprayed", -1, -1}} {
		c.routeService(t, steer.service)
		c.routeEgress(t, steer.egress)
		for _, to := range []struct {
			dst  netip.Addr
			hops []string // that must be among them
		}{
			// Which of its addresses a router answers from depends on its way back.
			{dst24, []string{"10.0.10.2|10.0.13.1", dst24.String()}},
			{dst26, []string{"fd00:10::2|fd00:13::1", dst26.String()}},
		} {
			for probe, args := range map[string][]string{"udp": {}, "icmp": {"-I", "-N", "1"}, "tcp": {"-T", "-p", strconv.Itoa(httpPort)}} {
				t.Run(fmt.Sprintf("%s %s %s", steer.name, to.dst, probe), func(t *testing.T) {
					eventually(t, 30*time.Second, func() error {
						out := c.app.run(t, 30*time.Second, append(append([]string{"traceroute", "-n", "-q", "1", "-w", "1", "-m", "8"}, args...), to.dst.String())...)
						for _, hop := range to.hops {
							if !regexp.MustCompile(` (` + hop + `) `).MatchString(out) {
								return fmt.Errorf("%s is not among the hops:\n%s", hop, out)
							}
						}
						return nil
					})
				})
			}
		}
	}
	// By name, the other things that a person tries first.
	c.route(t, 0)
	for _, dst := range []netip.Addr{dst4, dst6, dst24, dst26} {
		for _, size := range []string{"56", "3000"} { // whole and in fragments
			eventually(t, 30*time.Second, func() error {
				if r := c.app.try(t, 20*time.Second, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-s", size, dst.String()); r.code != 0 {
					return fmt.Errorf("%s", r.stdout)
				}
				return nil
			})
		}
	}
}

// testPathMTU: beyond the servers is a cable that takes less than the tunnel.
// tracepath finds it, and the proxy's uploads get through it.
func testPathMTU(t *testing.T, c *cluster3) {
	require(t, "curl", "tracepath")
	const narrow = 1290
	setMTU := func(mtu int) {
		ip(t, "-n", c.core.ns, "link", "set", "edge", "mtu", strconv.Itoa(mtu))
		ip(t, "-n", c.edge.ns, "link", "set", "core", "mtu", strconv.Itoa(mtu))
	}
	defer setMTU(1500)
	defer c.route(t, 0)
	setMTU(narrow)
	c.routeService(t, 1)
	c.routeEgress(t, 2) // the router's complaint enters at another server
	pmtu := regexp.MustCompile(`pmtu (\d+)`)
	for _, dst := range []netip.Addr{dst24, dst26} {
		eventually(t, 40*time.Second, func() error {
			out := c.app.run(t, 30*time.Second, "tracepath", "-n", "-m", "8", dst.String())
			found := pmtu.FindAllStringSubmatch(out, -1)
			if len(found) == 0 || found[len(found)-1][1] != strconv.Itoa(narrow) {
				return fmt.Errorf("a path MTU of %d expected:\n%s", narrow, out)
			}
			return nil
		})
		file := filepath.Join(c.app.dir, "upload")
		want := noise(t, file, 3<<20, 9)
		r := c.app.try(t, 90*time.Second, curlArgs(80*time.Second, "-x", "socks5h://"+proxyAddr, "-T", file,
			url("http", dst, httpPort, "/put/narrow"))...)
		if r.code != 0 {
			t.Errorf("upload to %v through the narrow cable: exit status %d: %s", dst, r.code, r.stderr)
			continue
		}
		if got, size := sumOfFile(t, filepath.Join(c.dst2.dir, "web", "put", "narrow")); got != want {
			t.Errorf("upload to %v through the narrow cable: %d bytes, another sum", dst, size)
		}
	}
}

// testPorts: one client has 1,024 ports of its own; more connections than that
// to one destination make it lease further ones, and they work like the others.
func testPorts(t *testing.T, c *cluster3) {
	const many = 1500
	r := startRun(t, c.app, c.dst, loadConfig{Proxy: proxyAddr, Sink: at(dst4, 7090), Idle: many - 100, Pings: 100})
	n := c.serving(t)
	c.kill(t, n)
	time.Sleep(time.Second)
	c.start(t, n)
	c.announced(t, n)
	end := r.end()
	if len(end.streams) != many || len(end.broken()) > 0 {
		t.Errorf("%d connections, %d broken: %s", len(end.streams), len(end.broken()), end.why())
	}
	for _, from := range end.from() {
		if from != egress4.String() {
			t.Errorf("connections come from %s", from)
		}
	}
}
