//go:build linux

package lab

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// natsProgram builds the NATS server of the version that anytun-server embeds.
var natsProgram = sync.OnceValues(func() (string, error) {
	file := filepath.Join(work, "nats-server")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", file, "github.com/nats-io/nats-server/v2")
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, bytes.TrimSpace(out))
	}
	return file, nil
})

const natsPort = 4222

// TestFailoverRegistry: the registry's engine, here a NATS server of its own
// beside each server, is killed everywhere. What the servers know is enough for
// every client they know.
func TestFailoverRegistry(t *testing.T) {
	scale := scaleOf(t)
	scale.connections -= 100 // without a registry there are no ports but the client's own
	program, err := natsProgram()
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster3(t, cluster3Options{NoServers: true, ServerArgs: []string{"--drain-time", scale.drain.String()}})
	c.enrol(t)
	engines := make([]*daemon, clusterServers)
	startEngine := func(t *testing.T, i int) {
		s, routes := c.servers[i], []string{}
		for _, other := range c.servers {
			if other != s {
				routes = append(routes, fmt.Sprintf("nats://%s:%d", c.addressOf(serverName(other.number), "core"), clusterPort))
			}
		}
		engines[i] = s.host.start(c.t, "nats-server", program, "--addr", "127.0.0.1", "--port", fmt.Sprint(natsPort),
			"--jetstream", "--store_dir", filepath.Join(s.dir, "nats"), "--name", serverName(s.number),
			"--cluster_name", "lab", "--cluster", fmt.Sprintf("nats://%s:%d", c.addressOf(serverName(s.number), "core"), clusterPort),
			"--routes", strings.Join(routes, ","))
		engines[i].listening(t, "tcp", natsPort)
	}
	for i, s := range c.servers {
		startEngine(t, i)
		args := slices.Clone(c.serverArgs(t, s))
		for j := 0; j < len(args); {
			if args[j] == "--cluster-listen" || args[j] == "--cluster-join" {
				args = slices.Delete(args, j, j+2)
			} else {
				j++
			}
		}
		s.daemon = s.host.start(c.t, serverName(s.number), withNetAdmin(append(args, "--registry", fmt.Sprintf("nats://127.0.0.1:%d", natsPort))...)...)
		s.daemon.listening(t, "udp", serverPort)
	}
	for _, s := range c.servers {
		c.announced(t, s.number)
	}
	c.startProxy(t)
	c.startKernel(t)
	for _, s := range c.servers {
		eventually(t, time.Minute, func() error {
			if got := s.registry(t)["anytun_registry_ready"]; got != 1 {
				return fmt.Errorf("%s isn't connected to its registry", serverName(s.number))
			}
			return nil
		})
	}

	var rows []row
	for round := range max(1, scale.rounds) {
		t.Run("engines", func(t *testing.T) {
			x := &trial{c: c, scale: scale, row: row{name: "the registry's engine killed on every server, back later"}}
			x.measure(t, at(dst4, uint16(7300+round)), func(x *trial, t *testing.T) {
				for _, e := range engines {
					if err := e.cmd.Process.Kill(); err != nil {
						t.Fatal(err)
					}
					<-e.done
				}
				time.Sleep(x.scale.after)
				// Connections that begin now, and packets that meet another server.
				if err := x.more(50); err != nil {
					t.Errorf("without a registry: %v", err)
				}
				x.streams += 50
				for n := range clusterServers {
					x.c.route(t, n+1)
					time.Sleep(500 * time.Millisecond)
				}
				x.c.route(t, 0)
				for i := range engines {
					startEngine(t, i)
				}
			})
			rows = append(rows, x.row)
		})
	}
	printTable(t, "Registry as processes of their own", rows)
}

// registry is a server's counters of what it shares with the others.
func (s *server3) registry(t *testing.T) map[string]float64 {
	t.Helper()
	return s.daemon.samples(t, serverAdminPort, "anytun_registry_")
}

// synchronisation counts what servers tell each other because of connections: a
// thousand are opened, used and closed.
func synchronisation(t *testing.T, c *cluster3, scale failoverScale, sink netip.AddrPort) row {
	t.Helper()
	c.route(t, 0)
	shared := func() (records, bytes, others float64) {
		for _, s := range c.servers {
			for name, v := range s.registry(t) {
				about := strings.Contains(name, `type="location"`) || strings.Contains(name, `type="mapping"`)
				switch {
				case !strings.Contains(name, `direction="out"`):
				case strings.HasPrefix(name, "anytun_registry_bytes_total") && about:
					bytes += v
				case strings.HasPrefix(name, "anytun_registry_records_total") && about:
					records += v
				case strings.HasPrefix(name, "anytun_registry_bytes_total"):
					others += v
				}
			}
		}
		return records, bytes, others
	}
	records, bytes, others := shared()
	began := time.Now()
	r := startRun(t, c.app, c.dst, loadConfig{Proxy: proxyAddr, Sink: sink, Rate: scale.rate, Tick: scale.tick}.connections(scale.connections))
	time.Sleep(scale.before)
	end := r.end()
	records2, bytes2, others2 := shared()
	took := time.Since(began)
	out := row{
		name: "bytes of synchronisation per TCP connection", streams: len(end.streams), broken: len(end.broken()), why: end.why(),
		note: fmt.Sprintf("%.2f bytes (%.0f records, %.0f bytes for all connections; %.0f bytes in %.1f s that don't depend on them)",
			(bytes2-bytes)/float64(len(end.streams)), records2-records, bytes2-bytes, others2-others, took.Seconds()),
	}
	t.Log(out)
	if out.broken > 0 {
		t.Errorf("%d of %d connections broke: %s", out.broken, out.streams, out.why)
	}
	if bytes == 0 {
		t.Error("the servers have told each other nothing of any client: what is counted?")
	}
	// A client may move while the test runs; a thousand connections must not show.
	if records2-records > 10 {
		t.Errorf("%.0f records for %d connections, want none", records2-records, len(end.streams))
	}
	return out
}
