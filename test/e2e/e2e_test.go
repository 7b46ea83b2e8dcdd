package e2e

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/test/simnet"
)

// settle lets everything happen that needs no more time than a round trip, but
// not the client's questions about a silence (session.MinProbe).
func settle() {
	time.Sleep(session.MinProbe * 9 / 10)
	synctest.Wait()
}

func TestSessionAndEcho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		settle()
		st := u.Status()
		if !st.Connected || st.Session.Number != 7 || st.Session.Server != 1 || st.Endpoint != service {
			t.Fatalf("status %+v", st)
		}
		if a := st.Session.Addresses; a[0] != w.inner.IPv4(7) || a[1] != w.inner.IPv6(7) {
			t.Errorf("inner addresses %v", a)
		}
		if g := st.Session.Gateways; g[0] != w.inner.IPv4(0) || g[1] != w.inner.IPv6(0) {
			t.Errorf("gateways %v", g)
		}
		if st.Observed.Addr() != netip.MustParseAddr("10.0.0.7") {
			t.Errorf("observed at %v", st.Observed)
		}
		u.send(1, 100)
		settle()
		u.expect(1, 100)
		if len(u.sessions) != 1 {
			t.Errorf("OnSession called %d times", len(u.sessions))
		}
		// An idle hour passes with one handshake more at the most.
		time.Sleep(50 * time.Minute)
		if st := u.Status(); !st.Connected || st.Handshakes != 1 {
			t.Errorf("after 50 minutes: %+v", st)
		}
		u.send(101, 110)
		settle()
		u.expect(101, 110)
	})
}

// Every packet may take another server: one handshake, nothing lost, nothing
// doubled, and each server derives the session by itself.
func TestSpraying(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		w.net.Spray(anycast, true)
		u := w.client(7)
		settle()
		for n := uint64(1); n <= 3000; n += 10 {
			u.send(n, n+9)
			time.Sleep(time.Millisecond)
		}
		settle()
		u.expect(1, 3000)
		for i, s := range w.servers {
			if n := s.echo.count(); n < 800 {
				t.Errorf("server %d had only %d packets", i+1, n)
			}
		}
		if n := w.sum(func(s server.Stats) uint64 { return s.Handshakes }); n != 1 {
			t.Errorf("%d handshakes", n)
		}
		if n := w.sum(func(s server.Stats) uint64 { return s.Derived }); n != 3 {
			t.Errorf("%d sessions derived", n)
		}
		if u.Status().ServerChanges < 100 {
			t.Errorf("only %d changes of server noticed", u.Status().ServerChanges)
		}
	})
}

// A server dies; when the route flips, the session goes on at another one that
// never saw its handshake.
func TestServerDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, func(h *simnet.Host) { w.net.SetRoute(h, anycast, w.servers[0].host) })
		settle()
		u.send(1, 50)
		settle()
		u.expect(1, 50)
		w.servers[0].host.Kill()
		u.send(51, 60)
		settle()
		if once, _ := u.came(51, 60); once != 0 {
			t.Fatal("the dead server answered")
		}
		w.net.SetRoute(u.host, anycast, w.servers[1].host)
		u.send(61, 100)
		settle()
		u.expect(61, 100)
		st := u.Status()
		if st.Handshakes != 1 || st.Session.Server != 2 {
			t.Errorf("%d handshakes, server %d", st.Handshakes, st.Session.Server)
		}
	})
}

// A server process that starts anew with the same key file goes on with the
// sessions there are.
func TestServerRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		settle()
		u.send(1, 10)
		settle()
		// The old process's socket is taken over by a host that starts afresh.
		old := w.servers[0]
		old.host.Kill()
		fresh := &node{host: w.net.Host("server 1 again", netip.MustParseAddr("192.0.2.99"))}
		w.net.Announce(anycast, fresh.host)
		w.start(fresh, 1)
		w.net.SetRoute(u.host, anycast, fresh.host)
		u.send(11, 20)
		settle()
		u.expect(1, 20)
		if n := u.Status().Handshakes; n != 1 {
			t.Errorf("%d handshakes", n)
		}
	})
}

// All servers are gone for a while: noticed within two intervals, tried again
// until one answers.
func TestDeadPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		settle()
		w.servers[0].host.Kill()
		time.Sleep(2*session.DefaultKeepAlive + time.Second)
		if st := u.Stats(); st.DeadPaths != 1 || st.Initiations < 2 {
			t.Fatalf("after two intervals: %d dead paths, %d initiations", st.DeadPaths, st.Initiations)
		}
		if u.Status().Connected {
			t.Error("counts as connected")
		}
		time.Sleep(10 * time.Minute)
		w.servers[0].host.Revive()
		time.Sleep(20 * time.Second)
		u.send(1, 10)
		settle()
		u.expect(1, 10)
		if st := u.Status(); !st.Connected {
			t.Errorf("not connected again: %+v", st)
		}
	})
}

// Handshakes and data over a link that loses, repeats, reorders and damages.
func TestBadLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		w.net.Spray(anycast, true)
		bad := simnet.Link{Delay: 20 * time.Millisecond, Jitter: 30 * time.Millisecond, Loss: 0.3, Duplicate: 0.2, Corrupt: 0.1, Reorder: 0.2}
		u := w.client(7, func(h *simnet.Host) { h.SetLinks(bad, bad) })
		time.Sleep(2 * time.Minute)
		if !u.Status().Connected {
			t.Fatalf("no session over a bad link: %+v, %+v", u.Status(), u.Stats())
		}
		u.send(1, 2000)
		time.Sleep(5 * time.Second)
		once, more := u.came(1, 2000)
		// 0.7 * 0.9 each way arrives; a duplicate may come through once more where
		// it reaches the other server (PROTOCOL.md 5.4).
		if once+more < 600 {
			t.Errorf("%d of 2000 came back", once+more)
		}
		if w.sum(drops(server.DropReplay)) == 0 || w.sum(drops(server.DropForged)) == 0 {
			t.Errorf("%d replays and %d forgeries dropped: the link wasn't bad",
				w.sum(drops(server.DropReplay)), w.sum(drops(server.DropForged)))
		}
		u.mu.Lock()
		defer u.mu.Unlock()
		for n, c := range u.got {
			if c > 2 {
				t.Errorf("packet %d came back %d times from two servers", n, c)
			}
			if n < 1 || n > 2000 {
				t.Errorf("packet %d was never sent", n)
			}
		}
	})
}

// One server never lets a packet through twice.
func TestDuplicatesAtOneServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		settle()
		twice := simnet.Link{Delay: time.Millisecond, Jitter: 20 * time.Millisecond, Duplicate: 1}
		u.host.SetLinks(twice, twice)
		u.send(1, 1000)
		settle()
		u.expect(1, 1000)
		if n := w.sum(drops(server.DropReplay)); n < 1000 {
			t.Errorf("%d replays dropped", n)
		}
		if n := u.Stats().Drops[client.DropReplay.String()]; n < 1000 {
			t.Errorf("%d replays dropped at the client", n)
		}
	})
}

// The client's outer address changes: answers follow the next packet.
func TestRoaming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 30*time.Second)
		u := w.client(7, func(h *simnet.Host) { h.Behind(nat) })
		settle()
		for i, outer := range []string{"", "192.0.2.201", "192.0.2.202"} {
			first := uint64(i)*100 + 1
			if outer != "" {
				nat.Rebind(netip.MustParseAddr(outer))
			}
			u.send(first, first+99)
			settle()
			u.expect(first, first+99)
		}
		if n := w.sum(func(s server.Stats) uint64 { return s.Roamed }); n < 2 {
			t.Errorf("%d changes of endpoint noticed", n)
		}
		time.Sleep(session.DefaultKeepAlive * 2)
		if a := u.Status().Observed.Addr(); a != netip.MustParseAddr("192.0.2.202") {
			t.Errorf("observed at %v", a)
		}
		// The translator forgets after 30 s; keep-alives hold it open for an hour.
		nat.Rebind(netip.Addr{})
		time.Sleep(40 * time.Minute)
		if n := u.Stats().DeadPaths; n != 0 {
			t.Errorf("%d dead paths behind a translator", n)
		}
	})
}

// A client that only receives notices within two round trips or 200 ms that its
// address has changed, long before the next keep-alive.
func TestRoamingWhileReceiving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 0)
		u := w.client(7, func(h *simnet.Host) { h.Behind(nat) })
		settle()
		push := func(first, last uint64) { // a packet every 10 ms
			for n := first; n <= last; n++ {
				w.servers[0].echo.output([][]byte{packet(far, w.inner.IPv4(7), n)})
				time.Sleep(10 * time.Millisecond)
			}
		}
		push(1, 100)
		nat.Rebind(netip.MustParseAddr("192.0.2.201"))
		push(101, 300)
		settle()
		u.expect(1, 100)
		u.expect(120, 300) // all but the first 200 ms
		if once, _ := u.came(101, 105); once != 0 {
			t.Fatal("the translator still knew the client")
		}
	})
}

// tap records datagrams.
type tap struct {
	mu   sync.Mutex
	seen []simnet.Event
}

func (p *tap) trace(e simnet.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.Kind == simnet.Sent {
		p.seen = append(p.seen, e)
	}
}

func (p *tap) events() []simnet.Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]simnet.Event(nil), p.seen...)
}

// A packet that somebody recorded and sends again from elsewhere is dropped and
// moves nobody.
func TestReplayMovesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		var wiretap tap
		w.net.SetTrace(wiretap.trace) // before the client sends anything
		u := w.client(7, func(h *simnet.Host) { w.net.SetRoute(h, anycast, w.servers[0].host) })
		settle()
		u.send(1, 20)
		settle()
		thief, conn := w.stranger()
		w.net.SetRoute(thief, anycast, w.servers[0].host)
		events := wiretap.events()
		before := w.servers[0].Stats()
		var replayed int
		for _, e := range events {
			if e.To == service {
				if err := conn.WriteBatch([][]byte{e.Payload}, udp.Endpoint{Addr: service}); err != nil {
					t.Fatal(err)
				}
				replayed++
			}
		}
		if replayed < 20 {
			t.Fatalf("only %d datagrams to replay", replayed)
		}
		settle()
		u.send(21, 40)
		settle()
		u.expect(1, 40)
		after := w.servers[0].Stats()
		if got := after.Drops[server.DropReplay.String()] - before.Drops[server.DropReplay.String()]; got != uint64(replayed-1) {
			t.Errorf("%d replays dropped, want %d", got, replayed-1)
		}
		if n := after.Drops[server.DropHandshakeOld.String()]; n != 1 {
			t.Errorf("%d replayed initiations dropped, want 1", n)
		}
		if after.Roamed != 0 {
			t.Error("the client was moved")
		}
		for _, e := range wiretap.events() {
			if e.To.Addr() == strangerAddr {
				t.Errorf("the thief got %v", e)
			}
		}
	})
}

// A packet that was held up somewhere and arrives late from another address is
// taken, but moves nobody: newer ones have told where the client is.
func TestLatePacketMovesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		settle()
		var wiretap tap
		w.net.SetTrace(wiretap.trace)
		u.host.SetLinks(simnet.Link{Loss: 1}, simnet.Link{})
		u.send(1, 1)
		settle()
		held := wiretap.events()
		if once, _ := u.came(1, 1); once != 0 || len(held) != 1 {
			t.Fatalf("%d datagrams held up, %d came through", len(held), once)
		}
		u.host.SetLinks(simnet.Link{}, simnet.Link{})
		u.send(2, 10)
		settle()
		_, conn := w.stranger()
		if err := conn.WriteBatch([][]byte{held[0].Payload}, udp.Endpoint{Addr: service}); err != nil {
			t.Fatal(err)
		}
		settle()
		u.expect(1, 10) // the late one too, answered to where the client is
		if n := w.sum(func(s server.Stats) uint64 { return s.Roamed }); n != 0 {
			t.Error("the client was moved")
		}
		u.send(11, 20)
		settle()
		u.expect(1, 20)
	})
}

// Garbage, truncations, forgeries and strangers cost nothing that lasts and are
// counted by reason; none gets an answer.
func TestGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		var wiretap tap
		w.net.SetTrace(wiretap.trace)
		u := w.client(7)
		settle()
		u.send(1, 5)
		settle()
		_, conn := w.stranger()
		send := func(b []byte) {
			if err := conn.WriteBatch([][]byte{bytes.Clone(b)}, udp.Endpoint{Addr: service}); err != nil {
				t.Fatal(err)
			}
			settle()
		}
		count := func(d server.Drop) uint64 { return w.sum(drops(d)) }
		check := func(name string, d server.Drop, b []byte) {
			t.Helper()
			before := count(d)
			send(b)
			if got := count(d) - before; got != 1 {
				t.Errorf("%s: %v counted %d times", name, d, got)
			}
		}
		var data, init []byte
		for _, e := range wiretap.events() {
			if e.To == service && wire.TypeOf(e.Payload) == wire.TypeData {
				data = e.Payload
			} else if e.To == service && wire.TypeOf(e.Payload) == wire.TypeInitiation {
				init = e.Payload
			}
		}
		sessions := w.servers[0].Stats().Sessions
		check("empty", server.DropMalformed, []byte{})
		check("unknown type", server.DropMalformed, []byte{9, 9, 9, 9})
		check("truncated data", server.DropMalformed, data[:30])
		check("truncated initiation", server.DropMalformed, init[:300])
		check("replay", server.DropReplay, data)
		forged := bytes.Clone(data)
		binary.BigEndian.PutUint64(forged[12:], binary.BigEndian.Uint64(data[12:])+1000)
		check("forged counter", server.DropForged, forged)
		forged[2] = 1
		check("a server's sender number", server.DropForged, forged)
		forged = bytes.Clone(data)
		forged[1] += 100
		check("foreign epoch", server.DropEpoch, forged)
		forged = bytes.Clone(data)
		forged[4] ^= 1
		check("foreign session", server.DropUnknownClient, forged)
		forged = bytes.Clone(init)
		forged[50] ^= 1
		check("stranger", server.DropMAC, forged)
		check("old initiation", server.DropHandshakeOld, init)
		// Somebody who knows the cluster's key, but isn't enrolled.
		key, err := session.NewPrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		i, err := session.NewInitiator(w.cluster.Public(), key, wire.Offer{Ciphers: 1}, nil, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		check("not enrolled", server.DropUnknownKey, i.Message())
		if n := w.servers[0].Stats().Sessions; n != sessions {
			t.Errorf("%d sessions, %d before", n, sessions)
		}
		for _, e := range wiretap.events() {
			if e.To.Addr() == strangerAddr {
				t.Errorf("somebody was answered: %v", e)
			}
		}
		u.send(6, 10)
		settle()
		u.expect(1, 10)
	})
}

// A flood of initiations from addresses that can't receive makes the server ask
// for cookies; a client gets in all the same.
func TestCookieUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		_, conn := w.stranger()
		key := w.enrol(99)
		var flood [][]byte
		for range 1500 {
			i, err := session.NewInitiator(w.cluster.Public(), key, wire.Offer{Ciphers: 1}, nil, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			flood = append(flood, i.Message())
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				for range 2 {
					_ = conn.WriteBatch([][]byte{bytes.Clone(flood[n%len(flood)])}, udp.Endpoint{Addr: service})
				}
			}
		})
		time.Sleep(time.Second)
		if w.servers[0].Stats().Cookies == 0 {
			t.Fatal("no cookie asked for under load")
		}
		u := w.client(7)
		time.Sleep(3 * time.Second)
		if !u.Status().Connected {
			t.Errorf("no session under load: %+v; server %+v", u.Stats(), w.servers[0].Stats())
		}
		close(stop)
		wg.Wait()
		if n := w.servers[0].Stats().Handshakes; n > 1000 {
			t.Errorf("%d handshakes answered within four seconds", n)
		}
	})
}

// Sessions are replaced every hour and epochs every day while packets flow:
// nothing is lost, no id comes twice, secrets are erased.
func TestRekeyAndEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		w.net.Spray(anycast, true)
		u := w.client(7)
		ids := map[uint64]bool{}
		var mu sync.Mutex
		w.net.SetTrace(func(e simnet.Event) {
			if h, err := wire.ParseData(e.Payload); err == nil {
				mu.Lock()
				ids[h.SessionID] = true
				mu.Unlock()
			}
		})
		settle()
		const hours = 75
		for n := range uint64(hours * 12) {
			u.send(n, n)
			time.Sleep(5 * time.Minute)
		}
		settle()
		u.expect(0, hours*12-1)
		st := u.Status()
		if st.Handshakes < hours || st.Handshakes > hours*12/10 {
			t.Errorf("%d handshakes in %d hours", st.Handshakes, hours)
		}
		if len(ids) != int(st.Handshakes) {
			t.Errorf("%d session ids for %d handshakes", len(ids), st.Handshakes)
		}
		if u.Stats().DeadPaths != 0 {
			t.Error("dead paths")
		}
		for i, s := range w.servers {
			if s.rotated < 1 {
				t.Errorf("server %d erased no secret", i+1)
			}
			if n := s.Stats().Sessions; n > 3 {
				t.Errorf("server %d holds %d sessions", i+1, n)
			}
		}
	})
}

// An observer of the wire finds nothing that two sessions have in common, and
// no inner byte.
func TestWireShowsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u := w.client(7)
		var wiretap tap
		w.net.SetTrace(wiretap.trace)
		settle()
		u.send(1, 50)
		settle()
		inner := w.inner.IPv4(7).As4()
		pub := u.key.Public()
		for _, e := range wiretap.events() {
			body := e.Payload
			if wire.TypeOf(body) == wire.TypeData {
				body = body[wire.DataHeaderLen:]
			}
			if bytes.Contains(body, inner[:]) || bytes.Contains(body, pub[:8]) {
				t.Errorf("%v shows who it is", e)
			}
		}
	})
}

// Two clients reach each other's inner addresses, and nobody can speak for
// another.
func TestClientToClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		a, b := w.client(1), w.client(2)
		settle()
		a.Output([][]byte{packet(w.inner.IPv4(1), w.inner.IPv4(2), 42), packet(w.inner.IPv4(2), far, 43), packet(w.inner.IPv4(1), w.inner.IPv4(3), 44)})
		settle()
		b.expect(42, 42)
		if once, more := b.came(43, 44); once+more != 0 {
			t.Error("a spoofed packet came through")
		}
		if n := w.sum(drops(server.DropSpoofed)); n != 1 {
			t.Errorf("%d spoofed packets counted", n)
		}
		if n := w.sum(drops(server.DropOffline)); n != 1 {
			t.Errorf("%d packets to nobody counted", n)
		}
		if n := w.sum(func(s server.Stats) uint64 { return s.Rejected }); n != 1 {
			t.Errorf("%d packets to nobody answered by an ICMP error", n)
		}
	})
}

// A client that is taken off the list is told so and kept out; one that is put
// back gets in again.
func TestRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		u, other := w.client(7), w.client(8)
		settle()
		w.clients.remove(u.key.Public())
		w.servers[0].Reload()
		settle()
		if u.Status().Connected {
			t.Error("still has a session")
		}
		u.send(1, 5)
		other.send(1, 5)
		settle()
		if once, more := u.came(1, 5); once+more != 0 {
			t.Error("packets of a revoked client passed")
		}
		other.expect(1, 5)
		time.Sleep(time.Minute)
		if w.sum(drops(server.DropUnknownKey)) == 0 {
			t.Error("no attempt counted")
		}
		w.clients.mu.Lock()
		w.clients.keys[u.key.Public()] = 7
		w.clients.mu.Unlock()
		time.Sleep(20 * time.Second)
		u.send(6, 10)
		settle()
		u.expect(6, 10)
	})
}

// A client that ends says so, and one that falls silent is forgotten.
func TestLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		silent := w.client(8)
		settle()
		if n := w.servers[0].Stats().Clients; n != 1 {
			t.Fatalf("%d clients", n)
		}
		silent.host.Kill()
		time.Sleep(3*session.DefaultKeepAlive + 15*time.Second)
		if n := w.servers[0].Stats().Clients; n != 0 {
			t.Errorf("a silent client still counts")
		}
		silent.host.Revive()
		time.Sleep(time.Minute)
		if n := w.servers[0].Stats().Clients; n != 1 {
			t.Errorf("%d clients after it came back", n)
		}
		time.Sleep(75 * time.Minute) // a rekey, and the old session's idle time
		if n := w.servers[0].Stats().Sessions; n != 1 {
			t.Errorf("%d sessions, the old ones idle", n)
		}
	})
}
