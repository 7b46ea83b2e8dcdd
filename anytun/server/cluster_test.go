package server

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

var (
	testService = netip.MustParseAddrPort("203.0.113.1:4444")
	testWorld   = netip.MustParseAddr("192.0.2.80")
)

// bus is a registry that keeps what it is told.
type bus struct {
	registry.Registry
	mu    sync.Mutex
	words []registry.Location
}

func (b *bus) PublishLocation(l registry.Location) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.words = append(b.words, l)
}

// outer is an outer socket that keeps what is sent.
type outer struct {
	nowhere
	mu   sync.Mutex
	sent [][]byte
	to   []udp.Endpoint
}

func (o *outer) WriteBatch(pkts [][]byte, to udp.Endpoint) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range pkts {
		o.sent = append(o.sent, slices.Clone(p))
		o.to = append(o.to, to)
	}
	return nil
}

// serverRig is a server that doesn't run, clients 1 to 9 of which 9 is an any-port
// one, and what it says.
type serverRig struct {
	*Server
	bus     *bus
	conn    *outer
	cluster *session.Cluster
	list    []Enrolment
	in      *receiver
}

func newServerRig(t testing.TB, change ...func(*Config)) *serverRig {
	t.Helper()
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := &serverRig{bus: &bus{Registry: registry.NewMemory()}, conn: new(outer), cluster: cluster}
	for n := uint32(1); n <= 9; n++ {
		r.list = append(r.list, Enrolment{Key: testKey(byte(n)), Name: string(rune('a' + n)), Number: n, AnyPort: n == 9})
	}
	cfg := Config{
		Conns: []udp.Conn{r.conn}, Cluster: cluster, Clients: NewDirectory(r.list), Registry: r.bus,
		Egress: func(func([][]byte)) (Egress, error) { return new(sink), nil },
	}
	for _, f := range change {
		f(&cfg)
	}
	if r.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.in = &receiver{Server: r.Server, conn: r.conn}
	return r
}

// from lets plaintexts of one session come from an endpoint, in one batch.
func (r *serverRig) from(g *session.Granted, at string, plain ...[]byte) {
	var list [][]byte
	for _, p := range plain {
		b := make([]byte, wire.Overhead+len(p))
		copy(b[wire.DataHeaderLen:], p)
		list = append(list, b)
	}
	g.Seal(list)
	r.in.now = time.Now()
	r.in.group(&udp.Group{From: udp.Endpoint{Addr: netip.MustParseAddrPort(at), Local: testService.Addr()}, Packets: list})
}

// innerOf is a packet of a client to the world.
func (r *serverRig) innerOf(client uint32) []byte {
	return ipPacket(r.inner.IPv4(client), testWorld, 40)
}

func (r *serverRig) at(client uint32) netip.AddrPort {
	p := r.table.lookup(client)
	if p == nil {
		return netip.AddrPort{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at.to
}

// What other servers tell, in any order and more than once, leaves what the
// client's newest message said; that it was heard elsewhere meanwhile changes
// nothing.
func TestNewsInAnyOrder(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newServerRig(t)
		g := granted(t, r.cluster, 3, time.Now())
		var words []func()
		counter := uint64(1000)
		var want netip.AddrPort
		for range 1 + rng.IntN(6) {
			counter += 1 + rng.Uint64N(3)
			l := registry.Location{
				Client: 3, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: counter, Server: 2, Local: testService,
				Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rng.IntN(4))}), 1),
			}
			want = l.Endpoint
			if rng.IntN(4) == 0 {
				l.Left, l.Endpoint, l.Local, want = true, netip.AddrPort{}, netip.AddrPort{}, netip.AddrPort{}
			}
			words = append(words, func() { (*news)(r.Server).Location(l) })
			seen := registry.Seen{Client: 3, Counter: counter + rng.Uint64N(3)}
			words = append(words, func() { (*news)(r.Server).Seen([]registry.Seen{seen}) })
		}
		words = append(words, words[rng.IntN(len(words))])
		rng.Shuffle(len(words), func(i, j int) { words[i], words[j] = words[j], words[i] })
		for _, f := range words {
			f()
		}
		if got := r.at(3); got != want {
			t.Fatalf("seed %d: the client is at %v, want %v", seed, got, want)
		}
		if w := r.pathTo(3); (w != nil) != want.IsValid() || w != nil && w.to.Addr != want {
			t.Fatalf("seed %d: the path to the client is %v, want to %v", seed, w, want)
		}
	}
}

// What a server tells is about the message that showed it, not about what was
// heard elsewhere since.
func TestWordOfOldPlace(t *testing.T) {
	r := newServerRig(t)
	g := granted(t, r.cluster, 3, time.Now())
	l := registry.Location{
		Client: 3, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: 100, Server: 2, Local: testService,
		Endpoint: netip.MustParseAddrPort("10.0.0.1:1"),
	}
	n := (*news)(r.Server)
	n.Location(l)
	n.Seen([]registry.Seen{{Client: 3, Counter: 500}})
	n.Snapshot(func(got registry.Location) bool {
		if got != l {
			t.Errorf("it tells %+v", got)
		}
		return true
	})
	old := l
	old.Counter, old.Left = 99, true
	n.Location(old)
	if r.at(3) != l.Endpoint {
		t.Error("an old goodbye counts")
	}
	l.Left, l.Counter = true, 101
	n.Location(l)
	n.Snapshot(func(got registry.Location) bool { t.Errorf("a snapshot has %+v", got); return true })
}

// That others have heard a client makes older messages worthless: they move nobody,
// and soon aren't taken at all.
func TestSeenElsewhere(t *testing.T) {
	r := newServerRig(t)
	now := time.Now()
	g := granted(t, r.cluster, 3, now)
	r.from(g, "10.0.0.1:1", r.innerOf(3))
	first := uint64(now.UnixNano())
	n := (*news)(r.Server)
	n.Seen([]registry.Seen{{Client: 3, Counter: first + 100}, {Client: 4, Counter: 1}})
	r.from(g, "10.0.0.2:2", r.innerOf(3))
	if at := r.at(3); at != netip.MustParseAddrPort("10.0.0.1:1") {
		t.Errorf("an old packet has moved the client to %v", at)
	}
	if got := r.in.egress; len(got) != 2 {
		t.Errorf("%d packets went out, want 2", len(got))
	}
	n.Seen([]registry.Seen{{Client: 3, Counter: first + 100 + session.WindowLen}})
	r.from(g, "10.0.0.1:1", r.innerOf(3))
	if d := r.Stats().Drops[DropReplay.String()]; d != 1 {
		t.Errorf("%d packets dropped as too old, want 1", d)
	}
	if r.table.lookup(4) != nil {
		t.Error("a client nobody knows the place of got an entry")
	}
}

// Two words with one counter: the first one stays, unless the client was forgotten.
func TestNewsAgain(t *testing.T) {
	r := newServerRig(t)
	g := granted(t, r.cluster, 3, time.Now())
	l := registry.Location{
		Client: 3, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: 100, Server: 2, Local: testService,
		Endpoint: netip.MustParseAddrPort("10.0.0.1:1"),
	}
	(*news)(r.Server).Location(l)
	other := l
	other.Endpoint = netip.MustParseAddrPort("10.0.0.2:2")
	(*news)(r.Server).Location(other)
	if at := r.at(3); at != l.Endpoint {
		t.Errorf("the client is at %v", at)
	}
	if !r.table.lookup(3).silence(time.Now().Add(time.Second).UnixNano()) || r.at(3).IsValid() {
		t.Fatal("the silent client wasn't forgotten")
	}
	(*news)(r.Server).Location(other)
	if at := r.at(3); at != other.Endpoint {
		t.Errorf("the forgotten client is at %v", at)
	}
}

// A goodbye from a new place reaches the others even though its message showed the
// place, too.
func TestGoodbyeFromNewPlace(t *testing.T) {
	r, other := newServerRig(t), newServerRig(t)
	g := granted(t, r.cluster, 3, time.Now())
	r.from(g, "10.0.0.1:1", r.innerOf(3))
	r.from(g, "10.0.0.2:2", r.innerOf(3), wire.AppendClose(nil, wire.CloseLeaving))
	if len(r.bus.words) != 3 || !r.bus.words[2].Left || r.bus.words[2].Counter <= r.bus.words[1].Counter {
		t.Fatalf("told %+v", r.bus.words)
	}
	slices.Reverse(r.bus.words)
	for _, l := range r.bus.words {
		(*news)(other.Server).Location(l)
	}
	if at := other.at(3); at.IsValid() {
		t.Errorf("the other server still takes it to be at %v", at)
	}
	if at := r.at(3); at.IsValid() {
		t.Errorf("the server itself takes it to be at %v", at)
	}
}

// A late goodbye of a session that was replaced isn't one.
func TestGoodbyeOfOldSession(t *testing.T) {
	r := newServerRig(t)
	now := time.Now()
	old, fresh := granted(t, r.cluster, 3, now), granted(t, r.cluster, 3, now.Add(time.Second))
	r.from(old, "10.0.0.1:1", r.innerOf(3))
	r.from(fresh, "10.0.0.2:2", r.innerOf(3))
	r.from(old, "10.0.0.1:1", wire.AppendClose(nil, wire.CloseLeaving))
	if at := r.at(3); at != netip.MustParseAddrPort("10.0.0.2:2") {
		t.Errorf("the client is at %v", at)
	}
}

// A client can't make servers talk as fast as it changes its endpoint; they know
// the last one in the end.
func TestWordsAreBounded(t *testing.T) {
	r := newServerRig(t)
	g := granted(t, r.cluster, 3, time.Now())
	for range 500 {
		r.from(g, "10.0.0.1:1", r.innerOf(3))
		r.from(g, "10.0.0.2:2", r.innerOf(3))
	}
	if n := len(r.bus.words); n < wordBurst || n > wordBurst+10 {
		t.Errorf("told %d times", n)
	}
	now := time.Now().Add(2 * time.Second)
	r.publishLate(now)
	last := r.bus.words[len(r.bus.words)-1]
	if last.Endpoint != netip.MustParseAddrPort("10.0.0.2:2") {
		t.Errorf("the last word is %+v", last)
	}
	told := len(r.bus.words)
	r.publishLate(now.Add(time.Minute))
	if len(r.bus.words) != told {
		t.Error("told again what was told")
	}
	for range 500 {
		r.from(g, "10.0.0.1:1", r.innerOf(3))
		r.from(g, "10.0.0.1:1", wire.AppendClose(nil, wire.CloseLeaving))
		r.from(g, "10.0.0.1:1", r.innerOf(3)) // has the counter of the goodbye's word
	}
	r.from(g, "10.0.0.1:1", wire.AppendClose(nil, wire.CloseLeaving))
	if n := len(r.bus.words) - told; n > wordBurst+10 {
		t.Errorf("told %d times of goodbyes", n)
	}
	r.publishLate(now.Add(time.Hour))
	if last := r.bus.words[len(r.bus.words)-1]; !last.Left {
		t.Errorf("the last word is %+v", last)
	}
}

// Servers read their clients files one after another.
func TestNewsOfClientEnrolledLater(t *testing.T) {
	r := newServerRig(t)
	g := granted(t, r.cluster, 12, time.Now())
	to := netip.MustParseAddrPort("10.0.0.1:1")
	(*news)(r.Server).Location(registry.Location{
		Client: 12, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: 100, Server: 2, Local: testService, Endpoint: to,
	})
	if r.pathTo(12) != nil {
		t.Error("there is a path to a client that isn't enrolled")
	}
	r.cfg.Clients.(*Directory).Replace(append(r.list, Enrolment{Key: testKey(12), Name: "late", Number: 12}))
	r.Reload()
	if w := r.pathTo(12); w == nil || w.to.Addr != to {
		t.Error("there is none after it was enrolled")
	}
	r.cfg.Clients.(*Directory).Replace(r.list)
	if r.sweep(time.Now()); r.pathTo(12) != nil {
		t.Error("there is one after it was removed")
	}
	for _, n := range []uint32{session.Gateway, session.MaxClient + 1} {
		(*news)(r.Server).Location(registry.Location{Client: n, Session: 1, Counter: 1, Endpoint: to, Local: testService})
		if r.table.lookup(n) != nil {
			t.Errorf("client %d got an entry", n)
		}
	}
}

// sink is an egress that counts.
type sink struct{ packets int }

func (s *sink) Input(pkts [][]byte)         { s.packets += len(pkts) }
func (*sink) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (*sink) Drain()                        {}

// BenchmarkReceive is the inward road of a server: a batch of sealed datagrams to
// the egress by a device.
func BenchmarkReceive(b *testing.B) {
	r := newServerRig(b, withDevice(b))
	b.Cleanup(func() { r.egress.(*tunEgress).Services.stack.Close() })
	g := granted(b, r.cluster, 2, time.Now())
	const batch = 44
	fresh := datagram(17, netip.AddrPortFrom(r.inner.IPv4(2), port2), netip.AddrPortFrom(testWorld, 80), 1300)
	list := make([][]byte, batch)
	for i := range list {
		list[i] = make([]byte, wire.Overhead+len(fresh))
	}
	from := udp.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:1"), Local: testService.Addr()}
	b.ReportAllocs()
	b.SetBytes(int64(batch * len(fresh)))
	for b.Loop() {
		for _, p := range list {
			copy(p[wire.DataHeaderLen:], fresh)
		}
		g.Seal(list) // about half of what is measured
		r.in.now = time.Now()
		r.in.egress = r.in.egress[:0]
		r.in.group(&udp.Group{From: from, Packets: list})
		r.egress.Input(r.in.egress)
	}
	if st, _ := r.Tun(); st.PacketsOut != uint64(b.N*batch) {
		b.Fatalf("%d of %d packets went out: %v", st.PacketsOut, b.N*batch, st.Drops)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}

// BenchmarkSend is the road from the device to sealed datagrams.
func BenchmarkSend(b *testing.B) {
	r := newServerRig(b, withDevice(b), func(c *Config) { c.Conns = []udp.Conn{nowhere{}} })
	b.Cleanup(func() { r.egress.(*tunEgress).Services.stack.Close() })
	g := granted(b, r.cluster, 2, time.Now())
	(*news)(r.Server).Location(registry.Location{
		Client: 2, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: 1, Local: testService,
		Endpoint: netip.MustParseAddrPort("10.0.0.1:1"),
	})
	const batch = 44
	fresh := datagram(17, netip.AddrPortFrom(testWorld, 80), netip.AddrPortFrom(tunEgress4, port2), 1300)
	list := make([][]byte, batch)
	for i := range list {
		list[i] = room(len(fresh))
	}
	b.ReportAllocs()
	b.SetBytes(int64(batch * len(fresh)))
	for b.Loop() {
		for _, p := range list {
			copy(inside(p), fresh)
		}
		r.egress.(*tunEgress).fromDevice(list)
	}
	if st := r.Stats(); st.SentPackets != uint64(b.N*batch) {
		b.Fatalf("%d of %d packets were sent: %v", st.SentPackets, b.N*batch, st.Drops)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}

// withDevice gives a server the egress by a device that loses everything.
func withDevice(t testing.TB) func(*Config) {
	t.Helper()
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{tunEgress4, tunEgress42}, nil, netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) { c.Egress, c.Device, c.Plan = nil, discard{}, plan }
}

// The inward road allocates nothing per packet, and neither does the outward one.
func TestNoAllocationPerPacket(t *testing.T) {
	if egressRaced {
		t.Skip("the race detector allocates")
	}
	for name, f := range map[string]func(*testing.B){"receive": BenchmarkReceive, "send": BenchmarkSend, "tun out": BenchmarkTunOut} {
		if n := testing.Benchmark(f).AllocsPerOp(); n > 1 {
			t.Errorf("%s: %d allocations for a batch", name, n)
		}
	}
}
