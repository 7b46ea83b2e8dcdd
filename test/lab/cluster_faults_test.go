//go:build linux

package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestCluster: three servers do for programs what one does, from the egress
// address, whichever server a packet meets.
func TestCluster(t *testing.T) {
	c := newCluster3(t, cluster3Options{})
	for _, s := range scenarios {
		switch s.name {
		case "dig", "python", "ssh":
			t.Run(s.name, func(t *testing.T) { s.test(t, c.place) })
		}
	}
	for name, test := range map[string]func(*testing.T, *cluster3){
		"source": testClusterSource, "blind": testClusterBlind, "bulk": testClusterBulk,
		"narrow": testClusterNarrow, "bind": testClusterBind,
	} {
		t.Run(name, func(t *testing.T) { test(t, c) })
	}
	for _, f := range clusterFaults {
		t.Run(f.name, func(t *testing.T) { c.survives(t, f) })
	}
}

// TestClusterSameAddress: the service address is the egress address too, the
// client comes by IPv6.
func TestClusterSameAddress(t *testing.T) {
	c := newCluster3(t, cluster3Options{SameAddress: true, OuterIPv6: true})
	t.Run("source", func(t *testing.T) { testClusterSource(t, c) })
	t.Run("blind", func(t *testing.T) { testClusterBlind(t, c) })
	for _, f := range clusterFaults {
		if f.name == "kill" || f.name == "spray" {
			t.Run(f.name, func(t *testing.T) { c.survives(t, f) })
		}
	}
}

// get asks for a page through the proxy.
func (c *cluster3) get(t *testing.T, url string) string {
	t.Helper()
	return c.app.run(t, 40*time.Second, curlArgs(30*time.Second, "-x", "socks5h://"+proxyAddr, url)...)
}

// testClusterSource: destinations see the egress addresses, whichever server
// lets packets out.
func testClusterSource(t *testing.T, c *cluster3) {
	defer c.route(t, 0)
	for number := range clusterServers {
		c.routeService(t, number+1)
		for to, want := range map[netip.Addr]netip.Addr{dst4: c.egress.v4, dst6: c.egress.v6, dst24: c.egress.v4, dst26: c.egress.v6} {
			if got := strings.TrimSpace(c.get(t, url("http", to, httpPort, "/who"))); got != want.String() {
				t.Errorf("by %s, %v sees %s, want %v", serverName(number+1), to, got, want)
			}
		}
	}
}

// testClusterBlind: answers enter at a server that has never heard the client.
func testClusterBlind(t *testing.T, c *cluster3) {
	defer c.route(t, 0)
	c.routeService(t, 1)
	before := c.counts(t)
	for range 5 {
		c.get(t, url("http", dst24, httpPort, "/"))
	}
	after := c.counts(t)
	t.Log(sharesOf(before, after))
	if after[2].Service != before[2].Service || after[2].Egress < before[2].Egress+15 || after[0].Service == before[0].Service {
		t.Errorf("clients at s1, answers at s3 expected: %s", sharesOf(before, after))
	}
}

// bothWays sends a file to a destination and back, byte for byte.
func (c *cluster3) bothWays(t *testing.T, to netip.Addr, size int64) {
	t.Helper()
	path := filepath.Join(c.app.dir, "file")
	want := noise(t, path, size, 9)
	began := time.Now()
	c.curl(t, time.Minute, "-x", "socks5h://"+proxyAddr, "-T", path, url("http", to, httpPort, "/put/file"))
	up := time.Since(began)
	if got, n := sumOfFile(t, filepath.Join(c.site.web, "put", "file")); got != want {
		t.Errorf("%v got %d bytes, sum %s, want %s", to, n, got, want)
	}
	began = time.Now()
	got, n := c.download(t, time.Minute, "-x", "socks5h://"+proxyAddr, url("http", to, httpPort, "/put/file"))
	if got != want {
		t.Errorf("%v gave %d bytes, sum %s, want %s", to, n, got, want)
	}
	t.Logf("%v: %d MB, up in %.2f s, down in %.2f s", to, size>>20, up.Seconds(), time.Since(began).Seconds())
}

// testClusterBulk: much data each way, by both families.
func testClusterBulk(t *testing.T, c *cluster3) {
	for _, to := range []netip.Addr{dst4, dst6} {
		c.bothWays(t, to, 64<<20)
	}
}

// testClusterNarrow: beyond the servers is a cable for smaller packets than the
// tunnel's. What the router there says must reach the client, whichever server
// it meets.
func testClusterNarrow(t *testing.T, c *cluster3) {
	mtu := func(n string) {
		ip(t, "-n", c.core.ns, "link", "set", "dst", "mtu", n)
		ip(t, "-n", c.dst.ns, "link", "set", "eth0", "mtu", n)
	}
	defer mtu("1500")
	mtu("1300")
	// dst promises to take more than the cable does, or nobody would notice.
	ip(t, "-n", c.dst.ns, "route", "change", "default", "via", "192.0.2.1", "advmss", "1460")
	ip(t, "-n", c.dst.ns, "-6", "route", "change", "default", "via", "2001:db8:3::1", "advmss", "1440")
	defer ip(t, "-n", c.dst.ns, "route", "change", "default", "via", "192.0.2.1")
	defer ip(t, "-n", c.dst.ns, "-6", "route", "change", "default", "via", "2001:db8:3::1")
	for _, to := range []netip.Addr{dst4, dst6} {
		c.bothWays(t, to, 2<<20)
	}
}

// testClusterBind: an application waits at the egress address, and a host out
// there connects, through whichever server.
func testClusterBind(t *testing.T, c *cluster3) {
	defer c.route(t, 0)
	for number := range clusterServers {
		waiting := c.client.talk(t, socks(t, "bind", dst4.String(), "0")...)
		var code, port int
		var host string
		line := waiting.hear(20 * time.Second)
		if _, err := fmt.Sscan(line, &code, &host, &port); err != nil || code != 0 || host != c.egress.v4.String() || port == 0 {
			t.Fatalf("bind: %q, want a port of %v", line, c.egress.v4)
		}
		c.routeEgress(t, number+1)
		if got := c.dst.tryInput(t, 30*time.Second, "ping!", "nc.openbsd", "-w", "20", host, fmt.Sprint(port)).stdout; got != "pong\n" {
			t.Errorf("by %s: the peer got %q, want the answer", serverName(number+1), got)
		}
		if line := waiting.hear(20 * time.Second); !strings.HasPrefix(line, "0 "+dst4.String()+" ") {
			t.Errorf("second reply %q, want the peer's address", line)
		}
	}
}

// A fault is something a download must survive, and how it is put right after.
type fault struct {
	name      string
	do, after func(*testing.T, *cluster3, int)
}

var clusterFaults = []fault{
	{"kill", func(t *testing.T, c *cluster3, n int) { c.kill(t, n) }, func(t *testing.T, c *cluster3, n int) { c.start(t, n) }},
	{"stop", func(t *testing.T, c *cluster3, n int) { c.stop(t, n) }, func(t *testing.T, c *cluster3, n int) { c.cont(t, n) }},
	{"cut", func(t *testing.T, c *cluster3, n int) { c.cut(t, n) }, func(t *testing.T, c *cluster3, n int) { c.heal(t, n) }},
	{"drain", func(t *testing.T, c *cluster3, n int) { c.drain(t, n) }, func(t *testing.T, c *cluster3, n int) { c.start(t, n) }},
	{"flip", func(t *testing.T, c *cluster3, n int) {
		for range 6 {
			n = n%clusterServers + 1
			c.route(t, n)
			time.Sleep(300 * time.Millisecond)
		}
	}, func(t *testing.T, c *cluster3, _ int) { c.route(t, 0) }},
	{"spray", func(t *testing.T, c *cluster3, _ int) { c.spray(t) }, func(t *testing.T, c *cluster3, _ int) { c.route(t, 0) }},
	{"roam", func(t *testing.T, c *cluster3, _ int) {
		c.roam(t, "wan2")
		time.Sleep(500 * time.Millisecond)
		c.roam(t, "mobile")
	}, func(t *testing.T, c *cluster3, _ int) { c.roam(t, "wan") }},
}

// survives breaks something at the server that the client uses while a file
// comes down, and looks at what arrived.
func (c *cluster3) survives(t *testing.T, f fault) {
	want := noise(t, filepath.Join(c.site.web, "slow.bin"), 5<<20, 7)
	got := &watchedCounter{}
	h := sha256.New()
	done := make(chan result, 1)
	go func() {
		done <- c.app.stream(t, 2*time.Minute, nil, io.MultiWriter(h, got), curlArgs(110*time.Second,
			"-x", "socks5h://"+proxyAddr, url("http", dst4, httpPort, "/slow/slow.bin"))...)
	}()
	eventually(t, 20*time.Second, func() error {
		if got.Load() < 1<<20 {
			return fmt.Errorf("only %d bytes have come", got.Load())
		}
		return nil
	})
	number := c.serving(t)
	before, began := c.counts(t), time.Now()
	f.do(t, c, number)
	switch f.name {
	case "kill", "stop", "cut", "drain":
		t.Logf("%s %s: no route leads there after %v", f.name, serverName(number), c.withdrawn(t, number, began))
	}
	r := <-done
	t.Logf("served by %s before; in the %.1f s since: %s", serverName(number), time.Since(began).Seconds(), sharesOf(before, c.counts(t)))
	if sum := sum(hex.EncodeToString(h.Sum(nil))); r.code != 0 || sum != want {
		t.Errorf("exit status %d, %d bytes, sum %s, want %s: %s", r.code, got.Load(), sum, want, r.stderr)
	}
	f.after(t, c, number)
	for _, s := range c.servers {
		c.announced(t, s.number)
	}
}

// A watchedCounter counts what is written to it while others look.
type watchedCounter struct{ atomic.Int64 }

func (c *watchedCounter) Write(b []byte) (int, error) {
	c.Add(int64(len(b)))
	return len(b), nil
}
