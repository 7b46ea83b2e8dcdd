package server

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

var (
	egressGate4   = netip.MustParseAddr("100.64.0.0")
	egressGate6   = netip.MustParseAddr("fd12:3456:7880::1")
	egressClient4 = netip.MustParseAddr("100.64.0.7")
	egressClient6 = netip.MustParseAddr("fd12:3456:7880:7::1")
	egressOther4  = netip.MustParseAddr("100.64.0.8")
	loopback4     = netip.MustParseAddr("127.0.0.1")
)

const (
	egressTestHead = 20
	egressTestTail = 16
	egressTestMTU  = 1400
	egressWait     = 10 * time.Second // for what has to happen
)

// egressRig is a sockets egress with one client's netstack at its other side,
// over queues as a tunnel would be.
type egressRig struct {
	t      testing.TB
	e      *sockets
	client *netstack.Stack
	up     *egressWay
	down   *egressWay
	ahead  atomic.Int64 // how far the egress's clock is ahead, nanoseconds

	cancel context.CancelFunc
	done   chan error
}

// egressWay is one direction: what a full queue can't take is lost.
type egressWay struct {
	queue chan [][]byte
	to    func([][]byte)
	done  chan struct{}

	mu  sync.Mutex
	tap func(pkt []byte)
	off bool
}

func newEgressWay() *egressWay {
	return &egressWay{queue: make(chan [][]byte, 4096), done: make(chan struct{})}
}

// output is netstack.Config.Output: it checks the room around the packets,
// takes copies and overwrites the originals, as sealing would.
func (w *egressWay) output(t testing.TB) func([][]byte) {
	return func(pkts [][]byte) {
		w.mu.Lock()
		defer w.mu.Unlock()
		var batch [][]byte
		for _, p := range pkts {
			if len(p) < egressTestHead+20+egressTestTail || len(p) > egressTestHead+egressTestMTU+egressTestTail || cap(p) != len(p) {
				t.Errorf("packet of %d bytes with capacity %d", len(p), cap(p))
				return
			}
			b := append([]byte(nil), p[egressTestHead:len(p)-egressTestTail]...)
			for i := range p {
				p[i] = 0xee
			}
			if w.tap != nil {
				w.tap(b)
			}
			batch = append(batch, b)
		}
		if w.off {
			return
		}
		select {
		case w.queue <- batch:
		default:
		}
	}
}

func (w *egressWay) watch(tap func(pkt []byte)) { w.mu.Lock(); w.tap = tap; w.mu.Unlock() }

func (w *egressWay) loop() {
	defer close(w.done)
	for b := range w.queue {
		w.to(b)
	}
}

func (w *egressWay) stop() {
	w.mu.Lock()
	w.off = true
	w.mu.Unlock()
	close(w.queue)
	<-w.done
}

func egressClientOf(a netip.Addr) (uint32, bool) {
	switch a {
	case egressClient4, egressClient6:
		return 7, true
	case egressOther4:
		return 8, true
	}
	return 0, false
}

// newEgressRig starts an egress that may reach loopback and ends it with the
// test, checking that no flow and no goroutine is left.
func newEgressRig(t testing.TB, change ...func(*socketsConfig)) *egressRig {
	t.Helper()
	dir := t.TempDir()
	r := &egressRig{t: t, up: newEgressWay(), down: newEgressWay(), done: make(chan error, 1)}
	c := socketsConfig{
		MTU: egressTestMTU, Headroom: egressTestHead, Tailroom: egressTestTail,
		Gateway:    []netip.Addr{egressGate4, egressGate6},
		Output:     r.down.output(t),
		ClientOf:   egressClientOf,
		AllowLocal: true,
		Logger:     slog.New(slog.DiscardHandler),
		now:        func() time.Time { return time.Now().Add(time.Duration(r.ahead.Load())) },
		host:       dnsHostFiles{Hosts: filepath.Join(dir, "hosts"), ResolvConf: filepath.Join(dir, "resolv.conf")},
	}
	for _, f := range change {
		f(&c)
	}
	var err error
	if r.e, err = newSockets(c); err != nil {
		t.Fatal(err)
	}
	r.client, err = netstack.New(netstack.Config{
		MTU: egressTestMTU, Headroom: egressTestHead, Tailroom: egressTestTail,
		Output: r.up.output(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.client.SetAddresses([]netip.Addr{egressClient4, egressClient6}); err != nil {
		t.Fatal(err)
	}
	r.up.to, r.down.to = r.e.Input, r.client.Input
	go r.up.loop()
	go r.down.loop()
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.done <- r.e.Run(ctx) }()
	egressUntil(t, "the egress to run", r.e.running.Load)
	t.Cleanup(r.close)
	return r
}

func (r *egressRig) close() {
	r.client.Close()
	r.cancel()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(egressWait):
		r.t.Errorf("Run does not return\n%s", egressStacks())
		return
	}
	r.up.stop()
	r.down.stop()
	st := r.e.Stats()
	if st.Flows != 0 || st.Dials != 0 || st.Clients != 0 || st.DNS.InFlight != 0 {
		r.t.Errorf("left over: %d flows, %d dials, %d clients, %d questions", st.Flows, st.Dials, st.Clients, st.DNS.InFlight)
	}
	deadline := time.Now().Add(egressWait)
	for {
		left := egressLeftover()
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			r.t.Errorf("goroutines left over:\n%s", left)
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func egressStacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// egressLeftover returns the stacks of goroutines of the egress.
func egressLeftover() string {
	var out []string
	for g := range strings.SplitSeq(egressStacks(), "\n\n") {
		if strings.Contains(g, "server.egressLeftover") {
			continue
		}
		for _, mark := range []string{"server.(*sockets)", "server.(*dnsService)", "server.(*egress"} {
			if strings.Contains(g, mark) {
				out = append(out, g)
				break
			}
		}
	}
	return strings.Join(out, "\n\n")
}

// egressUntil waits until ok holds.
func egressUntil(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(egressWait)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func (r *egressRig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), egressWait)
	r.t.Cleanup(cancel)
	return ctx
}

// dial connects through the tunnel.
func (r *egressRig) dial(to netip.AddrPort) *netstack.Conn {
	r.t.Helper()
	c, err := r.client.DialTCP(r.ctx(), to)
	if err != nil {
		r.t.Fatalf("dial %s: %v", to, err)
	}
	if err := c.SetDeadline(time.Now().Add(egressWait)); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// egressListenTCP listens on the host's loopback.
func egressListenTCP(t testing.TB, at string) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		if strings.Contains(at, "::1") {
			t.Skipf("this host has no IPv6 loopback: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	l := ln.(*net.TCPListener)
	if err := l.SetDeadline(time.Now().Add(egressWait)); err != nil {
		t.Fatal(err)
	}
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

// egressAccept takes one connection from the host's side.
func egressAccept(t testing.TB, ln *net.TCPListener) *net.TCPConn {
	t.Helper()
	c, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(egressWait)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func egressWriteFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSocketsConfig(t *testing.T) {
	good := socketsConfig{MTU: 1400, Output: func([][]byte) {}, ClientOf: egressClientOf}
	for name, change := range map[string]func(*socketsConfig){
		"no output":       func(c *socketsConfig) { c.Output = nil },
		"no clients":      func(c *socketsConfig) { c.ClientOf = nil },
		"small mtu":       func(c *socketsConfig) { c.MTU = 1279 },
		"large mtu":       func(c *socketsConfig) { c.MTU = 65536 },
		"negative room":   func(c *socketsConfig) { c.Headroom = -1 },
		"negative limit":  func(c *socketsConfig) { c.MaxDials = -1 },
		"negative time":   func(c *socketsConfig) { c.UDPTimeout = -1 },
		"invalid gateway": func(c *socketsConfig) { c.Gateway = []netip.Addr{{}} },
		"upstream port 0": func(c *socketsConfig) { c.DNS = []netip.AddrPort{netip.AddrPortFrom(loopback4, 0)} },
		"no upstream":     func(c *socketsConfig) { c.DNS = []netip.AddrPort{{}} },
	} {
		c := good
		change(&c)
		if _, err := newSockets(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	e, err := newSockets(good)
	if err != nil {
		t.Fatal(err)
	}
	if e.cfg.MaxFlowsPerClient >= e.cfg.MaxFlows || e.cfg.MaxDialsPerClient >= e.cfg.MaxDials {
		t.Error("one client may hold as much as all")
	}
	if e.cfg.UDPTimeout < 2*time.Minute {
		t.Error("RFC 4787 REQ-5: UDP mappings end too soon")
	}
	// Never run: what it has must end all the same, and packets be dropped.
	e.Input([][]byte{make([]byte, 40)})
	if n := e.Stats().DropNotRunning; n != 1 {
		t.Errorf("%d packets dropped before Run, want 1", n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := e.Run(ctx); err != nil {
		t.Error(err)
	}
	if err := e.Run(ctx); err == nil {
		t.Error("a second Run gives no error")
	}
}

func TestEgressPolicy(t *testing.T) {
	gateway := []netip.Addr{egressGate4, egressGate6}
	strict, local := newEgressPolicy(gateway, false), newEgressPolicy(gateway, true)
	for _, c := range []struct {
		dst           string
		strict, local egressVerdict
	}{
		{"192.0.2.1", egressAllow, egressAllow},
		{"10.0.0.1", egressAllow, egressAllow},
		{"192.168.1.1", egressAllow, egressAllow},
		{"100.63.255.255", egressAllow, egressAllow},
		{"100.128.0.0", egressAllow, egressAllow},
		{"2001:db8::1", egressAllow, egressAllow},
		{"fd12:3456:78c0::1", egressAllow, egressAllow}, // the next cluster's
		{"fc00::1", egressAllow, egressAllow},
		{"127.0.0.1", egressForbid, egressAllow},
		{"127.255.255.254", egressForbid, egressAllow},
		{"::1", egressForbid, egressAllow},
		{"169.254.169.254", egressForbid, egressAllow},
		{"fe80::1", egressForbid, egressAllow},
		{"0.0.0.0", egressForbid, egressForbid},
		{"0.1.2.3", egressForbid, egressForbid},
		{"::", egressForbid, egressForbid},
		{"::7f00:1", egressForbid, egressForbid},
		{"::ffff:127.0.0.1", egressForbid, egressForbid},
		{"::ffff:192.0.2.1", egressForbid, egressForbid},
		{"224.0.0.1", egressForbid, egressForbid},
		{"239.255.255.255", egressForbid, egressForbid},
		{"ff02::1", egressForbid, egressForbid},
		{"ff0e::1", egressForbid, egressForbid},
		{"240.0.0.1", egressForbid, egressForbid},
		{"255.255.255.255", egressForbid, egressForbid},
		{"100.64.0.0", egressOwn, egressOwn},
		{"100.64.0.1", egressForbid, egressForbid},
		{"100.127.255.255", egressForbid, egressForbid},
		{"fd12:3456:7880::1", egressOwn, egressOwn},
		{"fd12:3456:7880::2", egressForbid, egressForbid},
		{"fd12:3456:78bf:ffff::1", egressForbid, egressForbid},
	} {
		dst := netip.MustParseAddr(c.dst)
		if v := strict.verdict(dst); v != c.strict {
			t.Errorf("%s: %d, want %d", c.dst, v, c.strict)
		}
		if v := local.verdict(dst); v != c.local {
			t.Errorf("%s with local addresses allowed: %d, want %d", c.dst, v, c.local)
		}
	}
	if v := strict.verdict(netip.Addr{}); v != egressForbid {
		t.Errorf("no address: %d", v)
	}
}

// TestInputGarbage feeds what no client's netstack would send.
func TestInputGarbage(t *testing.T) {
	r := newEgressRig(t)
	before := r.e.Stats().DropMalformed
	bad := [][]byte{
		{},
		{0x45},
		{0x60},
		{0xff, 1, 2},
		make([]byte, 20),
		append([]byte{0x46}, make([]byte, 22)...), // header beyond the end
		append([]byte{0x60, 0, 0, 0, 0, 9, 17, 64}, make([]byte, 32)...),
	}
	short := make([]byte, 24) // UDP header cut short
	putIPHeader(short, egressClient4, netip.MustParseAddr("192.0.2.1"), protoUDP)
	bad = append(bad, short)
	r.e.Input(bad)
	if n := r.e.Stats().DropMalformed - before; n != uint64(len(bad)) {
		t.Errorf("%d of %d packets counted as malformed", n, len(bad))
	}
}

func FuzzEgressInput(f *testing.F) {
	udp := make([]byte, 20+8+5)
	copy(udp[28:], "hello")
	putIPHeader(udp, egressClient4, netip.MustParseAddr("127.0.0.1"), protoUDP)
	putUDPHeader(udp, netip.AddrPortFrom(egressClient4, 5000), netip.AddrPortFrom(loopback4, 0))
	f.Add(udp)
	ping := make([]byte, 40+8)
	ping[40] = icmpv6EchoRequest
	putIPHeader(ping, egressClient6, netip.MustParseAddr("fd12:3456:7880::2"), protoICMPv6)
	f.Add(ping)
	frag := append([]byte(nil), udp...)
	frag[6] = 0x20
	f.Add(frag)
	ext := append([]byte(nil), ping[:40]...)
	ext[6] = 0
	ext = append(ext, protoICMPv6, 0, 1, 4, 0, 0, 0, 0, 128, 0, 0, 0, 0, 1, 0, 2)
	ext[5] = 16
	f.Add(ext)
	f.Add([]byte{0x45})
	r := newEgressRig(f, func(c *socketsConfig) {
		c.AllowLocal = false
		c.MaxFlows, c.MaxFlowsPerClient = 8, 4
		c.DialTimeout = time.Millisecond
	})
	inner := newEgressPolicy([]netip.Addr{egressGate4, egressGate6}, false)
	f.Fuzz(func(t *testing.T, b []byte) {
		keep := append([]byte(nil), b...)
		var p egressPacket
		if p.parse(b) {
			if len(p.payload) > len(b) {
				t.Fatal("payload longer than the packet")
			}
			if inner.verdict(p.dst) == egressAllow {
				return // not out of the test
			}
		}
		r.e.Input([][]byte{b, b})
		if string(keep) != string(b) {
			t.Fatal("Input changed the packet")
		}
	})
}
