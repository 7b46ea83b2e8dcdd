package simnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anytun-go/anytun/anytun/udp"
)

var (
	anycast = netip.MustParseAddr("198.51.100.1")
	addrA   = netip.MustParseAddr("192.0.2.1")
	addrB   = netip.MustParseAddr("192.0.2.2")
	addrC   = netip.MustParseAddr("192.0.2.3")
	addrV6  = netip.MustParseAddr("2001:db8::1")
)

// bubble runs f with a network in a synctest bubble and checks the books at
// the end.
func bubble(t *testing.T, seed uint64, f func(t *testing.T, n *Network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		NoLeaks(t)
		n := New(seed)
		f(t, n)
		n.Close()
		s := n.Stats()
		out := s.Delivered
		for _, d := range s.Drops {
			out += d
		}
		if s.Sent+s.Duplicated != out {
			t.Errorf("%d sent and %d duplicated, but %d delivered or dropped", s.Sent, s.Duplicated, out)
		}
	})
}

func listen(t *testing.T, h *Host, at string) *Conn {
	t.Helper()
	c, err := h.Listen(netip.MustParseAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func send(t *testing.T, c *Conn, to netip.AddrPort, payload ...string) {
	t.Helper()
	var pkts [][]byte
	for _, p := range payload {
		pkts = append(pkts, []byte(p))
	}
	if err := c.WriteBatch(pkts, udp.Endpoint{Addr: to}); err != nil {
		t.Fatal(err)
	}
}

// collect reads until the socket is closed, and sends copies of what it got.
func collect(c *Conn, got chan<- arrival) {
	defer close(got)
	for {
		groups, err := c.ReadBatch()
		if err != nil {
			return
		}
		for _, g := range groups {
			for _, p := range g.Packets {
				got <- arrival{string(p), g.From, time.Now()}
			}
		}
	}
}

type arrival struct {
	payload string
	from    udp.Endpoint
	at      time.Time
}

// all waits until nothing moves any more and for the time given, then returns what
// has arrived at c.
func all(t *testing.T, c *Conn, wait time.Duration) []arrival {
	t.Helper()
	time.Sleep(wait)
	synctest.Wait()
	got := make(chan arrival, queueLen)
	go collect(c, got)
	synctest.Wait()
	var list []arrival
	for {
		select {
		case a := <-got:
			list = append(list, a)
			continue
		default:
		}
		// The socket stays open for the test; only the collector must go.
		c.Close()
		for range got {
		}
		c.host.reopen(c)
		return list
	}
}

// reopen undoes Close, for all.
func (h *Host) reopen(c *Conn) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	c.done = make(chan struct{})
	h.conns[c.local] = c
}

func payloads(list []arrival) []string {
	var p []string
	for _, a := range list {
		p = append(p, a.payload)
	}
	return p
}

func expect(t *testing.T, list []arrival, want ...string) {
	t.Helper()
	if got := payloads(list); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDelivery(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		a := listen(t, n.Host("a", addrA, addrV6), "[::]:1000")
		b := listen(t, n.Host("b", addrB, addrC), "0.0.0.0:2000")
		send(t, a, netip.AddrPortFrom(addrC, 2000), "one", "", "two")
		list := all(t, b, 0)
		expect(t, list, "one", "", "two")
		want := udp.Endpoint{Addr: netip.AddrPortFrom(addrA, 1000), Local: addrC}
		for _, x := range list {
			if x.from != want {
				t.Errorf("from %v, want %v", x.from, want)
			}
		}
		// The reply leaves from the address that was asked.
		if err := b.WriteBatch([][]byte{[]byte("back")}, want); err != nil {
			t.Fatal(err)
		}
		list = all(t, a, 0)
		expect(t, list, "back")
		if got, want := list[0].from, (udp.Endpoint{Addr: netip.AddrPortFrom(addrC, 2000), Local: addrA}); got != want {
			t.Errorf("from %v, want %v", got, want)
		}
	})
}

// TestGroups: what a real socket's user may rely on.
func TestGroups(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		ha := n.Host("a", addrA)
		a, a2 := listen(t, ha, "0.0.0.0:1"), listen(t, ha, "0.0.0.0:2")
		b := listen(t, n.Host("b", addrB), "0.0.0.0:3")
		send(t, a, netip.AddrPortFrom(addrB, 3), "1", "22")
		send(t, a2, netip.AddrPortFrom(addrB, 3), "333")
		send(t, a, netip.AddrPortFrom(addrB, 3), "4")
		groups, err := b.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, g := range groups {
			s := fmt.Sprint(g.From.Addr.Port())
			for _, p := range g.Packets {
				_ = append(p, "overrun"...)
			}
			for _, p := range g.Packets {
				s += " " + string(p)
			}
			got = append(got, s)
		}
		if want := []string{"1 1 22", "2 333", "1 4"}; !slices.Equal(got, want) {
			t.Errorf("groups %q, want %q", got, want)
		}
		kept := groups[0].Packets[1]
		send(t, a, netip.AddrPortFrom(addrB, 3), "5")
		if _, err := b.ReadBatch(); err != nil {
			t.Fatal(err)
		}
		if string(kept) == "22" {
			t.Error("a packet survived the next ReadBatch, so nobody would notice who keeps one")
		}
	})
}

func TestWriterMayReuseItsBuffers(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		h := n.Host("a", addrA)
		h.SetLinks(Link{Delay: time.Second}, Link{})
		a, b := listen(t, h, "0.0.0.0:1"), listen(t, n.Host("b", addrB), "0.0.0.0:2")
		p := []byte("before")
		if err := a.WriteBatch([][]byte{p}, udp.Endpoint{Addr: netip.AddrPortFrom(addrB, 2)}); err != nil {
			t.Fatal(err)
		}
		copy(p, "after!")
		expect(t, all(t, b, 2*time.Second), "before")
	})
}

func TestDelayKeepsOrder(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		ha, hb := n.Host("a", addrA), n.Host("b", addrB)
		ha.SetLinks(Link{Delay: 30 * time.Millisecond}, Link{})
		hb.SetLinks(Link{}, Link{Delay: 12 * time.Millisecond})
		a, b := listen(t, ha, "0.0.0.0:1"), listen(t, hb, "0.0.0.0:2")
		start := time.Now()
		got := make(chan arrival, 1000)
		go collect(b, got)
		for i := range 100 {
			send(t, a, b.addrPort(addrB), fmt.Sprint(i))
		}
		for i := range 100 {
			x := <-got
			if x.payload != fmt.Sprint(i) || x.at.Sub(start) != 42*time.Millisecond {
				t.Fatalf("%d: %q after %v", i, x.payload, x.at.Sub(start))
			}
		}
		b.Close()
		synctest.Wait()
	})
}

// TestShortcut: what takes a faster way arrives first, and what is still in flight
// at the end is in the books.
func TestShortcut(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		ha := n.Host("a", addrA)
		a, b := listen(t, ha, "0.0.0.0:1"), listen(t, n.Host("b", addrB), "0.0.0.0:2")
		for _, delay := range []time.Duration{3 * time.Second, time.Second, 2 * time.Second, time.Hour} {
			ha.SetLinks(Link{Delay: delay}, Link{})
			send(t, a, b.addrPort(addrB), delay.String())
		}
		expect(t, all(t, b, time.Second), "1s")
		expect(t, all(t, b, time.Second), "2s")
		expect(t, all(t, b, time.Second), "3s")
	})
}

// addrPort is the socket's address as seen from outside.
func (c *Conn) addrPort(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, c.local.Port()) }

// TestFaults measures each fault's share; the seed makes it exact from run
// to run, the bounds only say that the probability is understood.
func TestFaults(t *testing.T) {
	const sent = 2000
	for _, tt := range []struct {
		name  string
		link  Link
		check func(t *testing.T, got []arrival, s Stats)
	}{
		{"loss", Link{Loss: 0.25}, func(t *testing.T, got []arrival, s Stats) {
			between(t, "lost", int(s.Drops[DropLoss]), 400, 600)
			between(t, "arrived", len(got), sent-600, sent-400)
		}},
		{"duplication", Link{Duplicate: 0.25}, func(t *testing.T, got []arrival, s Stats) {
			between(t, "duplicated", int(s.Duplicated), 400, 600)
			if len(got) != sent+int(s.Duplicated) {
				t.Errorf("%d arrived, want %d", len(got), sent+int(s.Duplicated))
			}
		}},
		{"corruption", Link{Corrupt: 0.25}, func(t *testing.T, got []arrival, s Stats) {
			bad := 0
			for i, x := range got {
				if x.payload != number(i) {
					bad++
					if d := binary.BigEndian.Uint64([]byte(x.payload)) ^ uint64(i); d&(d-1) != 0 {
						t.Fatalf("more than one bit differs: %x", d)
					}
				}
			}
			between(t, "damaged", bad, 400, 600)
			if bad != int(s.Corrupted) {
				t.Errorf("%d damaged, %d counted", bad, s.Corrupted)
			}
		}},
		{"damage of copies", Link{Corrupt: 0.25, Duplicate: 1}, func(t *testing.T, got []arrival, s Stats) {
			bad := 0
			for i, x := range got {
				if x.payload != number(i/2) {
					bad++
				}
			}
			if bad != int(s.Corrupted) || len(got) != 2*sent {
				t.Errorf("%d damaged, %d counted; %d arrived", bad, s.Corrupted, len(got))
			}
		}},
		{"reordering", Link{Reorder: 0.25}, func(t *testing.T, got []arrival, s Stats) {
			late := 0
			for i := 1; i < len(got); i++ {
				if got[i].payload < got[i-1].payload {
					late++
				}
			}
			between(t, "reordered", int(s.Reordered), 400, 600)
			if late == 0 || len(got) != sent {
				t.Errorf("%d late, %d arrived", late, len(got))
			}
		}},
		{"jitter", Link{Jitter: 10 * time.Millisecond}, func(t *testing.T, got []arrival, _ Stats) {
			if slices.IsSortedFunc(got, func(a, b arrival) int { return strings.Compare(a.payload, b.payload) }) {
				t.Error("everything in order")
			}
			if len(got) != sent {
				t.Errorf("%d arrived", len(got))
			}
		}},
		{"mtu", Link{MTU: 7}, func(t *testing.T, got []arrival, s Stats) {
			if len(got) != 0 || s.Drops[DropTooBig] != sent {
				t.Errorf("%d arrived, %d too big", len(got), s.Drops[DropTooBig])
			}
		}},
	} {
		for _, up := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/up=%v", tt.name, up), func(t *testing.T) {
				bubble(t, 7, func(t *testing.T, n *Network) {
					ha, hb := n.Host("a", addrA), n.Host("b", addrB)
					if up {
						ha.SetLinks(tt.link, Link{})
					} else {
						hb.SetLinks(Link{}, tt.link)
					}
					a, b := listen(t, ha, "0.0.0.0:1"), listen(t, hb, "0.0.0.0:2")
					for i := range sent {
						send(t, a, b.addrPort(addrB), number(i))
					}
					tt.check(t, all(t, b, time.Second), n.Stats())
				})
			})
		}
	}
}

func number(i int) string { return string(binary.BigEndian.AppendUint64(nil, uint64(i))) }

func between(t *testing.T, what string, got, low, high int) {
	t.Helper()
	if got < low || got > high {
		t.Errorf("%d %s, want %d to %d", got, what, low, high)
	}
}

// TestSameSeedSameLuck: a failure found once can be found again.
func TestSameSeedSameLuck(t *testing.T) {
	once := func(seed uint64) (list []string) {
		bubble(t, seed, func(t *testing.T, n *Network) {
			ha := n.Host("a", addrA)
			ha.SetLinks(Link{Loss: 0.1, Duplicate: 0.1, Corrupt: 0.1, Reorder: 0.1, Jitter: time.Millisecond}, Link{})
			a, b := listen(t, ha, "0.0.0.0:1"), listen(t, n.Host("b", addrB), "0.0.0.0:2")
			for i := range 500 {
				send(t, a, b.addrPort(addrB), number(i))
			}
			list = payloads(all(t, b, time.Second))
		})
		return list
	}
	first := once(42)
	if !slices.Equal(first, once(42)) {
		t.Error("same seed, different luck")
	}
	if slices.Equal(first, once(43)) {
		t.Error("different seed, same luck")
	}
}

func TestAnycast(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		s1, s2 := n.Host("s1", addrB), n.Host("s2", addrC)
		n.Announce(anycast, s1, s2)
		c1, c2 := n.Host("c1", addrA), n.Host("c2", addrV6, netip.MustParseAddr("203.0.113.9"))
		x, y := listen(t, s1, "0.0.0.0:4444"), listen(t, s2, "0.0.0.0:4444")
		a, b := listen(t, c1, "0.0.0.0:1"), listen(t, c2, "0.0.0.0:2")
		to := netip.AddrPortFrom(anycast, 4444)

		send(t, a, to, "a to the first")
		n.SetRoute(c1, anycast, s2)
		send(t, a, to, "a flipped")
		send(t, b, to, "b as before")
		n.Withdraw(anycast, s2)
		send(t, a, to, "a back: s2 has withdrawn")
		n.Announce(anycast, s2)
		n.SetRoute(c1, anycast, nil)
		send(t, a, to, "a without a route of its own")
		atX, atY := all(t, x, 0), all(t, y, 0)
		expect(t, atX, "a to the first", "b as before", "a back: s2 has withdrawn", "a without a route of its own")
		expect(t, atY, "a flipped")
		if l := atY[0].from.Local; l != anycast {
			t.Errorf("local address %v, want the anycast address", l)
		}

		// Either server answers from the anycast address.
		for _, s := range []*Conn{x, y} {
			if err := s.WriteBatch([][]byte{[]byte("hi")}, atY[0].from); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range all(t, a, 0) {
			if r.from.Addr != to {
				t.Errorf("answer from %v, want %v", r.from.Addr, to)
			}
		}

		n.Spray(anycast, true)
		for range 200 {
			send(t, a, to, "spray")
		}
		atX, atY = all(t, x, 0), all(t, y, 0)
		between(t, "at s1", len(atX), 70, 130)
		if len(atX)+len(atY) != 200 {
			t.Errorf("%d and %d arrived", len(atX), len(atY))
		}

		n.Withdraw(anycast, s1)
		n.Withdraw(anycast, s2)
		send(t, a, to, "nobody")
		if d := n.Stats().Drops[DropNoRoute]; d != 1 {
			t.Errorf("%d without a route", d)
		}
	})
}

func TestDeath(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		hs := n.Host("s", addrB)
		hs.SetLinks(Link{}, Link{Delay: time.Second})
		s, c := listen(t, hs, "0.0.0.0:1"), listen(t, n.Host("c", addrA), "0.0.0.0:2")
		send(t, c, s.addrPort(addrB), "waits in the socket")
		time.Sleep(2 * time.Second)
		send(t, c, s.addrPort(addrB), "in flight")
		hs.Kill()
		send(t, c, s.addrPort(addrB), "to the dead")
		send(t, s, c.addrPort(addrA), "from the dead")
		time.Sleep(2 * time.Second)
		hs.Revive()
		send(t, c, s.addrPort(addrB), "welcome back")
		send(t, s, c.addrPort(addrA), "thanks")
		expect(t, all(t, s, 2*time.Second), "welcome back")
		expect(t, all(t, c, 0), "thanks")
		if d := n.Stats().Drops[DropDead]; d != 3 {
			t.Errorf("%d lost to death, want 3", d)
		}
	})
}

func TestNAT(t *testing.T) {
	outer, moved := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
	bubble(t, 1, func(t *testing.T, n *Network) {
		hc := n.Host("c", netip.MustParseAddr("10.0.0.2"))
		nat := n.NAT(outer, 30*time.Second)
		hc.Behind(nat)
		c := listen(t, hc, "0.0.0.0:1")
		s := listen(t, n.Host("s", addrB), "0.0.0.0:2")
		other := listen(t, n.Host("o", addrC), "0.0.0.0:3")

		from := func(payload string) netip.AddrPort {
			t.Helper()
			send(t, c, s.addrPort(addrB), payload)
			list := all(t, s, 0)
			expect(t, list, payload)
			return list[0].from.Addr
		}
		first := from("first")
		if first.Addr() != outer || first == c.local {
			t.Fatalf("came from %v", first)
		}
		if again := from("again"); again != first {
			t.Errorf("mapping changed from %v to %v", first, again)
		}
		send(t, s, first, "answer")
		send(t, other, first, "stranger")
		expect(t, all(t, c, 0), "answer")

		nat.Rebind(netip.Addr{})
		send(t, s, first, "too late")
		second := from("second")
		if second == first || second.Addr() != outer {
			t.Errorf("after the restart from %v, before from %v", second, first)
		}
		nat.Rebind(moved)
		third := from("third")
		if third.Addr() != moved {
			t.Errorf("after the move from %v", third)
		}
		send(t, s, third, "found")
		expect(t, all(t, c, 0), "found")

		time.Sleep(31 * time.Second)
		send(t, s, third, "expired")
		if fourth := from("fourth"); fourth == third {
			t.Error("the mapping survived its idle time")
		}
		expect(t, all(t, c, 0))
		if d := n.Stats().Drops[DropNAT]; d != 3 {
			t.Errorf("%d lost at the translator, want 3", d)
		}
	})
}

func TestNATUsesTheHostsLink(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		hc := n.Host("c", netip.MustParseAddr("10.0.0.2"))
		hc.Behind(n.NAT(netip.MustParseAddr("203.0.113.1"), 0))
		hc.SetLinks(Link{}, Link{Delay: time.Second})
		c, s := listen(t, hc, "0.0.0.0:1"), listen(t, n.Host("s", addrB), "0.0.0.0:2")
		send(t, c, s.addrPort(addrB), "hello")
		send(t, s, all(t, s, 0)[0].from.Addr, "answer")
		expect(t, all(t, c, 999*time.Millisecond))
		expect(t, all(t, c, time.Millisecond), "answer")
	})
}

func TestQueueIsBounded(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		a, b := listen(t, n.Host("a", addrA), "0.0.0.0:1"), listen(t, n.Host("b", addrB), "0.0.0.0:2")
		for i := range queueLen + 10 {
			send(t, a, b.addrPort(addrB), number(i))
		}
		list := all(t, b, 0)
		if len(list) != queueLen || list[queueLen-1].payload != number(queueLen-1) {
			t.Errorf("%d arrived; the newest must be dropped", len(list))
		}
		if d := n.Stats().Drops[DropQueueFull]; d != 10 {
			t.Errorf("%d drops, want 10", d)
		}
	})
}

func TestDrops(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		h := n.Host("a", addrA)
		a, b := listen(t, h, "0.0.0.0:1"), listen(t, n.Host("b", addrB), "0.0.0.0:2")
		send(t, a, netip.AddrPortFrom(addrB, 99), "no socket")
		send(t, a, netip.AddrPortFrom(addrC, 2), "no route")
		send(t, a, netip.AddrPortFrom(addrV6, 2), "wrong family")
		send(t, a, b.addrPort(addrB), string(make([]byte, maxDatagram+1)))
		if err := a.WriteBatch([][]byte{{1}}, udp.Endpoint{Addr: b.addrPort(addrB), Local: addrC}); err != nil {
			t.Fatal(err)
		}
		s := n.Stats()
		want := [NumDropReasons]uint64{DropNoSocket: 1, DropNoRoute: 1, DropSource: 2, DropTooBig: 1}
		if s.Drops != want || s.Sent != 5 {
			t.Errorf("%+v, want drops %v", s, want)
		}
	})
}

func TestTrace(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		ha, hb := n.Host("a", addrA), n.Host("b", addrB)
		a, b := listen(t, ha, "0.0.0.0:1"), listen(t, hb, "0.0.0.0:2")
		var log []string
		n.SetTrace(func(e Event) {
			log = append(log, e.String()+" "+string(e.Payload))
			e.Payload[0] = 'X'                 // a copy
			hb.SetLinks(Link{}, Link{Loss: 1}) // must not deadlock
		})
		send(t, a, b.addrPort(addrB), "first")
		send(t, a, b.addrPort(addrB), "second")
		want := []string{
			"192.0.2.1:1 → 192.0.2.2:2, 5 bytes: sent by a first",
			"192.0.2.1:1 → 192.0.2.2:2, 5 bytes: delivered to b first",
			"192.0.2.1:1 → 192.0.2.2:2, 6 bytes: sent by a second",
			"192.0.2.1:1 → 192.0.2.2:2, 6 bytes: dropped: loss second",
		}
		if !slices.Equal(log, want) {
			t.Errorf("trace:\n%s\nwant:\n%s", strings.Join(log, "\n"), strings.Join(want, "\n"))
		}
		n.SetTrace(nil)
		expect(t, all(t, b, 0), "first")
	})
}

func TestListen(t *testing.T) {
	n := New(1)
	h := n.Host("a", addrA)
	c, err := h.Listen(netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	if a := c.LocalAddr(); a.Port() < 49152 || a.Addr() != netip.IPv6Unspecified() {
		t.Errorf("bound to %v", a)
	}
	if _, err := h.Listen(c.LocalAddr()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second time: %v", err)
	}
	if _, err := h.Listen(c.addrPort(addrA)); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("under a wildcard: %v", err)
	}
	if _, err := h.Listen(netip.AddrPortFrom(addrB, 1)); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("foreign address: %v", err)
	}
	c.Close()
	if _, err := h.Listen(c.LocalAddr()); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

func TestCloseUnblocks(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		h := n.Host("a", addrA)
		one, two := listen(t, h, "0.0.0.0:1"), listen(t, h, "0.0.0.0:2")
		errs := make(chan error)
		for _, c := range []*Conn{one, two} {
			go func() {
				_, err := c.ReadBatch()
				errs <- err
			}()
		}
		synctest.Wait()
		one.Close()
		one.Close()
		n.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("ReadBatch: %v", err)
			}
		}
		if err := one.WriteBatch([][]byte{{1}}, udp.Endpoint{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("WriteBatch: %v", err)
		}
		if c, err := h.Listen(netip.AddrPort{}); err != nil {
			t.Error(err)
		} else if _, err := c.ReadBatch(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("ReadBatch of a socket of a closed network: %v", err)
		}
	})
}

// TestConcurrency is for the race detector.
func TestConcurrency(t *testing.T) {
	bubble(t, 1, func(t *testing.T, n *Network) {
		s1, s2 := n.Host("s1", addrB), n.Host("s2", addrC)
		n.Announce(anycast, s1, s2)
		var readers, writers sync.WaitGroup
		var mu sync.Mutex
		total := 0
		var conns []*Conn
		for _, h := range []*Host{s1, s2} {
			h.SetLinks(Link{}, Link{Jitter: time.Millisecond})
			c := listen(t, h, "0.0.0.0:1")
			conns = append(conns, c)
			readers.Go(func() {
				for {
					groups, err := c.ReadBatch()
					if err != nil {
						return
					}
					for _, g := range groups {
						mu.Lock()
						total += len(g.Packets)
						mu.Unlock()
						if err := c.WriteBatch(g.Packets, g.From); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		hc := n.Host("c", addrA)
		for range 4 {
			c := listen(t, hc, "0.0.0.0:0")
			writers.Go(func() {
				for i := range 100 {
					send(t, c, netip.AddrPortFrom(anycast, 1), number(i), number(i))
					n.SetRoute(hc, anycast, []*Host{s1, s2}[i%2])
				}
			})
		}
		writers.Wait()
		time.Sleep(time.Second)
		for _, c := range conns {
			c.Close()
		}
		readers.Wait()
		if total != 800 {
			t.Errorf("%d arrived, want 800", total)
		}
	})
}

// leakRecorder is a TB that only remembers.
type leakRecorder struct {
	testing.TB
	cleanups []func()
	failed   string
}

func (r *leakRecorder) Helper()          {}
func (r *leakRecorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *leakRecorder) Errorf(format string, args ...any) {
	r.failed = fmt.Sprintf(format, args...)
}

func TestNoLeaks(t *testing.T) {
	for _, leak := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := &leakRecorder{TB: t}
			NoLeaks(r)
			stop := make(chan struct{})
			go leakyLoop(stop)
			if !leak {
				close(stop)
			}
			r.cleanups[0]()
			if leak != (r.failed != "") || leak && !bytes.Contains([]byte(r.failed), []byte("leakyLoop")) {
				t.Errorf("leak %v reported as %q", leak, r.failed)
			}
			if leak {
				close(stop)
			}
		})
	}
}

func leakyLoop(stop chan struct{}) { <-stop }
