package nats

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/anytun-go/anytun/anytun/registry"
)

// helperEnv makes the test binary one server, or an engine, that can be killed.
const helperEnv = "ANYTUN_REGISTRY_HELPER"

type helperConfig struct {
	Config  Config
	Number  uint16
	Engine  string // port of an external engine, which is all then
	StoreIn string // of it
}

// helper runs until standard input ends. A server takes lines "CLIENT COUNTER" to
// publish, and prints such lines for what it knows anew.
func helper() bool {
	text := os.Getenv(helperEnv)
	if text == "" {
		return false
	}
	var c helperConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		fmt.Println("config", err) //nolint:forbidigo // its way to talk
		return true
	}
	if c.Engine != "" {
		runEngine(c)
		return true
	}
	b, err := New(c.Config)
	if err != nil {
		fmt.Println("new", err) //nolint:forbidigo // its way to talk
		return true
	}
	b.helloInterval = 500 * time.Millisecond
	h := &printing{memory: newMemory()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, h) }()
	fmt.Println("ready") //nolint:forbidigo // its way to talk
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var l registry.Location
		if _, err := fmt.Sscan(in.Text(), &l.Client, &l.Counter); err == nil {
			l = location(l.Client, l.Counter, c.Number)
			h.memory.Location(l)
			b.PublishLocation(l)
		}
	}
	cancel()
	<-done
	_ = b.Close()
	return true
}

type printing struct{ *memory }

func (p *printing) Location(l registry.Location) {
	if p.at(l.Client) < l.Counter {
		fmt.Println(l.Client, l.Counter) //nolint:forbidigo // its way to talk
	}
	p.memory.Location(l)
}

func runEngine(c helperConfig) {
	s, err := externalEngine(c.Engine, c.StoreIn)
	if err != nil {
		fmt.Println("engine", err) //nolint:forbidigo // its way to talk
		return
	}
	fmt.Println("ready") //nolint:forbidigo // its way to talk
	_, _ = io.Copy(io.Discard, os.Stdin)
	s.Shutdown()
	s.WaitForShutdown()
}

// externalEngine is a NATS server as anybody may run one.
func externalEngine(addr, dir string) (*server.Server, error) {
	host, port, err := splitListen(addr)
	if err != nil {
		return nil, err
	}
	s, err := server.NewServer(&server.Options{
		Host: host, Port: port, NoSigs: true, NoLog: true, JetStream: true, StoreDir: dir, ServerName: "external",
	})
	if err != nil {
		return nil, err
	}
	s.Start()
	if !s.ReadyForConnections(20 * time.Second) {
		return nil, errors.New("not ready")
	}
	return s, nil
}

// child is a process of the test binary.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser

	mu    sync.Mutex
	lines []string
	ended chan struct{}
}

func spawn(t *testing.T, c helperConfig) *child {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	p := &child{cmd: exec.Command(os.Args[0], "-test.run=^$"), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), helperEnv+"="+string(text))
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.mu.Lock()
			p.lines = append(p.lines, lines.Text())
			p.mu.Unlock()
		}
	}()
	t.Cleanup(p.kill)
	eventually(t, "the child is ready", func() bool { return p.said("ready") })
	return p
}

func (p *child) said(line string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.lines, line)
}

// kill is kill -9.
func (p *child) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
	_ = p.cmd.Wait()
}

func TestKilledServer(t *testing.T) {
	t.Parallel()
	cs := configs(t, 3)
	third := helperConfig{Config: cs[2], Number: 3}
	third.Config.Logger = nil
	p := spawn(t, third)
	nodes := []*node{start(t, 1, cs[0], nil), start(t, 2, cs[1], nil)}
	three := func() bool { return nodes[0].Bus.Stats().Peers == 2 && nodes[1].Bus.Stats().Peers == 2 }
	eventually(t, "three servers", three)
	fmt.Fprintln(p.in, "7 70")
	eventually(t, "the child's client is known", func() bool { return nodes[0].at(7) == 70 && nodes[1].at(7) == 70 })
	if _, err := claims(t, nodes[0], block(1, 1)); err != nil {
		t.Fatal(err)
	}
	p.kill()
	// Locations don't wait for anybody's election, claims may.
	nodes[0].tell(8, 80)
	eventually(t, "locations go on", func() bool { return nodes[1].at(8) == 80 })
	if got, err := claims(t, nodes[1], block(1, 2)); !errors.Is(err, registry.ErrTaken) || got.Owner != 1 {
		t.Error("the dead server took the claim with it:", got, err)
	}
	if _, err := claims(t, nodes[1], block(2, 2)); err != nil {
		t.Error("two of three can't decide:", err)
	}
	for c := range uint32(9000) { // more than two messages of a snapshot
		nodes[0].memory.Location(location(1000+c, 1, 1))
	}
	again := spawn(t, third)
	eventually(t, "the restarted server has it all", func() bool {
		return again.said("8 80") && again.said("7 70") && again.said("1000 1") && again.said("9999 1")
	})
	eventually(t, "three servers again", three)
}

func TestRestart(t *testing.T) {
	t.Parallel()
	nodes, cs := cluster(t, 0, 1, 2)
	if _, err := claims(t, nodes[0], block(3, 9)); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(cs[0].StoreDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Error("store dir:", info.Mode(), err)
	}
	// One after the other, as an upgrade does; each comes back with nothing.
	for i, n := range nodes {
		n.stop()
		other := nodes[(i+1)%3]
		other.tell(uint32(100+i), 1)
		nodes[i] = start(t, n.number, cs[i], nil)
		together(t, nodes...)
		eventually(t, "what it missed", func() bool { return nodes[i].at(uint32(100+i)) == 1 })
	}
	// All at once: only the disks know.
	for _, n := range nodes {
		n.stop()
	}
	for i, n := range nodes {
		nodes[i] = start(t, n.number, cs[i], nil)
	}
	if got, err := claims(t, nodes[2], block(3, 8)); !errors.Is(err, registry.ErrTaken) || got.Owner != 9 {
		t.Error("after a restart of all:", got, err)
	}
	eventually(t, "all are told of the claim", func() bool {
		return nodes[0].owner("block.3") == 9 && nodes[1].owner("block.3") == 9 && nodes[2].owner("block.3") == 9
	})
}

// wire is a TCP relay that can be cut: no connection passes then.
type wire struct {
	listener net.Listener
	mu       sync.Mutex
	target   string
	cut      bool
	conns    []net.Conn
	copies   sync.WaitGroup
}

func newWire(t *testing.T, target string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: l, target: target}
	w.copies.Go(w.accept)
	t.Cleanup(func() {
		l.Close()
		w.set(true)
		w.copies.Wait()
	})
	return w
}

func (w *wire) addr() string { return w.listener.Addr().String() }

func (w *wire) accept() {
	for {
		in, err := w.listener.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", w.target)
		w.mu.Lock()
		if err != nil || w.cut {
			in.Close()
			if err == nil {
				out.Close()
			}
			w.mu.Unlock()
			continue
		}
		w.conns = append(w.conns, in, out)
		w.mu.Unlock()
		w.copies.Go(func() { _, _ = io.Copy(in, out); in.Close(); out.Close() })
		w.copies.Go(func() { _, _ = io.Copy(out, in); in.Close(); out.Close() })
	}
}

func (w *wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
	if cut {
		for _, c := range w.conns {
			c.Close()
		}
		w.conns = nil
	}
}

// Three servers that can't reach each other go on alone, without claims, and
// know everything afterwards.
func TestPartition(t *testing.T) {
	t.Parallel()
	cs := configs(t, 3)
	var wires []*wire
	var addrs []string
	for i := range cs {
		wires = append(wires, newWire(t, cs[i].Listen))
		addrs = append(addrs, wires[i].addr())
	}
	var nodes []*node
	for i := range cs {
		cs[i].Join, cs[i].Advertise = addrs, addrs[i]
		nodes = append(nodes, start(t, uint16(i+1), cs[i], nil))
	}
	together(t, nodes...)
	if _, err := claims(t, nodes[0], block(1, 1)); err != nil {
		t.Fatal(err)
	}
	for _, w := range wires {
		w.set(true)
	}
	eventually(t, "nobody sees anybody", func() bool {
		return nodes[0].Bus.Stats().Peers+nodes[1].Bus.Stats().Peers+nodes[2].Bus.Stats().Peers == 0
	})
	for i, n := range nodes {
		n.tell(uint32(i+1), uint64(100+i))
		mapping := registry.Mapping{Client: uint32(i + 1), Protocol: 6, Inner: 1, Public: 2, Since: 3}
		n.memory.Mapping(mapping)
		n.PublishMapping(mapping)
		if err := n.Ready(); err != nil {
			t.Error("its own engine is there:", err)
		}
	}
	eventually(t, "no majority", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := nodes[1].Bus.Claim(ctx, block(2, 2))
		return errors.Is(err, registry.ErrUnavailable)
	})
	for _, w := range wires {
		w.set(false)
	}
	for i, n := range nodes {
		eventually(t, fmt.Sprintf("server %d knows all", i+1), func() bool {
			n.memory.mu.Lock()
			known := len(n.memory.mappings)
			n.memory.mu.Unlock()
			return n.at(1) == 100 && n.at(2) == 101 && n.at(3) == 102 && known == 3
		})
	}
	if _, err := claims(t, nodes[2], block(2, 3)); err != nil && !errors.Is(err, registry.ErrTaken) {
		t.Error(err)
	}
}

// The routes break for less than it takes to miss a server: numbers tell.
func TestBlip(t *testing.T) {
	t.Parallel()
	cs := configs(t, 2)
	w := newWire(t, cs[0].Listen)
	cs[0].Join, cs[1].Join = nil, []string{w.addr()}
	cs[0].Advertise = w.addr()
	a, b := startHello(t, 1, cs[0], nil, time.Second), startHello(t, 2, cs[1], nil, 10*time.Second)
	together(t, a, b)
	for counter := uint64(1); counter <= 3; counter++ {
		w.set(true)
		a.tell(1, counter)
		w.set(false)
		eventually(t, "the lost message's contents", func() bool { return b.at(1) == counter })
	}
}

func TestAlone(t *testing.T) {
	t.Parallel()
	for _, join := range [][]string{nil, {"127.0.0.1:1"}} {
		c := Config{Listen: "127.0.0.1:0", Join: join, ServerName: "only", StoreDir: t.TempDir(), Secret: secret, Logger: testLogger(t)}
		n := start(t, 1, c, nil)
		n.tell(1, 1)
		eventually(t, "sent to nobody", func() bool {
			s := n.Bus.Stats()
			return s.Pending == 0 && s.Out[registry.TypeLocation].Records == 1
		})
		if err := n.Ready(); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if _, err := n.Bus.Claim(ctx, block(1, 1)); !errors.Is(err, registry.ErrUnavailable) {
			t.Error("claim without a majority:", err)
		}
		cancel()
		if n.Addr() == "" {
			t.Error("no address")
		}
		n.stop()
		if _, err := n.Bus.Claim(t.Context(), block(1, 1)); !errors.Is(err, registry.ErrClosed) || !errors.Is(n.Ready(), registry.ErrClosed) {
			t.Error("after Close:", err, n.Ready())
		}
		if err := n.Run(t.Context(), n.memory); !errors.Is(err, registry.ErrClosed) {
			t.Error("Run after Close:", err)
		}
		n.PublishLocation(location(1, 2, 1))
	}
}

// A server with another secret isn't let in, even if it knows all names.
func TestStranger(t *testing.T) {
	t.Parallel()
	cs := configs(t, 3)
	cs[2].Secret = "another"
	stranger := start(t, 3, cs[2], nil)
	a, b := start(t, 1, cs[0], nil), start(t, 2, cs[1], nil)
	together(t, a, b)
	a.tell(1, 1)
	eventually(t, "the two talk", func() bool { return b.at(1) == 1 })
	if n := stranger.engine.server.NumRoutes(); n != 0 {
		t.Errorf("the stranger has %d routes", n)
	}
	right, err := routeTLS([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := routeTLS([]byte("another"))
	if err != nil {
		t.Fatal(err)
	}
	unnamed := right.Clone()
	unnamed.Certificates = nil
	for name, test := range map[string]struct {
		client *tls.Config
		ok     bool
	}{"ours": {right, true}, "another's": {wrong, false}, "without a certificate": {unnamed, false}} {
		in, out := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- tls.Server(in, right).Handshake() }()
		client := tls.Client(out, test.client)
		// The server's verdict comes after the client's.
		clientErr := client.Handshake()
		go func() { _, _ = io.Copy(io.Discard, client) }()
		serverErr := <-done
		in.Close()
		out.Close()
		if (clientErr == nil && serverErr == nil) != test.ok {
			t.Errorf("%s: %v, %v", name, clientErr, serverErr)
		}
	}
}

// lockedBuffer is a log that the engine's goroutines write.
type lockedBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func TestLogHidesSecrets(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cs := configs(t, 3) // the third never starts, so that connecting fails
	for i := range cs {
		cs[i].Logger = logger
	}
	a, b := start(t, 1, cs[0], nil), start(t, 2, cs[1], nil)
	together(t, a, b)
	password, err := routePassword([]byte(secret))
	a.stop()
	b.stop()
	// The engine hides it itself where we have seen it.
	(&engineLog{logger: logger, hidden: password}).Errorf("dial nats://anytun:%s@%s", password, "host")
	log.mu.Lock()
	defer log.mu.Unlock()
	text := log.text.String()
	if err != nil || !strings.Contains(text, "Route connection created") {
		t.Fatalf("%v, log %s", err, text)
	}
	for what, hidden := range map[string]string{"secret": secret, "route password": password, "client password": a.engine.password} {
		if strings.Contains(text, hidden) {
			t.Errorf("the %s is in the log", what)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	good := Config{Listen: "127.0.0.1:0", ServerName: "a", StoreDir: t.TempDir(), Secret: secret}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func(*Config){
		"secret":                func(c *Config) { c.Secret = "" },
		"either":                func(c *Config) { c.URL = "nats://127.0.0.1:4222" },
		"cluster name":          func(c *Config) { c.ClusterName = "a.b" },
		"server name":           func(c *Config) { c.ServerName = "a b" },
		"directory":             func(c *Config) { c.StoreDir = "" },
		"store dir":             func(c *Config) { c.StoreDir = file },
		"cluster address":       func(c *Config) { c.Listen = "127.0.0.1" },
		"port":                  func(c *Config) { c.Listen = "127.0.0.1:x" },
		"server to join":        func(c *Config) { c.Join = []string{"host"} },
		"start cluster":         func(c *Config) { c.Listen = taken.Addr().String() },
		"registry connect":      func(c *Config) { *c = Config{URL: "nats://127.0.0.1:bad", Secret: secret} },
		"no such file or direc": func(c *Config) { *c = Config{URL: "nats://127.0.0.1:1", Credentials: "/nowhere", Secret: secret} },
	} {
		c := good
		spoil(&c)
		b, err := New(c)
		if err == nil {
			b.Close()
			t.Errorf("%s: no error", what)
		} else if !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
