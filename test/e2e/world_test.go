// Package e2e tests the two engines against each other over simnet: no real
// socket, no netstack, no real clock.
package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/test/simnet"
)

var (
	anycast      = netip.MustParseAddr("203.0.113.1")
	service      = netip.AddrPortFrom(anycast, 4444)
	strangerAddr = netip.MustParseAddr("192.0.2.66")
	far          = netip.MustParseAddr("198.51.100.1") // somebody on the Internet
)

// world is a cluster, its clients, and the network between them.
type world struct {
	t       *testing.T
	net     *simnet.Network
	cluster *session.Cluster
	clients *enrolled
	hub     *registry.Hub
	servers []*node
	inner   session.Inner
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// node is one server.
type node struct {
	*server.Server
	host     *simnet.Host
	registry registry.Registry
	echo     *echo
	rotated  int
}

// enrolled is the list of clients.
type enrolled struct {
	mu   sync.Mutex
	keys map[session.PublicKey]uint32
}

func (e *enrolled) Lookup(k session.PublicKey) (uint32, string, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, ok := e.keys[k]
	return n, fmt.Sprint("client ", n), ok
}

func (e *enrolled) Enrolled(n uint32) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range e.keys {
		if m == n {
			return true
		}
	}
	return false
}

func (*enrolled) AnyPort(uint32) bool { return false }

func (e *enrolled) Highest() (n uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range e.keys {
		n = max(n, m)
	}
	return n
}

func (e *enrolled) remove(k session.PublicKey) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.keys, k)
}

// echo is an egress that sends every packet back with its addresses exchanged.
type echo struct {
	output func([][]byte)
	mu     sync.Mutex
	got    int
}

func (e *echo) Input(pkts [][]byte) {
	var bufs [][]byte
	for _, p := range pkts {
		b := make([]byte, wire.Overhead+len(p))
		q := b[wire.DataHeaderLen : len(b)-wire.TagLen]
		copy(q, p)
		copy(q[12:16], p[16:20])
		copy(q[16:20], p[12:16])
		bufs = append(bufs, b)
	}
	e.mu.Lock()
	e.got += len(pkts)
	e.mu.Unlock()
	e.output(bufs)
}

func (e *echo) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.got
}

func (*echo) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (*echo) Drain()                        {}

// newWorld starts a cluster of n servers behind the anycast address. It must be
// called in a bubble, whose end fails if a goroutine is left.
func newWorld(t *testing.T, n int) *world {
	t.Helper()
	w := &world{t: t, net: simnet.New(1), clients: &enrolled{keys: map[session.PublicKey]uint32{}}, hub: registry.NewHub()}
	w.ctx, w.stop = context.WithCancel(t.Context())
	c, err := session.NewCluster(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	w.cluster = c
	w.inner = session.NewInner(c.Public())
	for i := range n {
		own := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		s := &node{host: w.net.Host(fmt.Sprint("server ", i+1), own)}
		w.net.Announce(anycast, s.host)
		w.start(s, uint16(i+1))
		w.servers = append(w.servers, s)
	}
	t.Cleanup(w.end)
	return w
}

// name is a server's name in the registry.
func name(number uint16) string { return fmt.Sprint("server ", number) }

// start runs a server on its host: a new process with nothing but the key file.
func (w *world) start(s *node, number uint16) {
	w.t.Helper()
	key, err := session.ParseCluster(w.cluster.Marshal(), time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	conn, err := s.host.Listen(service)
	if err != nil {
		w.t.Fatal(err)
	}
	s.echo = &echo{}
	s.registry = w.hub.Join(name(number))
	s.Server, err = server.New(server.Config{
		Conns: []udp.Conn{conn}, Cluster: key, Clients: w.clients, Number: number, Registry: s.registry,
		Egress: func(output func([][]byte)) (server.Egress, error) {
			s.echo.output = output
			return s.echo, nil
		},
		Rotated: func() { s.rotated++ },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.run(s.Server.Run)
}

func (w *world) run(f func(context.Context) error) {
	w.wg.Go(func() {
		if err := f(w.ctx); err != nil {
			w.t.Errorf("engine: %v", err)
		}
	})
}

func (w *world) end() {
	w.stop()
	w.wg.Wait()
	w.net.Close()
}

// user is one client and what came back to it.
type user struct {
	*client.Client
	world  *world
	number uint32
	key    session.PrivateKey
	host   *simnet.Host

	mu       sync.Mutex
	got      map[uint64]int // times that each numbered packet came back
	order    []uint64
	sessions []client.Session
}

// enrol adds a client to the cluster's list.
func (w *world) enrol(number uint32) session.PrivateKey {
	w.t.Helper()
	key, err := session.NewPrivateKey()
	if err != nil {
		w.t.Fatal(err)
	}
	w.clients.mu.Lock()
	w.clients.keys[key.Public()] = number
	w.clients.mu.Unlock()
	return key
}

// client starts an enrolled client at an address of its own, after before has
// set up its host.
func (w *world) client(number uint32, before ...func(*simnet.Host)) *user {
	w.t.Helper()
	addr := netip.AddrFrom4([4]byte{10, 0, byte(number >> 8), byte(number)})
	u := &user{world: w, number: number, key: w.enrol(number), got: map[uint64]int{}, host: w.net.Host(fmt.Sprint("client ", number), addr)}
	for _, f := range before {
		f(u.host)
	}
	w.startClient(u)
	return u
}

func (w *world) startClient(u *user) {
	w.t.Helper()
	conn, err := u.host.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	if err != nil {
		w.t.Fatal(err)
	}
	u.Client, err = client.New(client.Config{
		Conn: conn, Servers: []netip.AddrPort{service}, ServerKey: w.cluster.Public(), Key: u.key,
		Input: u.input, OnSession: func(s client.Session) {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.sessions = append(u.sessions, s)
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.run(u.Client.Run)
}

func (u *user) input(pkts [][]byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, p := range pkts {
		if len(p) < 28 {
			u.world.t.Errorf("a packet of %d bytes came in", len(p))
			continue
		}
		n := binary.BigEndian.Uint64(p[20:])
		u.got[n]++
		u.order = append(u.order, n)
	}
}

// packet makes a numbered inner packet with the engine's room around it.
func packet(src, dst netip.Addr, n uint64) []byte {
	const size = 28 + 100
	b := make([]byte, wire.Overhead+size)
	p := b[wire.DataHeaderLen : wire.DataHeaderLen+size]
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], size)
	p[8], p[9] = 64, 253 // RFC 3692: for experiments
	s, d := src.As4(), dst.As4()
	copy(p[12:], s[:])
	copy(p[16:], d[:])
	binary.BigEndian.PutUint64(p[20:], n)
	return b
}

// send sends packets numbered from first to last, one by one.
func (u *user) send(first, last uint64) {
	for n := first; n <= last; n++ {
		u.Output([][]byte{packet(u.world.inner.IPv4(u.number), far, n)})
	}
}

// came counts the packets from first to last that came back, and those that
// came more than once.
func (u *user) came(first, last uint64) (once, more int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for n := first; n <= last; n++ {
		switch c := u.got[n]; {
		case c == 1:
			once++
		case c > 1:
			more++
		}
	}
	return once, more
}

// expect fails unless every packet from first to last came back exactly once.
func (u *user) expect(first, last uint64) {
	u.world.t.Helper()
	once, more := u.came(first, last)
	if want := int(last - first + 1); once != want || more != 0 {
		u.world.t.Fatalf("of packets %d to %d, %d came back once and %d more often; want %d and 0", first, last, once, more, want)
	}
}

// sum adds up a counter of all servers.
func (w *world) sum(f func(server.Stats) uint64) (n uint64) {
	for _, s := range w.servers {
		n += f(s.Stats())
	}
	return n
}

func drops(reason server.Drop) func(server.Stats) uint64 {
	return func(s server.Stats) uint64 { return s.Drops[reason.String()] }
}

// stranger is a host that belongs to nobody, at 192.0.2.66, and its socket.
func (w *world) stranger() (*simnet.Host, *simnet.Conn) {
	w.t.Helper()
	h := w.net.Host("stranger", strangerAddr)
	c, err := h.Listen(netip.AddrPortFrom(strangerAddr, 6666))
	if err != nil {
		w.t.Fatal(err)
	}
	return h, c
}
