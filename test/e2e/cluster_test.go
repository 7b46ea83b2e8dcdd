package e2e

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/test/simnet"
)

// peer lets packets for a client enter at a server, as those of its peers do.
func (w *world) peer(s *node, client uint32, first, last uint64) {
	for n := first; n <= last; n++ {
		s.echo.output([][]byte{packet(far, w.inner.IPv4(client), n)})
	}
}

// at leads a client's packets to one server.
func (w *world) at(s int) func(*simnet.Host) {
	return func(h *simnet.Host) { w.net.SetRoute(h, anycast, w.servers[s].host) }
}

// published sums up what all servers have told each other.
func (w *world) published(t registry.Type) (sum registry.Traffic) {
	for _, s := range w.servers {
		out := s.registry.Stats().Out[t]
		sum.Records += out.Records
		sum.Bytes += out.Bytes
	}
	return sum
}

// A peer's packet may enter at a server that never heard the client: it goes
// straight to the client, through the translator that knows only the anycast
// address.
func TestPeerEntersAnywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 0)
		u := w.client(7, func(h *simnet.Host) { h.Behind(nat); w.at(0)(h) })
		settle()
		u.send(1, 10)
		settle()
		w.peer(w.servers[1], 7, 101, 200)
		w.peer(w.servers[2], 7, 201, 300)
		settle()
		u.expect(101, 300)
		for i, s := range w.servers {
			if n := s.echo.count(); (n > 0) != (i == 0) {
				t.Errorf("server %d heard %d packets of the client", i+1, n)
			}
		}
		// It moves; the first packet from there is enough.
		nat.Rebind(netip.MustParseAddr("192.0.2.201"))
		u.send(11, 11)
		settle()
		w.peer(w.servers[2], 7, 301, 400)
		settle()
		u.expect(301, 400)
	})
}

// Between two clients that are heard by different servers.
func TestClientsAtDifferentServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		a, b := w.client(7, w.at(0)), w.client(8, w.at(1))
		settle()
		for n := uint64(1); n <= 50; n++ {
			a.Output([][]byte{packet(w.inner.IPv4(7), w.inner.IPv4(8), n)})
		}
		settle()
		b.expect(1, 50)
	})
}

// What servers tell each other is about clients, not packets: a session and
// each change of the endpoint is one message, whatever flows and flips.
func TestNothingPerPacket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 0)
		u := w.client(7, func(h *simnet.Host) { h.Behind(nat); w.at(0)(h) })
		settle()
		start := w.published(registry.TypeLocation)
		if start.Records != 1 {
			t.Fatalf("%d locations told of one new session", start.Records)
		}
		for i := range 30 {
			w.at(i % 3)(u.host)
			u.send(uint64(i)*100+1, uint64(i)*100+100)
			w.peer(w.servers[(i+1)%3], 7, uint64(i)*100+10001, uint64(i)*100+10100)
			settle()
		}
		u.expect(1, 3000)
		u.expect(10001, 13000)
		w.net.Spray(anycast, true)
		u.send(20001, 21000)
		settle()
		u.expect(20001, 21000)
		if end := w.published(registry.TypeLocation); end != start {
			t.Errorf("flips and packets cost %d messages", end.Records-start.Records)
		}
		w.net.Spray(anycast, false)
		nat.Rebind(netip.MustParseAddr("192.0.2.201"))
		u.send(30001, 30100)
		settle()
		if end := w.published(registry.TypeLocation); end.Records != start.Records+1 {
			t.Errorf("one change of the endpoint cost %d messages", end.Records-start.Records)
		}
	})
}

// Without the registry servers go on with what they know, new sessions too, and
// catch up when it is back.
func TestRegistryGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		nat := w.net.NAT(netip.MustParseAddr("192.0.2.200"), 0)
		u := w.client(7, func(h *simnet.Host) { h.Behind(nat); w.at(0)(h) })
		settle()
		for n := range uint16(2) {
			w.hub.Partition(name(n+1), true)
		}
		w.peer(w.servers[1], 7, 1, 50) // known before
		w.at(1)(u.host)
		u.send(51, 100)
		settle()
		u.expect(1, 100)
		late := w.client(9, w.at(0))
		settle()
		late.send(1, 50)
		settle()
		late.expect(1, 50)
		w.peer(w.servers[1], 9, 51, 60)
		nat.Rebind(netip.MustParseAddr("192.0.2.201")) // only the second server learns of it
		u.send(101, 110)
		settle()
		w.peer(w.servers[0], 7, 111, 120)
		settle()
		if once, _ := late.came(51, 60); once != 0 {
			t.Error("the second server knew a client that nobody told it of")
		}
		if once, _ := u.came(111, 120); once != 0 {
			t.Error("the first server knew where the client had gone")
		}
		for n := range uint16(2) {
			w.hub.Partition(name(n+1), false)
		}
		settle()
		w.peer(w.servers[1], 9, 61, 70)
		w.peer(w.servers[0], 7, 121, 130)
		settle()
		late.expect(61, 70)
		u.expect(121, 130)
	})
}

// A server that starts learns where everybody is, and one that a client says
// goodbye to tells the others.
func TestStartAndGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, w.at(0))
		settle()
		fresh := &node{host: w.net.Host("server 3", netip.MustParseAddr("192.0.2.3"))}
		w.net.Announce(anycast, fresh.host)
		w.start(fresh, 3)
		w.servers = append(w.servers, fresh)
		settle()
		w.peer(fresh, 7, 1, 20)
		settle()
		u.expect(1, 20)
		u.host.Kill()
		time.Sleep(10 * time.Minute)
		for i, s := range w.servers {
			if n := s.Stats().Clients; n != 0 {
				t.Errorf("server %d counts on a client that is silent for long", i+1)
			}
		}
	})
}

// A client whose packets flip is heard by one server at a time; the others hear
// of it, and keep it for hours.
func TestHeardElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, w.at(0))
		settle()
		w.at(1)(u.host)
		for n := uint64(1); n <= 180; n++ { // over a rekey
			time.Sleep(30 * time.Second)
			w.peer(w.servers[0], 7, n, n)
			settle()
			u.expect(n, n)
		}
	})
}

// However long the registry is gone, servers don't forget whom they would hear of
// by it.
func TestRegistryGoneForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, w.at(0))
		time.Sleep(time.Minute)
		w.hub.Partition(name(1), true)
		w.hub.Partition(name(2), true)
		for n := uint64(1); n <= 20; n++ { // less than a rekey
			time.Sleep(2 * time.Minute)
			w.peer(w.servers[1], 7, n, n)
			settle()
			u.expect(n, n)
		}
		u.host.Kill()
		w.hub.Partition(name(1), false)
		w.hub.Partition(name(2), false)
		time.Sleep(15 * time.Minute)
		for i, s := range w.servers {
			if n := s.Stats().Clients; n != 0 {
				t.Errorf("server %d counts on a client that is silent since the registry is back", i+1)
			}
		}
	})
}

// Nor do they when some of them are cut off from the rest, until those count as
// gone for good.
func TestRegistryInHalves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		u := w.client(7, w.at(2))
		time.Sleep(time.Minute)
		w.hub.Partition(name(3), true) // which alone hears the client
		for n := uint64(1); n <= 15; n++ {
			time.Sleep(2 * time.Minute)
			w.peer(w.servers[0], 7, n, n)
			settle()
			u.expect(n, n)
		}
		u.host.Kill()
		time.Sleep(3 * time.Hour)
		for i, s := range w.servers[:2] {
			if n := s.Stats().Clients; n != 0 {
				t.Errorf("server %d counts for ever on a client of a server that is gone", i+1)
			}
		}
	})
}

// What was caught of a session is worth nothing once the client has another one,
// nor after it has gone: not at a server that knew the session, not at one that
// didn't.
func TestReplayOfOldSession(t *testing.T) {
	for _, gone := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 3)
			u := w.client(7, w.at(0))
			settle()
			w.at(1)(u.host) // the second server knows the session, too
			u.send(1, 1)
			settle()
			w.at(0)(u.host)
			time.Sleep(40 * time.Minute)
			var wiretap tap
			w.net.SetTrace(wiretap.trace)
			u.send(11, 20)
			settle()
			w.net.SetTrace(nil)
			if gone {
				u.host.Kill()
				time.Sleep(20 * time.Minute)
			} else {
				time.Sleep(25 * time.Minute)
			}
			before := []int{w.servers[0].echo.count(), w.servers[1].echo.count(), w.servers[2].echo.count()}
			thief, conn := w.stranger()
			for i, s := range w.servers {
				w.net.SetRoute(thief, anycast, s.host)
				for _, e := range wiretap.events() {
					if e.To == service {
						if err := conn.WriteBatch([][]byte{e.Payload}, udp.Endpoint{Addr: service}); err != nil {
							t.Fatal(err)
						}
					}
				}
				settle()
				if n := s.echo.count() - before[i]; n != 0 {
					t.Errorf("client gone %v: server %d let %d replayed packets out", gone, i+1, n)
				}
			}
		})
	}
}

// A client that is taken off the list is nobody at servers that only know it by
// hearsay, too.
func TestRevokedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, w.at(0))
		settle()
		w.clients.remove(u.key.Public())
		w.servers[1].Reload()
		w.peer(w.servers[1], 7, 1, 10)
		settle()
		if once, _ := u.came(1, 10); once != 0 {
			t.Error("packets of a revoked client's peer passed")
		}
		if n := w.servers[1].Stats().Clients; n != 0 {
			t.Error("the server still counts on it")
		}
	})
}

// What was caught before a server has heard of it can be replayed there only
// within the window: the others' word makes the rest too old.
func TestReplayElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2)
		u := w.client(7, w.at(0))
		settle()
		var wiretap tap
		w.net.SetTrace(wiretap.trace)
		u.send(1, 10)
		settle()
		w.net.SetTrace(nil)
		for n := uint64(11); n < session.WindowLen+1000; n += 100 {
			u.send(n, n+99)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Minute) // servers tell whom they hear
		thief, conn := w.stranger()
		w.net.SetRoute(thief, anycast, w.servers[1].host)
		for _, e := range wiretap.events() {
			if e.To == service {
				if err := conn.WriteBatch([][]byte{e.Payload}, udp.Endpoint{Addr: service}); err != nil {
					t.Fatal(err)
				}
			}
		}
		settle()
		if n := w.servers[1].Stats().Drops[server.DropReplay.String()]; n != 10 {
			t.Errorf("%d of 10 replayed packets dropped", n)
		}
		if n := w.servers[1].echo.count(); n != 0 {
			t.Errorf("%d replayed packets went out", n)
		}
	})
}
