package nat

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// cluster is several servers' Tables and a bus between them, which delivers when
// the test says so.
type cluster struct {
	*clock
	tabs  []*Table
	queue []message
	sent  int
	mute  bool // the bus loses everything
}

type message struct {
	to int
	m  Mapping
}

func newCluster(servers int) *cluster {
	c := &cluster{clock: newClock()}
	for i := range servers {
		c.tabs = append(c.tabs, c.table(Config{Publish: func(m Mapping) {
			c.sent++
			for to := range c.tabs {
				if to != i && !c.mute {
					c.queue = append(c.queue, message{to, m})
				}
			}
		}}))
	}
	return c
}

// deliver empties the bus, in random order if rng isn't nil. It must come to rest.
func (c *cluster) deliver(t testing.TB, rng *rand.Rand) {
	t.Helper()
	for n := 0; len(c.queue) > 0; n++ {
		if n > 100_000 {
			t.Fatal("the servers never stop talking")
		}
		i := 0
		if rng != nil {
			i = rng.IntN(len(c.queue))
		}
		next := c.queue[i]
		c.queue = slices.Delete(c.queue, i, i+1)
		c.tabs[next.to].Learn(next.m)
	}
}

// wait lets time pass, with sweeps and the bus.
func (c *cluster) wait(t testing.TB, d time.Duration) {
	t.Helper()
	for ; d > 0; d -= 5 * time.Second {
		c.add(min(d, 5*time.Second))
		for _, tab := range c.tabs {
			tab.Sweep(c.now)
		}
		c.deliver(t, nil)
	}
}

func (c *cluster) agree(t testing.TB) {
	t.Helper()
	want := sorted(c.tabs[0])
	for i, tab := range c.tabs {
		check(t, tab)
		if got := sorted(tab); !slices.Equal(got, want) {
			t.Fatalf("server %d has\n%v\nserver 0 has\n%v", i, got, want)
		}
	}
}

// TestLearned: what one server maps, all let in; and other servers choose around
// it.
func TestLearned(t *testing.T) {
	c := newCluster(3)
	public := out(t, c.tabs[0], 7, packet.TCP, 40000, syn)
	c.deliver(t, nil)
	c.agree(t)
	for _, tab := range c.tabs {
		in(t, tab, 7, packet.TCP, public, ack, 40000)
	}
	if p := out(t, c.tabs[1], 7, packet.TCP, 40000, ack); p != public {
		t.Errorf("port %d on another server, want %d", p, public)
	}
	if p := out(t, c.tabs[1], 7, packet.TCP, 40000+1024, syn); p != public+1 {
		t.Errorf("port %d for another flow, want the next one, %d", p, public+1)
	}
	if c.sent != 2 {
		t.Errorf("%d messages for 2 mappings", c.sent)
	}
}

func TestStats(t *testing.T) {
	c := newCluster(2)
	a, b := c.tabs[0], c.tabs[1]
	public := out(t, a, 7, packet.UDP, 40000, 0)
	out(t, a, 7, packet.UDP, 40001, 0)
	c.deliver(t, nil)
	in(t, b, 7, packet.UDP, public+5, 0, 0)
	c.add(udpTimeout)
	out(t, a, 7, packet.UDP, 40001, 0) // anew
	b.Sweep(c.now)
	if got, want := a.Stats(), (Stats{Mappings: 2, Created: 3, Expired: 1, Published: 3}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got, want := b.Stats(), (Stats{Learned: 2, Expired: 2, Unknown: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	c.deliver(t, nil)
	b.Learn(sorted(a)[0])
	if got := b.Stats().Learned; got != 4 {
		t.Errorf("%d learned, want 4", got)
	}
}

// TestSamePlace: two servers that know nothing of each other choose alike.
func TestSamePlace(t *testing.T) {
	c := newCluster(2)
	for i := range uint16(500) {
		inner := 32768 + i*31
		if a, b := out(t, c.tabs[0], 7, packet.UDP, inner, 0), out(t, c.tabs[1], 7, packet.UDP, inner, 0); a != b {
			t.Fatalf("port %d: %d and %d", inner, a, b)
		}
	}
	c.deliver(t, nil)
	c.agree(t)
}

// TestOlderWins: servers that map the same flows differently, and different ones
// alike, agree when they have heard of each other, whatever the order.
func TestOlderWins(t *testing.T) {
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c := newCluster(3)
		for range 40 {
			tab, inner := c.tabs[rng.IntN(3)], uint16(rng.IntN(30))
			tab.Outward(7, packet.UDP, inner, 0, 1000, 1015)
			c.add(time.Duration(rng.IntN(3)) * time.Millisecond) // several at the same time, too
			if rng.IntN(4) == 0 && len(c.queue) > 0 {
				// One message arrives before the others.
				i := rng.IntN(len(c.queue))
				next := c.queue[i]
				c.queue = slices.Delete(c.queue, i, i+1)
				c.tabs[next.to].Learn(next.m)
			}
		}
		c.deliver(t, rng)
		// What stays is used, and told again where the servers still differ, since one
		// has dropped what another took in its place.
		for range 4 {
			for _, tab := range c.tabs {
				for _, m := range sorted(tab) {
					tab.Outward(7, packet.UDP, m.Inner, 0, 1000, 1015)
				}
			}
			c.wait(t, 2*time.Minute)
		}
		c.agree(t)
		if got := len(sorted(c.tabs[0])); got == 0 {
			t.Fatal("nothing is left")
		}
	}
}

// TestConflicts are the four ways in which two mappings can meet.
func TestConflicts(t *testing.T) {
	const since = 1_700_000_000_000_000_000 // newClock
	for _, tt := range []struct {
		name  string
		m     Mapping
		stays bool
	}{
		{"same inner, older", Mapping{7, packet.UDP, 40000, first + 1, since - 1}, false},
		{"same inner, younger", Mapping{7, packet.UDP, 40000, first + 1, since + 1}, true},
		{"same public, older", Mapping{7, packet.UDP, 40001, first + 64, since - 1}, false},
		{"same public, younger", Mapping{7, packet.UDP, 40001, first + 64, since + 1}, true},
		{"same time, lower port", Mapping{7, packet.UDP, 40000, first + 63, since}, false},
		{"same time, higher port", Mapping{7, packet.UDP, 40000, first + 65, since}, true},
		{"same time and public port, lower inner", Mapping{7, packet.UDP, 39999, first + 64, since}, false},
		{"same time and public port, higher inner", Mapping{7, packet.UDP, 40001, first + 64, since}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClock()
			var told []Mapping
			tab := c.table(Config{Publish: func(m Mapping) { told = append(told, m) }})
			own := Mapping{7, packet.UDP, 40000, first + 64, since}
			if p := out(t, tab, 7, packet.UDP, 40000, 0); p != own.Public {
				t.Fatalf("port %d", p)
			}
			// Not yet, as the other server will just be hearing of it.
			tab.Learn(tt.m)
			if tt.stays && len(told) != 1 {
				t.Errorf("told %v", told)
			}
			c.add(time.Second)
			tab.Learn(tt.m)
			want, wantTold := []Mapping{tt.m}, []Mapping{own}
			if tt.stays {
				want, wantTold = []Mapping{own}, []Mapping{own, own}
			}
			if got := sorted(tab); !slices.Equal(got, want) {
				t.Errorf("has %v, want %v", got, want)
			}
			if !slices.Equal(told, wantTold) {
				t.Errorf("told %v, want %v", told, wantTold)
			}
			check(t, tab)
		})
	}
	t.Run("two at once", func(t *testing.T) {
		c := newClock()
		tab := c.table(Config{})
		out(t, tab, 7, packet.UDP, 40000, 0)
		out(t, tab, 7, packet.UDP, 40001, 0)
		tab.Learn(Mapping{7, packet.UDP, 40000, first + 65, since - 1})
		if got := sorted(tab); len(got) != 1 || got[0].Since != since-1 || tab.Stats().Replaced != 2 {
			t.Errorf("has %v", got)
		}
		check(t, tab)
	})
	t.Run("the same, older", func(t *testing.T) {
		c := newClock()
		tab := c.table(Config{})
		out(t, tab, 7, packet.UDP, 40000, 0)
		tab.Learn(Mapping{7, packet.UDP, 40000, first + 64, since - 5})
		tab.Learn(Mapping{7, packet.UDP, 40000, first + 64, since + 5})
		if got := sorted(tab); len(got) != 1 || got[0].Since != since-5 {
			t.Errorf("has %v", got)
		}
	})
}

// TestOneWay: server 0 sees all that goes out, server 1 all that comes in, for hours.
func TestOneWay(t *testing.T) {
	for _, p := range []packet.Protocol{packet.UDP, packet.TCP, packet.ICMPv4} {
		c := newCluster(2)
		public := out(t, c.tabs[0], 7, p, 40000, syn)
		for range 1000 {
			c.wait(t, 30*time.Second)
			if got := out(t, c.tabs[0], 7, p, 40000, ack); got != public {
				t.Fatalf("protocol %d: port %d became %d", p, public, got)
			}
			in(t, c.tabs[1], 7, p, public, ack, 40000)
		}
		sent := c.sent
		limit := map[packet.Protocol]int{packet.UDP: 301, packet.TCP: 14, packet.ICMPv4: 1001}[p]
		if sent > limit {
			t.Errorf("protocol %d: %d messages in 8 hours", p, sent)
		}
		// Nothing goes out any more, and packets from outside don't keep it.
		for range 2*60 + 4 + 42 {
			c.wait(t, time.Minute)
			c.tabs[1].Inward(7, p, public, ack)
		}
		for i, tab := range c.tabs {
			if n := tab.Stats().Mappings; n != 0 {
				t.Errorf("protocol %d: server %d still has %d", p, i, n)
			}
		}
	}
}

// TestPortUsedAgain: a mapping has ended where it was made, and its port goes to
// another flow. A server that knows of the old one follows.
func TestPortUsedAgain(t *testing.T) {
	for _, p := range []packet.Protocol{packet.UDP, packet.TCP, packet.ICMPv6} {
		c := newCluster(3)
		public := out(t, c.tabs[0], 7, p, 40000, syn)
		c.deliver(t, nil)
		// Server 1 saw a packet as well, but not the last one.
		c.add(10 * time.Second)
		out(t, c.tabs[1], 7, p, 40000, syn)
		c.wait(t, 20*time.Second)
		out(t, c.tabs[0], 7, p, 40000, syn)
		c.wait(t, map[packet.Protocol]time.Duration{packet.UDP: 5, packet.TCP: 4, packet.ICMPv6: 1}[p]*time.Minute-time.Second)
		alive := func() bool { _, ok := c.tabs[0].Public(7, p, 40000); return ok }
		if !alive() {
			t.Fatalf("protocol %d: gone too early", p)
		}
		for range 20 {
			if alive() {
				c.wait(t, 5*time.Second)
			}
		}
		if alive() {
			t.Fatalf("protocol %d: lives too long", p)
		}
		// A port that begins to look at the same place.
		if got := out(t, c.tabs[0], 7, p, 40000+1024, syn); got != public {
			t.Fatalf("protocol %d: port %d, want %d", p, got, public)
		}
		c.deliver(t, nil)
		for _, tab := range c.tabs {
			in(t, tab, 7, p, public, 0, 40000+1024)
			check(t, tab)
		}
	}
}

// TestDefended: a server that took an idle connection's port, which it had only
// heard of, gives it back.
func TestDefended(t *testing.T) {
	c := newCluster(2)
	a, b := c.tabs[0], c.tabs[1]
	p, _ := a.Outward(7, packet.TCP, 40000, syn, 1000, 1000)
	a.Outward(7, packet.TCP, 40000, ack, 1000, 1000)
	c.wait(t, 30*time.Minute)
	if got, why := b.Outward(7, packet.TCP, 50000, syn, 1000, 1000); got != p || why != Mapped {
		t.Fatalf("%d, %v", got, why)
	}
	c.deliver(t, nil)
	in(t, a, 7, packet.TCP, p, ack, 40000)
	in(t, b, 7, packet.TCP, p, ack, 40000)
	c.agree(t)
	if s := a.Stats(); s.Kept != 1 {
		t.Errorf("%+v", s)
	}
}

// TestDeaf: servers that couldn't hear each other agree afterwards.
func TestDeaf(t *testing.T) {
	c := newCluster(2)
	c.mute = true
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		out(t, c.tabs[rng.IntN(2)], 7, packet.UDP, uint16(rng.IntN(1<<16)), 0)
		c.add(10 * time.Millisecond)
	}
	c.mute = false
	// Each gives the other all it knows.
	a, b := sorted(c.tabs[0]), sorted(c.tabs[1])
	for _, m := range a {
		c.tabs[1].Learn(m)
	}
	for _, m := range b {
		c.tabs[0].Learn(m)
	}
	c.deliver(t, rng)
	for _, tab := range c.tabs {
		check(t, tab)
		for _, m := range sorted(tab) {
			tab.Outward(7, packet.UDP, m.Inner, 0, first, last)
		}
	}
	c.wait(t, 4*time.Minute)
	c.agree(t)
}

// FuzzCluster lets three servers see anything, in any order, and looks whether the
// tables stay sound.
func FuzzCluster(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x10\x21\x32\x43\x54\x65\x76\x87\x98\xa9\xba\xcb\xdc"))
	f.Add([]byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		c := newCluster(3)
		protocols := []packet.Protocol{packet.TCP, packet.UDP, packet.ICMPv4, packet.TCP}
		for len(ops) >= 4 {
			op, a, b, d := ops[0], ops[1], ops[2], ops[3]
			ops = ops[4:]
			tab, client, p := c.tabs[int(a)%3], uint32(1+b%3), protocols[op>>6]
			switch op & 7 {
			case 0, 1, 2:
				public, why := tab.Outward(client, p, uint16(d%32), b, 8, 15)
				if (why == Mapped) != (public >= 8 && public <= 15) {
					t.Fatalf("%d, %v", public, why)
				}
				if why != Mapped {
					break
				}
				if inner, ok := tab.Inward(client, p, public, 0); !ok || inner != uint16(d%32) {
					t.Fatalf("out from %d as %d, in to %d (%v)", d%32, public, inner, ok)
				}
			case 3:
				tab.Inward(client, p, uint16(d%16), b)
			case 4:
				c.add(time.Duration(d) * time.Duration(a) * time.Second)
			case 5:
				tab.Sweep(c.now)
			case 6:
				for range d % 8 {
					if len(c.queue) > 0 {
						next := c.queue[0]
						c.queue = c.queue[1:]
						c.tabs[next.to].Learn(next.m)
					}
				}
			case 7:
				tab.Learn(Mapping{client, p, uint16(a % 32), 8 + uint16(d%8), uint64(c.now.UnixNano()) - uint64(b)})
			}
			for _, tab := range c.tabs {
				check(t, tab)
			}
		}
		c.deliver(t, nil)
		c.add(24 * time.Hour)
		for _, tab := range c.tabs {
			tab.Sweep(c.now)
			check(t, tab)
			if n := tab.Stats().Mappings; n != 0 {
				t.Fatalf("%d mappings live for ever", n)
			}
		}
	})
}
