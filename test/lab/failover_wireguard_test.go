//go:build linux

package lab

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What a user would try without anytun: two wireguard-go servers with the same
// key behind the same anycast address, both of which masquerade to the same
// egress address, and a wireguard-go client on a kernel TUN.

// wireguardModule is wireguard-go's main package, at an exact version.
const wireguardModule = "golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446"

const wireguardPort = 4444

var (
	wireguardClient = netip.MustParseAddr("10.99.0.2")
	wireguardServer = netip.MustParseAddr("10.99.0.1")
)

// wireguardProgram builds wireguard-go.
func wireguardProgram(t *testing.T) string {
	t.Helper()
	require(t, "wg")
	dir := filepath.Join(work, "wireguard")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "install", wireguardModule)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=-mod=mod")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("wireguard-go can't be built here: %v: %s", err, bytes.TrimSpace(out))
	}
	return filepath.Join(dir, "wireguard")
}

// wireguard starts wireguard-go on a host and configures it as wg does. The
// device's name is that of its control socket, which all namespaces share.
func startWireguard(t *testing.T, h *host, program, label string, address netip.Addr, config string) (*daemon, string) {
	t.Helper()
	device := fmt.Sprintf("wg%d.%d", os.Getpid(), hostNumber.Add(1))
	socket := filepath.Join("/var/run/wireguard", device+".sock")
	t.Cleanup(func() { _ = os.Remove(socket) })
	d := h.start(t, "wireguard-"+label, "env", "WG_PROCESS_FOREGROUND=1", "LOG_LEVEL=error", program, "-f", device)
	eventually(t, 20*time.Second, func() error {
		_, err := os.Stat(socket)
		return err
	})
	conf := filepath.Join(h.dir, "wg.conf")
	write(t, conf, config)
	if err := os.Chmod(conf, 0o600); err != nil {
		t.Fatal(err)
	}
	h.run(t, 10*time.Second, "wg", "setconf", device, conf)
	h.address(t, device, address.String()+"/24")
	ip(t, "-n", h.ns, "link", "set", device, "mtu", "1420", "up")
	return d, device
}

// A wireguardRig is the comparison's cluster.
type wireguardRig struct {
	*cluster3
	daemons, birds [2]*daemon
}

// newWireguard starts two servers and the client. quiet servers drop what they
// don't know; others let their kernel answer it with resets, which is how they
// come.
func newWireguard(t *testing.T, quiet bool) *wireguardRig {
	t.Helper()
	program := wireguardProgram(t)
	w := &wireguardRig{cluster3: newCluster3(t, cluster3Options{NoServers: true})}
	key := func() (private, public string) {
		private = strings.TrimSpace(w.app.run(t, 10*time.Second, "wg", "genkey"))
		return private, strings.TrimSpace(w.app.tryInput(t, 10*time.Second, private, "wg", "pubkey").stdout)
	}
	serverKey, serverPublic := key()
	clientKey, clientPublic := key()
	for i := range w.daemons {
		s := w.server(i + 1)
		w.daemons[i], _ = startWireguard(t, s.host, program, serverName(i+1), wireguardServer, fmt.Sprintf(
			"[Interface]\nPrivateKey = %s\nListenPort = %d\n[Peer]\nPublicKey = %s\nAllowedIPs = %s/32\n",
			serverKey, wireguardPort, clientPublic, wireguardClient))
		s.address(t, "lo", w.egress.v4.String()+"/32")
		// wireguard-go answers from the address of the way out, not from the one
		// that was asked, and no client's NAT lets that in.
		rules := fmt.Sprintf(`
table ip wg {
  chain post { type nat hook postrouting priority srcnat;
    ip saddr %s oifname "eth*" snat to %s
  }
  chain output { type filter hook output priority raw;
    oifname "eth*" udp sport %d notrack ip saddr set %s
  }
  chain service { type filter hook prerouting priority raw;
    iifname "eth*" ip daddr %s udp dport %d notrack
  }`, wireguardClient, w.egress.v4, wireguardPort, w.services.v4, w.services.v4, wireguardPort)
		if quiet {
			rules += fmt.Sprintf(`
  chain input { type filter hook input priority filter;
    ip daddr %s drop
  }`, w.egress.v4)
		}
		s.nft(t, rules+"\n}")
		w.birds[i] = startBird(t, s.host, w.addressOf(serverName(i+1), "core"), asServers, w.anycast(),
			[]birdPeer{{name: "core", address: w.addressOf("core", serverName(i+1)), as: asCore}})
	}
	for i := range w.daemons {
		w.announced(t, i+1)
	}
	_, device := startWireguard(t, w.app, program, "c", wireguardClient, fmt.Sprintf(
		"[Interface]\nPrivateKey = %s\n[Peer]\nPublicKey = %s\nAllowedIPs = 0.0.0.0/0\nEndpoint = %s:%d\nPersistentKeepalive = 25\n",
		clientKey, serverPublic, w.services.v4, wireguardPort))
	w.app.route(t, dst4.String()+"/32 dev "+device)
	// Return traffic takes the way of the client's: what a user would arrange,
	// since the server that never saw the connection can't translate it back.
	w.route(t, 1)
	eventually(t, 30*time.Second, func() error {
		if r := w.app.try(t, 10*time.Second, "ping", "-c", "1", "-W", "1", dst4.String()); r.code != 0 {
			return fmt.Errorf("no answer through wireguard: %s", r.stdout)
		}
		return nil
	})
	return w
}

// kill ends server 1 and the BIRD beside it, as a health check would.
func (w *wireguardRig) kill(t *testing.T) (converged time.Duration) {
	t.Helper()
	since := time.Now()
	for _, d := range []*daemon{w.daemons[0], w.birds[0]} {
		if err := d.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	return w.withdrawn(t, 1, since)
}

// TestFailoverWireGuard is the kill test with wireguard-go, for comparison. What
// becomes of its connections is nobody's failure here.
func TestFailoverWireGuard(t *testing.T) {
	scale := scaleOf(t)
	if scale.rounds == 0 {
		t.Skip("a measurement: test/bench/failover")
	}
	var rows []row
	for _, v := range []struct {
		name  string
		quiet bool
	}{
		{"`kill -9` of the wireguard-go that serves the client", false},
		{"the same, servers drop packets of unknown connections", true},
	} {
		t.Run(v.name, func(t *testing.T) { rows = append(rows, measureWireguard(t, scale, v.name, v.quiet)) })
	}
	printTable(t, "wireguard-go: two servers with one key behind one anycast address, routes steered to one at a time", rows)
}

func measureWireguard(t *testing.T, scale failoverScale, name string, quiet bool) row {
	w := newWireguard(t, quiet)
	r := startRun(t, w.app, w.dst, loadConfig{Sink: at(dst4, 7100), UDP: true, Ping: dst4, Rate: scale.rate, Tick: scale.tick}.connections(scale.connections))
	time.Sleep(scale.before)
	r.mark()
	out := row{name: name, converged: []time.Duration{w.kill(t)}}
	time.Sleep(time.Minute) // four times what wireguard takes for a new handshake
	during := r.report()
	end := r.end()
	out.streams, out.broken, out.why, out.flows = len(end.streams), len(end.broken()), end.why(), during.flows
	for _, s := range during.stalls() {
		out.stalls = append(out.stalls, max(0, s-out.converged[0]))
	}
	t.Log(out)
	return out
}
