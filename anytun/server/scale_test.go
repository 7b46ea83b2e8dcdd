package server

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// What a million clients cost one server; test/simnet/SCALE.md has figures.

// scaleClients is the number of clients of the benchmarks.
const scaleClients = 1_000_000

// nowhere is an outer socket that loses everything.
type nowhere struct{ closed chan struct{} }

func (n nowhere) ReadBatch() ([]udp.Group, error)       { <-n.closed; return nil, net.ErrClosed }
func (nowhere) WriteBatch([][]byte, udp.Endpoint) error { return nil }
func (nowhere) LocalAddr() netip.AddrPort               { return netip.MustParseAddrPort("203.0.113.1:4444") }
func (nowhere) Close() error                            { return nil }

// scaleServer is a server with so many clients enrolled, and the locations of
// all of them, as other servers tell. Every strideth has a session that exists;
// a real one costs a handshake.
func scaleServer(b *testing.B, clients, stride int) (*Server, []registry.Location) {
	b.Helper()
	if testing.Short() && clients >= scaleClients {
		b.Skip("to set up a million clients takes up to 14 seconds")
	}
	now := time.Now()
	cluster, err := session.NewCluster(now)
	if err != nil {
		b.Fatal(err)
	}
	list := make([]Enrolment, clients)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range list {
		list[i] = Enrolment{Name: fmt.Sprint("client", i+1), Number: uint32(i + 1)}
		for k := range list[i].Key {
			list[i].Key[k] = byte(random.Uint32())
		}
	}
	blocks := portblock.Blocks{}
	addresses := make([]netip.Addr, blocks.Addresses(uint32(clients)))
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})
	}
	plan, err := portblock.NewPlan(blocks, addresses, nil, netip.Prefix{})
	if err != nil {
		b.Fatal(err)
	}
	directory := NewDirectory(list)
	s, err := New(Config{
		Conns: []udp.Conn{nowhere{}}, Cluster: cluster, Clients: directory, Device: discard{}, Plan: plan,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.egress.(*tunEgress).Services.stack.Close() })
	locations := make([]registry.Location, clients)
	for i := range locations {
		n := uint32(i + 1)
		locations[i] = registry.Location{
			Client: n, Session: random.Uint64(), Epoch: byte(cluster.Epoch()), Counter: uint64(now.UnixNano()),
			Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 40000),
			Local:    netip.MustParseAddrPort("203.0.113.1:4444"), Server: 2,
		}
		if i%stride == 0 {
			locations[i].Session = granted(b, cluster, n, now).SessionID
		}
	}
	return s, locations
}

// granted is a new session of a client, its side.
func granted(b testing.TB, cluster *session.Cluster, client uint32, now time.Time) *session.Granted {
	b.Helper()
	key, err := session.NewPrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	i, err := session.NewInitiator(cluster.Public(), key, wire.Offer{Ciphers: 1 << wire.AES128GCM}, nil, now)
	if err != nil {
		b.Fatal(err)
	}
	m, err := wire.ParseInitiation(i.Message())
	if err != nil {
		b.Fatal(err)
	}
	a, err := cluster.Accept(m)
	if err != nil {
		b.Fatal(err)
	}
	answer, err := a.Respond(wire.Grant{Client: client, Server: 2, KeepAlive: 20, MTU: 1400, FirstPort: 1024, LastPort: 2047}, true, now)
	if err != nil {
		b.Fatal(err)
	}
	g, err := i.Finish(answer, now)
	if err != nil {
		b.Fatal(err)
	}
	return g
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkMillionLoad is what a server that starts does: it takes the
// whereabouts of a million clients from another one.
func BenchmarkMillionLoad(b *testing.B) {
	var bytes uint64
	var took time.Duration
	rounds := 0
	for b.Loop() {
		b.StopTimer()
		s, locations := scaleServer(b, scaleClients, scaleClients)
		before := heap()
		b.StartTimer()
		start := time.Now()
		for _, l := range locations {
			(*news)(s).Location(l)
		}
		took += time.Since(start)
		b.StopTimer()
		bytes += heap() - before
		runtime.KeepAlive(locations)
		rounds++
		if _, online := s.table.size(); online != scaleClients {
			b.Fatalf("%d clients are there", online)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(bytes)/float64(rounds)/scaleClients, "B/client")
	b.ReportMetric(float64(took.Nanoseconds())/float64(rounds)/scaleClients, "ns/client")
}

// BenchmarkMillionInward looks up random clients by public address and port, as
// for packets from outside: whose port, and where that client is.
func BenchmarkMillionInward(b *testing.B) {
	const busy = 10_000
	s, locations := scaleServer(b, scaleClients, scaleClients/busy)
	for _, l := range locations {
		(*news)(s).Location(l)
	}
	// Sessions of the few that traffic is for are derived once.
	type port struct {
		addr netip.Addr
		port uint16
	}
	ports := make([]port, busy)
	for i, n := range rand.New(rand.NewPCG(3, 4)).Perm(busy) {
		place, _ := s.cfg.Plan.Of(uint32(1 + n*(scaleClients/busy)))
		ports[i] = port{place.IPv4, place.First + 7}
	}
	before := heap()
	start := time.Now()
	for _, p := range ports { // the first packet to each
		client, _ := s.cfg.Plan.Inward(p.addr, p.port, &s.leases)
		if s.pathTo(client) == nil {
			b.Fatal("no path")
		}
	}
	perSession := float64(time.Since(start).Nanoseconds()) / busy
	bytes := float64(heap()-before) / busy
	i := 0
	for b.Loop() {
		p := &ports[i]
		if i++; i == busy {
			i = 0
		}
		client, ok := s.cfg.Plan.Inward(p.addr, p.port, &s.leases)
		if !ok || s.pathTo(client) == nil {
			b.Fatal("lost")
		}
	}
	b.ReportMetric(perSession, "ns/session")
	b.ReportMetric(bytes, "B/session")
	b.ReportMetric(1e9/(float64(b.Elapsed().Nanoseconds())/float64(b.N)), "lookups/s")
	runtime.KeepAlive(locations)
}

// BenchmarkMillionSweep is what is done every few seconds with a million clients, and
// how long new clients are kept waiting meanwhile, at worst.
func BenchmarkMillionSweep(b *testing.B) {
	s, locations := scaleServer(b, scaleClients, scaleClients)
	for _, l := range locations {
		(*news)(s).Location(l)
	}
	stop, ended := make(chan struct{}), make(chan time.Duration)
	go func() {
		var worst time.Duration
		for n := uint32(scaleClients + 1); ; n++ {
			start := time.Now()
			s.table.peer(n)
			worst = max(worst, time.Since(start))
			select {
			case <-stop:
				ended <- worst
				return
			default:
				time.Sleep(time.Millisecond)
			}
		}
	}()
	for b.Loop() {
		now := time.Now()
		s.sweep(now)
		s.gossip(now)
	}
	close(stop)
	b.ReportMetric(float64((<-ended).Microseconds())/1000, "ms-waited")
	runtime.KeepAlive(locations)
}

// BenchmarkMillionEnrolled is the memory and the time for the list of clients.
func BenchmarkMillionEnrolled(b *testing.B) {
	list := make([]Enrolment, scaleClients)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range list {
		list[i] = Enrolment{Name: fmt.Sprint("client", i+1), Number: uint32(i + 1)}
		for k := range list[i].Key {
			list[i].Key[k] = byte(random.Uint32())
		}
	}
	var bytes uint64
	rounds := 0
	for b.Loop() {
		b.StopTimer()
		before := heap()
		b.StartTimer()
		d := NewDirectory(list)
		b.StopTimer()
		bytes += heap() - before
		rounds++
		if !d.Enrolled(scaleClients) {
			b.Fatal("not enrolled")
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(bytes)/float64(rounds)/scaleClients, "B/client")
	runtime.KeepAlive(list)
}

// BenchmarkFirstPacket is what the first packet of a session that a server never heard
// of costs, but for opening it.
func BenchmarkFirstPacket(b *testing.B) {
	s, locations := scaleServer(b, 1000, 1)
	now := time.Now()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		h := wire.DataHeader{SessionID: locations[i].Session, Epoch: locations[i].Epoch}
		if i++; i == len(locations) {
			i = 0
		}
		if a, _, _ := s.sessionOf(h, now); a == nil {
			b.Fatal("not derived")
		}
	}
}
