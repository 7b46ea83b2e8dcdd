//go:build linux

package lab

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A capture is tcpdump writing what passes a host's interfaces to a file.
type capture struct {
	d    *daemon
	file string
}

// capture starts tcpdump on every interface of the host.
func (h *host) capture(t *testing.T, filter string) *capture {
	t.Helper()
	require(t, "tcpdump")
	file := filepath.Join(h.dir, "capture-"+strings.Map(letters, filter)+".pcap")
	c := &capture{file: file, d: h.start(t, "tcpdump", "tcpdump", "-i", "any", "-n", "-U", "--immediate-mode", "-Z", "root", "-w", file, filter)}
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(c.d.printed(), "listening on") {
			return fmt.Errorf("tcpdump: %s", c.d.printed())
		}
		return nil
	})
	return c
}

func letters(r rune) rune {
	if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' {
		return r
	}
	return '-'
}

// packets is one line of text per packet seen until now.
func (c *capture) packets(t *testing.T) []string {
	t.Helper()
	out := c.d.host.run(t, 20*time.Second, "tcpdump", "-n", "-r", c.file)
	var lines []string
	for line := range strings.Lines(out) {
		lines = append(lines, strings.TrimSpace(line))
	}
	return lines
}

// testNoDNS: names are resolved at the far end, and nothing that looks like a
// question for a name passes any interface of the client's host.
func testNoDNS(t *testing.T, n *network) {
	require(t, "curl", "dig")
	c := n.client.capture(t, "port 53 or port 853 or port 5353 or port 5355 or port 137")
	for _, proxy := range []string{"socks5h", "socks4a", "http"} {
		for _, target := range []string{webName, v4Name, v6Name} {
			if got := n.curl(t, 30*time.Second, "-x", proxy+"://"+proxyAddr, url("http", target, httpPort, "/")); got != "hello from nginx\n" {
				t.Errorf("%s %s: got %q", proxy, target, got)
			}
		}
	}
	for _, args := range [][]string{
		{"connect", noName, "80"},
		{"connect", "localhost", "80"},
		{"connect", "short", "80"}, // no search list either
		{"resolve", webName},
		{"ptr", dst4.String()},
	} {
		n.ask(t, args...)
	}
	// A datagram to a name, too.
	f := n.client.talk(t, socks(t, "forward", "5301", webName, fmt.Sprint(dnsPort))...)
	if line := f.hear(20 * time.Second); line != "ready" {
		t.Fatalf("forwarder: %s", line)
	}
	if got := n.client.run(t, 40*time.Second, "dig", "@127.0.0.1", "-p", "5301", "+short", webName, "A"); strings.TrimSpace(got) != dst4.String() {
		t.Errorf("dig over UDP ASSOCIATE: %q", got)
	}
	// Only now a question that does leave: the capture has to show it, and all
	// that came before it would have been shown too.
	n.client.try(t, 20*time.Second, "dig", "@198.51.100.1", "+time=1", "+tries=1", "marker.lab.test")
	var seen []string
	eventually(t, 10*time.Second, func() error {
		seen = c.packets(t)
		for _, line := range seen {
			if strings.Contains(line, "marker.lab.test") {
				return nil
			}
		}
		return fmt.Errorf("the capture doesn't show the question that was let out: %q", seen)
	})
	for _, line := range seen {
		if !strings.Contains(line, "marker.lab.test") {
			t.Errorf("left the client's host: %s", line)
		}
	}
}

// testReplies: every way a connection can fail has its own reply, as a SOCKS
// client that is not ours reads it.
func testReplies(t *testing.T, n *network) {
	const (
		notAllowed         = "2"
		networkUnreachable = "3"
		hostUnreachable    = "4"
		refused            = "5"
		expired            = "6"
	)
	for _, c := range []struct {
		name, host string
		port       int
		want       string // the replies that are right
	}{
		{"refused", dst4.String(), closed, refused},
		{"refused IPv6", dst6.String(), closed, refused},
		{"refused by name", badName, closed, refused},
		{"no route", unrouted4.String(), 80, networkUnreachable},
		{"no route IPv6", "2001:db8:ffff::1", 80, networkUnreachable},
		{"nobody there", absent4.String(), 80, hostUnreachable},
		{"prohibited by a route", forbidden4.String(), 80, notAllowed},
		{"the server's loopback", "127.0.0.1", serverAdminPort, notAllowed},
		{"the server's loopback IPv6", "::1", serverAdminPort, notAllowed},
		{"link-local", "169.254.169.254", 80, notAllowed},
		{"no such name", noName, 80, hostUnreachable},
		{"no answer", silent4.String(), 80, expired + hostUnreachable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			got := n.ask(t, "connect", c.host, fmt.Sprint(c.port))
			if len(got) != 1 || !strings.Contains(c.want, got) {
				t.Errorf("reply %q, want %s (after %v)", got, c.want, time.Since(began).Round(time.Millisecond))
			}
		})
	}
}

// testHostileDatagrams: what strangers and eavesdroppers can send to the
// server's port is dropped and counted, and disturbs nobody.
func testHostileDatagrams(t *testing.T, n *network) {
	c := n.router.capture(t, fmt.Sprintf("src host %s and udp dst port %d", natOuter4, serverPort))
	n.curl(t, 30*time.Second, "-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/"))
	eventually(t, 10*time.Second, func() error {
		if got := len(c.packets(t)); got < 8 {
			return fmt.Errorf("only %d packets captured", got)
		}
		return nil
	})
	kept := n.client.talk(t, socks(t, "kept", webName, fmt.Sprint(httpPort), "/index.html")...)
	if got := kept.hear(20 * time.Second); got != "connected" {
		t.Fatalf("kept: %q", got)
	}
	script, err := filepath.Abs(filepath.Join("testdata", "hostile.py"))
	if err != nil {
		t.Fatal(err)
	}
	target := netip.AddrPortFrom(srv4, serverPort)
	for kind, reason := range map[string]string{
		"garbage": "malformed", "truncated": "malformed", "replayed": "replay", "forged": "forged",
	} {
		t.Run(kind, func(t *testing.T) {
			before, rss := n.drops(t), n.server.rss(t)
			// From the router, an address that is not the client's.
			sent := strings.TrimSpace(n.router.run(t, 30*time.Second, socks(t)[0], script, kind, c.file, target.Addr().String(), fmt.Sprint(target.Port())))
			var count float64
			if _, err := fmt.Sscan(sent, &count); err != nil || count < 100 {
				t.Fatalf("sent %q datagrams", sent)
			}
			var after map[string]float64
			eventually(t, 10*time.Second, func() error {
				after = n.drops(t)
				if got := total(after) - total(before); got < count*0.9 { // a full socket buffer loses some
					return fmt.Errorf("%v of %v datagrams counted as dropped: %v", got, count, after)
				}
				return nil
			})
			for name, v := range after {
				if v != before[name] {
					t.Logf("%s: %v more", name, v-before[name])
				}
			}
			if name := fmt.Sprintf("anytun_server_dropped_total{reason=%q}", reason); after[name] == before[name] {
				t.Errorf("%s still counts %v", name, after[name])
			}
			// What doesn't outlive a datagram can't add up to megabytes.
			if grown := n.server.rss(t) - rss; grown > 16<<20 {
				t.Errorf("the server's memory grew by %d bytes", grown)
			}
			kept.say("again")
			if got := kept.hear(20 * time.Second); got != "200" {
				t.Errorf("the kept connection: %q", got)
			}
			if got := n.curl(t, 30*time.Second, "-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/")); got != "hello from nginx\n" {
				t.Errorf("a new connection: got %q", got)
			}
		})
	}
}

func total(drops map[string]float64) (sum float64) {
	for _, v := range drops {
		sum += v
	}
	return sum
}

// drops is the server's counters of dropped datagrams, by reason.
func (n *network) drops(t *testing.T) map[string]float64 {
	t.Helper()
	return n.server.samples(t, serverAdminPort, "drop")
}
