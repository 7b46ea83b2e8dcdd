package client

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/test/simnet"
)

// The engine against stand-ins for servers: they do handshakes, answer
// keep-alives and requests for ports, and swallow packets.

var (
	anycast  = netip.MustParseAddr("203.0.113.1")
	service  = netip.AddrPortFrom(anycast, 4444)
	public   = [2]netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8::2")}
	hostAddr = netip.MustParseAddr("192.0.2.7")
)

const ms = time.Millisecond

type world struct {
	t       *testing.T
	net     *simnet.Network
	cluster *session.Cluster
	servers []*stub
	host    *simnet.Host
	user    *Client
	wg      sync.WaitGroup

	mu      sync.Mutex
	told    []string // what the On functions were told, in order
	gaps    []Gap
	ports   [][]PortRange
	session Session
	got     int
}

// stub is a server.
type stub struct {
	w      *world
	number uint16
	host   *simnet.Host
	conn   *simnet.Conn

	mu       sync.Mutex
	session  *session.Session // of the one client
	id       uint64
	from     udp.Endpoint
	requests int
	landlord *landlord
}

func newWorld(t *testing.T, servers int, link simnet.Link) *world {
	simnet.NoLeaks(t)
	w := &world{t: t, net: simnet.New(1)}
	var err error
	if w.cluster, err = session.NewCluster(time.Now()); err != nil {
		t.Fatal(err)
	}
	lord := &landlord{most: 1}
	for i := range servers {
		s := &stub{w: w, number: uint16(i + 1), landlord: lord}
		s.host = w.net.Host(fmt.Sprint("server ", i+1), netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 1)}))
		w.net.Announce(anycast, s.host)
		if s.conn, err = s.host.Listen(service); err != nil {
			t.Fatal(err)
		}
		w.servers = append(w.servers, s)
		w.wg.Go(s.loop)
	}
	w.host = w.net.Host("client", hostAddr)
	w.host.SetLinks(link, link)
	w.net.SetRoute(w.host, anycast, w.servers[0].host)
	key, err := session.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := w.host.Listen(netip.AddrPortFrom(hostAddr, 0))
	if err != nil {
		t.Fatal(err)
	}
	w.user, err = New(Config{
		Conn: conn, Servers: []netip.AddrPort{service}, ServerKey: w.cluster.Public(), Key: key,
		Input:     func(pkts [][]byte) { w.mu.Lock(); w.got += len(pkts); w.mu.Unlock() },
		OnSession: func(s Session) { w.mu.Lock(); w.session = s; w.mu.Unlock() },
		OnSuspect: func(yes bool) { w.tell(fmt.Sprint("suspect ", yes)) },
		OnGap: func(g Gap) {
			w.tell("gap")
			w.mu.Lock()
			w.gaps = append(w.gaps, g)
			w.mu.Unlock()
		},
		OnPorts: func(p []PortRange) { w.mu.Lock(); w.ports = append(w.ports, p); w.mu.Unlock() },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w.wg.Go(func() {
		if err := w.user.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		w.net.Close()
		w.wg.Wait()
	})
	time.Sleep(time.Second)
	if !w.user.Status().Connected {
		t.Fatal("no session")
	}
	return w
}

func (w *world) tell(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, what)
}

func (s *stub) loop() {
	for {
		groups, err := s.conn.ReadBatch()
		if err != nil {
			return
		}
		for _, g := range groups {
			for _, b := range g.Packets {
				if err := s.take(b, g.From); err != nil {
					s.w.t.Errorf("server %d: %v", s.number, err)
				}
			}
		}
	}
}

func (s *stub) take(b []byte, from udp.Endpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from = from
	if wire.TypeOf(b) == wire.TypeInitiation {
		m, err := wire.ParseInitiation(b)
		if err != nil {
			return err
		}
		a, err := s.w.cluster.Accept(m)
		if err != nil {
			return err
		}
		r, err := a.Respond(wire.Grant{
			Client: 7, Server: s.number, KeepAlive: 20, MTU: 1400, FirstPort: 1024, LastPort: 2047, PublicPort: true,
			Public4: public[0].As4(), Public6: public[1].As16(),
		}, false, time.Now())
		if err != nil {
			return err
		}
		return s.conn.WriteBatch([][]byte{r}, from)
	}
	h, err := wire.ParseData(b)
	if err != nil {
		return err
	}
	if s.session == nil || s.id != h.SessionID {
		if s.session, err = s.w.cluster.Session(h, s.number, time.Now()); err != nil {
			return err
		}
		s.id = h.SessionID
	}
	p, err := s.session.Open(b, h)
	if err != nil || !wire.IsControl(p) {
		return err
	}
	if wire.Control(p[0]) == wire.ControlKeepAlive {
		m, err := wire.ParseKeepAlive(p)
		if err != nil {
			return err
		}
		s.sendLocked(wire.AppendAlive(nil, wire.Alive{Server: s.number, Token: m.Token, Observed: from.Addr}))
	}
	if wire.Control(p[0]) == wire.ControlPortsRequest {
		m, err := wire.ParsePortsRequest(p)
		if err != nil {
			return err
		}
		s.requests++
		if a, ok := s.landlord.take(m); ok {
			s.sendLocked(wire.AppendPorts(nil, a))
		}
	}
	return nil
}

func (s *stub) sendLocked(plain []byte) {
	b := message(plain)
	s.session.Seal([][]byte{b})
	if err := s.conn.WriteBatch([][]byte{b}, s.from); err != nil {
		s.w.t.Error(err)
	}
}

func message(plain []byte) []byte {
	b := make([]byte, wire.Overhead+len(plain))
	copy(b[wire.DataHeaderLen:], plain)
	return b
}

// push sends packets to the client, a millisecond apart.
func (s *stub) push(n int) {
	for range n {
		s.mu.Lock()
		if s.session != nil {
			s.sendLocked(append([]byte{0x45}, make([]byte, 39)...))
		}
		s.mu.Unlock()
		time.Sleep(ms)
	}
}

func (w *world) send(n int) {
	for range n {
		w.user.Output([][]byte{message(append([]byte{0x45}, make([]byte, 39)...))})
	}
}

func (w *world) expect(told ...string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.told, told) {
		w.t.Fatalf("told %q, want %q", w.told, told)
	}
	w.told = nil
}

var delay = simnet.Link{Delay: 10 * ms}

// A server dies during a download, and the route moves on 400 ms later.
func TestGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, delay)
		w.servers[0].push(200)
		w.expect()
		w.servers[0].host.Kill()
		killed := time.Now()
		time.Sleep(150 * ms)
		w.expect("suspect true")
		if !w.user.Status().Suspect {
			t.Error("the status doesn't show it")
		}
		time.Sleep(250 * ms)
		w.expect()
		w.net.SetRoute(w.host, anycast, w.servers[1].host)
		time.Sleep(noticed)
		w.expect("gap", "suspect false")
		st := w.user.Status() // expect has waited for everything else
		if st.Gaps != 1 || st.LastGap != w.gaps[0] || st.LongestGap != w.gaps[0].Length || st.Suspect || st.Session.Server != 2 ||
			st.ServerChanges != 1 || time.Since(st.LastGapEnd) > noticed {
			t.Errorf("status %+v", st)
		}
		if g := w.gaps[0]; g.Before != 1 || g.After != 2 || g.Length < 400*ms || g.Length > 550*ms {
			t.Errorf("%v after the death: gap %+v", time.Since(killed), g)
		}
		if s := w.user.Stats(); s.Gaps != 1 || s.GapTime != w.gaps[0].Length || s.Probes < 3 || s.Probes > 6 || s.KeepAlives <= s.Probes {
			t.Errorf("stats %+v", s)
		}
	})
}

// noticed is the longest that a path that works again goes
// unnoticed.
const noticed = session.MinProbe + 21*ms

// What is sent after an idle time shows a gap too.
func TestGapAfterIdleTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, delay)
		time.Sleep(5 * time.Second)
		w.servers[0].host.Kill()
		time.Sleep(5 * time.Second)
		w.expect() // nobody waits for anything
		w.send(1)
		time.Sleep(session.MinProbe + ms)
		w.expect("suspect true")
		time.Sleep(300 * ms)
		w.net.SetRoute(w.host, anycast, w.servers[1].host)
		time.Sleep(noticed)
		w.expect("gap", "suspect false")
		if g := w.gaps[0]; g.Length < 400*ms || g.Length > 600*ms {
			t.Errorf("gap %+v", g)
		}
	})
}

// Pauses with an answer are no gaps, and cost a question.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, delay)
		for range 5 {
			w.servers[0].push(100)
			time.Sleep(3 * time.Second)
			w.expect("suspect true", "suspect false", "suspect true", "suspect false") // a probe and a follow-up
		}
		if s := w.user.Stats(); s.Gaps != 0 || s.Probes != 10 {
			t.Errorf("stats %+v", s)
		}
		// A whole day of nothing, but for the last follow-ups.
		time.Sleep(time.Minute)
		w.mu.Lock()
		w.told = nil
		w.mu.Unlock()
		before := w.user.Stats()
		time.Sleep(24 * time.Hour)
		after := w.user.Stats()
		if n := after.KeepAlives - before.KeepAlives; after.Probes != before.Probes || n > 24*3600/20+60 {
			t.Errorf("%d probes and %d keep-alives in an idle day", after.Probes-before.Probes, n)
		}
		w.expect()
	})
}

// The route moves within less than it takes to ask. What was under way is lost
// all the same; and so when it is the client that moved.
func TestMoved(t *testing.T) {
	for name, move := range map[string]func(*world, *simnet.NAT){
		"route":  func(w *world, _ *simnet.NAT) { w.net.SetRoute(w.host, anycast, w.servers[1].host) },
		"client": func(_ *world, nat *simnet.NAT) { nat.Rebind(netip.MustParseAddr("192.0.2.201")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 2, delay)
				nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 0)
				w.host.Behind(nat)
				w.send(1)
				time.Sleep(time.Second)
				for range steadyAfter + 1 { // each pause is asked about
					time.Sleep(time.Second)
					w.servers[0].push(200)
					w.expect("suspect true", "suspect false")
				}
				time.Sleep(10 * ms) // nothing is under way
				move(w, nat)
				time.Sleep(noticed)
				w.expect("suspect true", "gap", "suspect false")
			})
		})
	}
}

// Every packet by another server: no gap, nothing said.
func TestSpraying(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, delay)
		w.net.SetRoute(w.host, anycast, nil)
		w.net.Spray(anycast, true)
		w.send(100) // so that all servers know the session
		for range 20 {
			w.wg.Go(func() { w.servers[0].push(150) })
			w.wg.Go(func() { w.servers[1].push(150) })
			w.servers[2].push(150)
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if len(w.gaps) != 0 || w.user.Status().Gaps != 0 {
			t.Errorf("gaps %+v", w.gaps)
		}
		st := w.user.Stats()
		if st.ServerChanges < 1000 || st.Probes > 25 {
			t.Errorf("%d changes of server, %d probes", st.ServerChanges, st.Probes)
		}
	})
}

func TestPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, delay)
		if w.session.Public != public || !w.session.PublicPort {
			t.Errorf("session %+v", w.session)
		}
		for range 1000 {
			w.user.RequestPorts()
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		want := []PortRange{{First: 10_000, Last: 10_999}}
		if len(w.ports) != 1 || !slices.Equal(w.ports[0], want) || !slices.Equal(w.user.Status().Ports, want) {
			t.Errorf("ports %v, status %v", w.ports, w.user.Status().Ports)
		}
		w.user.RequestPorts() // there is one only
		time.Sleep(time.Hour - 20*time.Second)
		synctest.Wait()
		s := w.servers[0]
		s.mu.Lock()
		if s.requests != 4 || len(w.ports) != 1 {
			t.Errorf("%d requests, ports %v", s.requests, w.ports)
		}
		s.mu.Unlock()
		if st := w.user.Stats(); st.PortRequests != 4 || st.PortRefusals != 1 {
			t.Errorf("stats %+v", st)
		}
		s.mu.Lock()
		s.landlord.silent = true
		s.mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(w.ports) != 2 || len(w.ports[1]) != 0 || len(w.user.Status().Ports) != 0 {
			t.Errorf("after the lease: ports %v", w.ports)
		}
	})
}

// Receiving and sending allocate nothing per batch.
func BenchmarkReceive(b *testing.B) {
	now := time.Now()
	c := &Client{began: now, wake: make(chan struct{}, 1)}
	c.answering.Store(1)
	b.ReportAllocs()
	for b.Loop() {
		c.changed(1)
		c.heard(1, true)
	}
}
