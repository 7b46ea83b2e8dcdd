//go:build linux

package lab

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	socksPort       = 1080
	proxyAdminPort  = 9080
	serverAdminPort = 9444
	serverPort      = 4444
)

// proxyAddr is where the proxy listens, as applications on its host write it.
const proxyAddr = "127.0.0.1:1080"

// A place is where the scenarios run: applications on client reach site through
// the proxy that listens on client.
type place struct {
	client *host
	site   *site
	proxy  *daemon
	public bool // the site can reach the client: it has a public address
}

// startProxy starts anytun-proxy as an ordinary user and waits until it listens.
func startProxy(t *testing.T, h *host, args ...string) *daemon {
	t.Helper()
	d := h.start(t, "anytun-proxy", ordinary(append([]string{
		program(t, "anytun-proxy"),
		"--listen", proxyAddr,
		"--admin", fmt.Sprintf("127.0.0.1:%d", proxyAdminPort), "--log-level", "debug",
	}, args...)...)...)
	d.listening(t, "tcp", socksPort)
	return d
}

// A cluster is a server's key and its clients.
type cluster struct {
	host         *host
	key, clients string
}

// newCluster makes a cluster's key on the server's host.
func newCluster(t *testing.T, h *host) *cluster {
	t.Helper()
	c := &cluster{host: h, key: filepath.Join(h.dir, "cluster.key"), clients: filepath.Join(h.dir, "clients.txt")}
	h.run(t, 10*time.Second, ordinary(program(t, "anytun-server"), "keygen", "--out", c.key)...)
	return c
}

// invite adds a client and returns its URL. address is the server's, host:port.
func (c *cluster) invite(t *testing.T, name, address string) string {
	t.Helper()
	out := c.host.run(t, 10*time.Second, ordinary(program(t, "anytun-server"), "invite",
		"--cluster-key", c.key, "--clients", c.clients, "--name", name, "--address", address)...)
	for field := range strings.FieldsSeq(out) {
		if strings.HasPrefix(field, "anytun://") {
			return field
		}
	}
	t.Fatalf("invite printed no anytun:// URL: %q", out)
	return ""
}

// startServer starts anytun-server as an ordinary user and waits until it listens.
func (c *cluster) startServer(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := c.host.start(t, "anytun-server", ordinary(append([]string{
		program(t, "anytun-server"),
		"--listen", fmt.Sprintf("[::]:%d", serverPort), "--cluster-key", c.key, "--clients", c.clients,
		"--admin", fmt.Sprintf("127.0.0.1:%d", serverAdminPort), "--log-level", "debug",
	}, args...)...)...)
	d.listening(t, "udp", serverPort)
	return d
}

// loopback is the small place with the proxy's embedded server.
func loopback(t *testing.T) *place {
	t.Helper()
	h := newOne(t)
	p := &place{client: h, site: serve(t, h, loop4, loop6)}
	p.proxy = startProxy(t, h)
	return p
}

// A network is the large place with both programs running.
type network struct {
	*five
	*place
	cluster *cluster
	server  *daemon
}

// lab is the large place; the client reaches the server by outer, the server's
// IPv4 or IPv6 address.
func lab(t *testing.T, outer string) *network {
	t.Helper()
	f := newFive(t)
	n := &network{five: f, place: &place{client: f.app, site: serve(t, f.dst, dst4, dst6)}, cluster: newCluster(t, f.srv)}
	invite := n.cluster.invite(t, "laptop", outer)
	n.server = n.cluster.startServer(t)
	// A destination that says nothing is given up after less than the default.
	n.proxy = startProxy(t, f.app, "--server", invite, "--dial-timeout", "8s")
	return n
}

// samples are the metrics of a daemon whose name contains the word, each under
// its name and labels.
func (d *daemon) samples(t *testing.T, port int, word string) map[string]float64 {
	t.Helper()
	text := d.host.run(t, 10*time.Second, curlArgs(5*time.Second, fmt.Sprintf("http://127.0.0.1:%d/metrics", port))...)
	found := make(map[string]float64)
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		at := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || at < 0 || !strings.Contains(line[:at], word) {
			continue
		}
		v, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("metric line %q: %v", line, err)
		}
		found[line[:at]] = v
	}
	if len(found) == 0 {
		t.Fatalf("%s has no metric with %q in its name", d.name, word)
	}
	return found
}
