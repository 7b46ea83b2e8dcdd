package nat

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// clock is a time that tests move.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time          { return c.now }
func (c *clock) add(d time.Duration)     { c.now = c.now.Add(d) }
func newClock() *clock                   { return &clock{time.Unix(1_700_000_000, 0)} }
func (c *clock) since() time.Duration    { return c.now.Sub(newClock().now) }
func (c *clock) table(cfg Config) *Table { cfg.Now = c.Now; return New(cfg) }

const (
	first, last = 8192, 9215 // client 7's block
	syn, ack    = packet.SYN, packet.ACK
	fin, rst    = packet.FIN | packet.ACK, packet.RST
)

// out expects that a packet is let out, and returns the public port.
func out(t testing.TB, tab *Table, client uint32, p packet.Protocol, inner uint16, flags uint8) uint16 {
	t.Helper()
	public, why := tab.Outward(client, p, inner, flags, first, last)
	if why != Mapped || public < first || public > last {
		t.Fatalf("client %d, protocol %d, port %d: %d, %v", client, p, inner, public, why)
	}
	return public
}

// in expects that a packet is let in to an inner port; 0 means that it isn't.
func in(t testing.TB, tab *Table, client uint32, p packet.Protocol, public uint16, flags uint8, want uint16) {
	t.Helper()
	if inner, ok := tab.Inward(client, p, public, flags); inner != want || ok != (want != 0) {
		t.Fatalf("client %d, protocol %d, public port %d: %d (%v), want %d", client, p, public, inner, ok, want)
	}
}

// check verifies what must hold in every Table at any time.
func check(t testing.TB, tab *Table) {
	t.Helper()
	size := 0
	for i := range tab.shards {
		s := &tab.shards[i]
		counts := make(map[uint32]int)
		for k, e := range s.inner {
			if k != keyOf(e.Client, e.Protocol, e.Inner) || s.public[keyOf(e.Client, e.Protocol, e.Public)] != e {
				t.Fatalf("%+v is found by only one of its ports", e.Mapping)
			}
			counts[e.Client]++
			size++
		}
		if len(s.public) != len(s.inner) || len(counts) != len(s.count) {
			t.Fatalf("%d mappings by inner port, %d by public port; %d clients, %d counted",
				len(s.inner), len(s.public), len(counts), len(s.count))
		}
		for client, n := range counts {
			if s.count[client] != n {
				t.Fatalf("client %d has %d mappings, counted %d", client, n, s.count[client])
			}
		}
	}
	if got := tab.Stats().Mappings; got != size {
		t.Fatalf("%d mappings, counted %d", size, got)
	}
}

func sorted(tab *Table) []Mapping {
	return slices.SortedFunc(tab.All, func(a, b Mapping) int {
		return cmp.Or(cmp.Compare(a.Client, b.Client), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Inner, b.Inner))
	})
}

// twin is a Table for UDP and ICMP that is a list.
type twin struct{ list []twinMapping }

type twinMapping struct {
	client        uint32
	proto         packet.Protocol
	inner, public uint16
	sent          time.Duration
}

func (w *twin) expire(now time.Duration) {
	w.list = slices.DeleteFunc(w.list, func(m twinMapping) bool {
		if m.proto == packet.UDP {
			return now-m.sent >= 300*time.Second
		}
		return now-m.sent >= 60*time.Second
	})
}

func (w *twin) outward(client uint32, p packet.Protocol, inner, first, last uint16, now time.Duration) (uint16, bool) {
	w.expire(now)
	for i, m := range w.list {
		if m.client == client && m.proto == p && m.inner == inner {
			w.list[i].sent = now
			return m.public, true
		}
	}
	size := int(last) - int(first) + 1
	begin := int(first) + int(inner)%size
	if inner >= first && inner <= last {
		begin = int(inner)
	}
	for i := range size {
		port := begin + i
		if port > int(last) {
			port -= size
		}
		if !slices.ContainsFunc(w.list, func(m twinMapping) bool {
			return m.client == client && m.proto == p && int(m.public) == port
		}) {
			w.list = append(w.list, twinMapping{client, p, inner, uint16(port), now})
			return uint16(port), true
		}
	}
	return 0, false
}

func (w *twin) inward(client uint32, p packet.Protocol, public uint16, now time.Duration) (uint16, bool) {
	w.expire(now)
	for _, m := range w.list {
		if m.client == client && m.proto == p && m.public == public {
			return m.inner, true
		}
	}
	return 0, false
}

func TestAgainstTwin(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	protocols := []packet.Protocol{packet.UDP, packet.ICMPv4, packet.ICMPv6}
	refused, expired := 0, uint64(0)
	for round := range 30 {
		c := newClock()
		tab, w := c.table(Config{}), twin{}
		first, last := uint16(1000), uint16(1000+rng.IntN(20))
		if round == 0 {
			first, last = 0, 65535
		}
		for range 3000 {
			client, p := 1+64*rng.Uint32N(3), protocols[rng.IntN(3)]
			port := first - 5 + uint16(rng.IntN(40))
			now := c.since()
			switch rng.IntN(10) {
			case 0:
				// Behind full, too: a second is how long a block isn't looked at again.
				c.add(time.Second + time.Duration(rng.IntN(40))*time.Second)
			case 1:
				tab.Sweep(c.now)
			case 2, 3, 4:
				got, ok := tab.Inward(client, p, port, 0)
				if want, wantOK := w.inward(client, p, port, now); got != want || ok != wantOK {
					t.Fatalf("round %d: in to %d: %d %v, want %d %v", round, port, got, ok, want, wantOK)
				}
			default:
				got, why := tab.Outward(client, p, port, 0, first, last)
				want, ok := w.outward(client, p, port, first, last, now)
				if got != want || (why == Mapped) != ok || !ok && why != NoPorts {
					t.Fatalf("round %d: out from %d: %d %v, want %d %v", round, port, got, why, want, ok)
				}
				if !ok {
					refused++
				}
			}
			if len(w.list) > 0 {
				m := w.list[rng.IntN(len(w.list))]
				w.expire(now)
				if slices.Contains(w.list, m) {
					if got, ok := tab.Public(m.client, m.proto, m.inner); now == c.since() && (got != m.public || !ok) {
						t.Fatalf("round %d: %+v is %d %v", round, m, got, ok)
					}
				}
			}
		}
		check(t, tab)
		expired += tab.Stats().Expired
	}
	if refused < 100 || expired < 100 {
		t.Errorf("only %d refused, %d expired", refused, expired)
	}
}

// TestLifetimes: how long a mapping lives after a history of packets, and from when
// on it gives way.
func TestLifetimes(t *testing.T) {
	const long, short = 2*time.Hour + 4*time.Minute, 4 * time.Minute
	type step struct {
		wait  time.Duration
		in    bool
		flags uint8
	}
	o := func(flags uint8) step { return step{0, false, flags} }
	i := func(flags uint8) step { return step{0, true, flags} }
	after := func(d time.Duration, s step) step { s.wait = d; return s }
	for _, tt := range []struct {
		name  string
		proto packet.Protocol
		steps []step
		lives time.Duration // after the last step
		weak  time.Duration // from when on it gives way; the same if never before
	}{
		{"udp", packet.UDP, []step{o(0)}, 5 * time.Minute, 5 * time.Minute},
		{"udp, used again", packet.UDP, []step{o(0), after(4*time.Minute, o(0))}, 5 * time.Minute, 5 * time.Minute},
		{"udp, only from outside", packet.UDP, []step{o(0), after(4*time.Minute, i(0))}, time.Minute, time.Minute},
		{"ping", packet.ICMPv4, []step{o(0)}, time.Minute, time.Minute},
		{"ping6", packet.ICMPv6, []step{o(0), i(0)}, time.Minute, time.Minute},
		{"tcp unanswered", packet.TCP, []step{o(syn), o(syn)}, short, short},
		{"tcp answered, no more", packet.TCP, []step{o(syn), i(syn | ack)}, short, short},
		{"tcp established", packet.TCP, []step{o(syn), i(syn | ack), o(ack)}, long, long},
		{"tcp, one direction seen", packet.TCP, []step{o(syn), o(ack)}, long, long},
		{"tcp, begun elsewhere", packet.TCP, []step{o(ack)}, long, long},
		{"tcp used an hour later", packet.TCP, []step{o(syn), o(ack), after(time.Hour, o(ack))}, long, long},
		{"tcp, only from outside", packet.TCP, []step{o(syn), o(ack), after(time.Hour, i(ack))}, long - time.Hour, long - time.Hour},
		{"tcp closed", packet.TCP, []step{o(syn), o(ack), o(fin), i(fin), o(ack)}, short, short},
		{"tcp closed by the peer first", packet.TCP, []step{o(syn), o(ack), i(fin), o(ack), o(fin), i(ack)}, short, short},
		{"tcp half closed", packet.TCP, []step{o(syn), o(ack), o(fin)}, long, short},
		{"tcp half closed by the peer", packet.TCP, []step{o(syn), o(ack), i(fin), o(ack)}, long, short},
		{"tcp half closed for an hour", packet.TCP, []step{o(syn), o(ack), o(fin), after(time.Hour, i(fin))}, short, 0},
		{"tcp reset by the client", packet.TCP, []step{o(syn), o(ack), o(rst)}, short, short},
		{"tcp reset by the client, who goes on", packet.TCP, []step{o(syn), o(ack), o(rst), o(ack)}, long, long},
		{"tcp refused", packet.TCP, []step{o(syn), i(rst | ack)}, short, short},
		{"tcp reset from outside", packet.TCP, []step{o(syn), o(ack), i(rst)}, long, short},
		{"tcp reset by a stranger", packet.TCP, []step{o(syn), o(ack), i(rst), o(ack)}, long, long},
		{"tcp reset long idle", packet.TCP, []step{o(syn), o(ack), after(time.Hour, i(rst))}, long - time.Hour, 0},
		{"tcp again after the end", packet.TCP, []step{o(syn), o(ack), o(fin), i(fin), o(ack), o(syn)}, short, short},
		{"tcp again and established", packet.TCP, []step{o(syn), o(ack), o(fin), i(fin), o(syn), o(ack)}, long, long},
		{"tcp again after a reset", packet.TCP, []step{o(syn), o(ack), i(rst), o(syn), o(ack), o(fin), i(fin)}, short, short},
		{"tcp two connections, one closed", packet.TCP, []step{o(syn), o(ack), o(syn), o(ack), o(fin), i(fin)}, long, long},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// Look just before and just after both moments, each in a world of its own.
			for _, at := range []struct {
				d           time.Duration
				alive, firm bool
			}{
				{tt.lives - 1, true, tt.weak == tt.lives},
				{tt.lives, false, false},
				{tt.weak - 1, true, true},
				{tt.weak, tt.weak < tt.lives, false},
			} {
				if at.d < 0 {
					continue
				}
				c := newClock()
				tab := c.table(Config{})
				public := uint16(0)
				for _, s := range tt.steps {
					c.add(s.wait)
					if s.in {
						in(t, tab, 7, tt.proto, public, s.flags, 40000)
					} else {
						public = out(t, tab, 7, tt.proto, 40000, s.flags)
					}
				}
				c.add(at.d)
				if at.alive {
					in(t, tab, 7, tt.proto, public, 0, 40000)
				} else {
					in(t, tab, 7, tt.proto, public, 0, 0)
				}
				// Another one that wants this very port and no other.
				_, why := tab.Outward(7, tt.proto, 41000, 0, public, public)
				if (why == NoPorts) != at.firm {
					t.Errorf("after %v: %v", at.d, why)
				}
				check(t, tab)
			}
		})
	}
}

// TestReclaim: where a block is full, the mapping goes that was used least lately
// among those that may.
func TestReclaim(t *testing.T) {
	c := newClock()
	tab := c.table(Config{})
	var publics []uint16
	for i := range uint16(4) {
		p, why := tab.Outward(7, packet.TCP, 100+i, ack, 1000, 1003)
		if why != Mapped {
			t.Fatal(why)
		}
		publics = append(publics, p)
		c.add(time.Minute)
	}
	in(t, tab, 7, packet.TCP, publics[1], fin, 101)
	in(t, tab, 7, packet.TCP, publics[2], fin, 102)
	c.add(10 * time.Minute)
	if p, why := tab.Outward(7, packet.TCP, 200, syn, 1000, 1003); p != publics[1] || why != Mapped {
		t.Errorf("%d, %v; want port %d", p, why, publics[1])
	}
	in(t, tab, 7, packet.TCP, publics[1], 0, 200)
	if _, ok := tab.Public(7, packet.TCP, 101); ok {
		t.Error("the old one is still there")
	}
	if s := tab.Stats(); s.Reclaimed != 1 || s.Mappings != 4 || s.Created != 5 {
		t.Errorf("%+v", s)
	}
	check(t, tab)
}

func TestDrops(t *testing.T) {
	c := newClock()
	tab := c.table(Config{Max: 6, MaxPerClient: 4})
	want := func(client uint32, p packet.Protocol, inner uint16, flags uint8, first, last uint16, want Drop) {
		t.Helper()
		before := tab.Stats().Drops
		if port, why := tab.Outward(client, p, inner, flags, first, last); why != want || (port == 0) == (why == Mapped) {
			t.Errorf("client %d port %d: %d, %v, want %v", client, inner, port, why, want)
		}
		if want != Mapped {
			before[want]++
		}
		if tab.Stats().Drops != before {
			t.Errorf("counted %v", tab.Stats().Drops)
		}
		check(t, tab)
	}
	want(1, 132, 1, 0, 1000, 2000, BadProtocol)
	want(1, packet.UDP, 1, 0, 2000, 1999, NoPorts)
	want(1, packet.UDP, 1, 0, 2000, 1000, NoPorts)
	want(1, packet.TCP, 1, rst, 1000, 2000, StrayReset)
	want(1, packet.UDP, 1, 0, 1000, 1001, Mapped)
	want(1, packet.UDP, 2, 0, 1000, 1001, Mapped)
	want(1, packet.UDP, 3, 0, 1000, 1001, NoPorts)
	want(1, packet.TCP, 3, 0, 1000, 1001, Mapped)
	want(1, packet.UDP, 3, 0, 3000, 3001, Mapped) // the next block
	want(1, packet.UDP, 4, 0, 3000, 3001, ClientFull)
	want(1, packet.UDP, 3, 0, 1000, 1001, Mapped) // stays in the next block
	want(1, packet.TCP, 3, rst, 1000, 1001, Mapped)
	want(2, packet.UDP, 1, 0, 1000, 2000, Mapped)
	want(2, packet.UDP, 2, 0, 1000, 2000, Mapped)
	want(2, packet.UDP, 3, 0, 1000, 2000, TableFull)
	in(t, tab, 1, 132, 1000, 0, 0)
	in(t, tab, 1, packet.UDP, 999, 0, 0)
	if got := tab.Stats().Unknown; got != 2 {
		t.Errorf("%d unknown, want 2", got)
	}
	// Learning has the same limits.
	tab.Learn(Mapping{Client: 1, Protocol: packet.UDP, Inner: 9, Public: 9, Since: 1})
	tab.Learn(Mapping{Client: 3, Protocol: packet.UDP, Inner: 9, Public: 9, Since: 1})
	tab.Learn(Mapping{Client: 3, Protocol: 132, Inner: 9, Public: 9, Since: 1})
	tab.Learn(Mapping{Client: 0, Protocol: packet.UDP, Inner: 9, Public: 9, Since: 1})
	if s := tab.Stats(); s.Mappings != 6 || s.Refused != 2 {
		t.Errorf("%+v", s)
	}
}

// TestFull: a block that is used up is looked through once a second.
func TestFull(t *testing.T) {
	c := newClock()
	tab := c.table(Config{})
	if _, why := tab.Outward(7, packet.UDP, 1, 0, 1000, 1000); why != Mapped {
		t.Fatal(why)
	}
	try := func(want Drop) {
		t.Helper()
		if _, why := tab.Outward(7, packet.UDP, 2, 0, 1000, 1000); why != want {
			t.Errorf("%v, want %v", why, want)
		}
	}
	try(NoPorts)
	tab.Forget(7, 1000, 1000)
	try(NoPorts)
	if _, why := tab.Outward(7, packet.UDP, 2, 0, 2000, 2000); why != Mapped {
		t.Errorf("another block: %v", why)
	}
	tab.Forget(7, 2000, 2000)
	c.add(time.Second)
	try(Mapped)
	tab.Sweep(c.now)
	for i := range tab.shards {
		if n := len(tab.shards[i].full); n != 0 {
			t.Errorf("%d blocks still marked", n)
		}
	}
}

func TestForget(t *testing.T) {
	tab := New(Config{})
	for inner := range uint16(100) {
		out(t, tab, 7, packet.UDP, first+inner, 0) // each keeps its port
		out(t, tab, 7+numShards, packet.UDP, first+inner, 0)
	}
	tab.Forget(7, first+10, first+19)
	for inner := range uint16(100) {
		if _, ok := tab.Public(7, packet.UDP, first+inner); ok == (inner >= 10 && inner <= 19) {
			t.Errorf("port %d: %v", first+inner, ok)
		}
	}
	check(t, tab)
	tab.Forget(7, 0, 65535)
	tab.Forget(8, 0, 65535)
	check(t, tab)
	if got := tab.Stats().Mappings; got != 100 {
		t.Errorf("%d mappings, want the other client's 100", got)
	}
}

func TestPublicOnlyLooks(t *testing.T) {
	c := newClock()
	tab := c.table(Config{})
	public := out(t, tab, 7, packet.UDP, 5, 0)
	c.add(udpTimeout - 1)
	if p, ok := tab.Public(7, packet.UDP, 5); !ok || p != public {
		t.Errorf("%d %v", p, ok)
	}
	c.add(1)
	if p, ok := tab.Public(7, packet.UDP, 5); ok {
		t.Errorf("kept alive by a look: %d", p)
	}
	if len(sorted(tab)) != 0 {
		t.Error("All yields what is over")
	}
}

func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for d := range Drop(NumDrops) {
		if s := d.String(); s == "" || s == "unknown" || seen[s] {
			t.Errorf("%d is called %q", d, s)
		} else {
			seen[s] = true
		}
	}
	if Drop(NumDrops).String() != "unknown" {
		t.Error("one too many has a name")
	}
}

func TestConcurrently(t *testing.T) {
	var mu sync.Mutex
	var tabs [2]*Table
	published := 0
	for i := range tabs {
		tabs[i] = New(Config{Max: 500, MaxPerClient: 60, Publish: func(m Mapping) {
			mu.Lock()
			published++
			mu.Unlock()
			tabs[1-i].Learn(m)
		}})
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for i := range 5000 {
				tab, client := tabs[rng.IntN(2)], 1+rng.Uint32N(10)
				p, why := tab.Outward(client, packet.TCP, uint16(rng.IntN(100)), uint8(rng.IntN(32)), 1000, 1063)
				if why == Mapped {
					tab.Inward(client, packet.TCP, p, uint8(rng.IntN(32)))
				}
				switch i % 500 {
				case 0:
					tab.Sweep(time.Now())
				case 1:
					tab.Forget(client, 1000, 1010)
				case 2:
					sorted(tab)
				}
				tab.Stats()
			}
		})
	}
	wg.Wait()
	for _, tab := range tabs {
		check(t, tab)
	}
	if published == 0 {
		t.Error("nothing was published")
	}
}

func TestNoAllocation(t *testing.T) {
	tab := New(Config{Publish: func(Mapping) {}})
	public := out(t, tab, 7, packet.TCP, 40000, syn)
	if n := testing.AllocsPerRun(100, func() {
		tab.Outward(7, packet.TCP, 40000, ack, first, last)
		tab.Inward(7, packet.TCP, public, ack)
		tab.Inward(7, packet.TCP, public+1, ack)
		tab.Public(7, packet.TCP, 40000)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func benchTable(b *testing.B) *Table {
	tab := New(Config{})
	for client := range uint32(200) {
		for port := range uint16(500) {
			out(b, tab, client+1, packet.TCP, 32768+port*13, syn)
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	return tab
}

func BenchmarkOutward(b *testing.B) {
	tab := benchTable(b)
	i := uint32(0)
	for b.Loop() {
		tab.Outward(1+i%200, packet.TCP, 32768+13*uint16(i%499), ack, first, last)
		i++
	}
}

func BenchmarkInward(b *testing.B) {
	tab := benchTable(b)
	i := uint32(0)
	for b.Loop() {
		tab.Inward(1+i%200, packet.TCP, first+uint16(i%1024), ack)
		i++
	}
}

// BenchmarkOutwardParallel: all goroutines have packets of all clients.
func BenchmarkOutwardParallel(b *testing.B) {
	tab := benchTable(b)
	b.RunParallel(func(pb *testing.PB) {
		i := uint32(0)
		for pb.Next() {
			tab.Outward(1+i%200, packet.TCP, 32768+13*uint16(i%499), ack, first, last)
			i++
		}
	})
}

// BenchmarkUsedUp is what a client costs whose block is full and who goes on.
func BenchmarkUsedUp(b *testing.B) {
	tab := New(Config{})
	for port := range uint16(1024) {
		out(b, tab, 7, packet.TCP, port, ack)
	}
	i := uint16(0)
	for b.Loop() {
		tab.Outward(7, packet.TCP, 2000+i%50000, syn, first, last)
		i++
	}
}

func BenchmarkSweep(b *testing.B) {
	tab := benchTable(b)
	now := time.Now()
	for b.Loop() {
		tab.Sweep(now)
	}
	b.ReportMetric(float64(tab.Stats().Mappings), "mappings")
}

// BenchmarkMemory reports what a mapping takes.
func BenchmarkMemory(b *testing.B) {
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		tab := New(Config{})
		for client := range uint32(256) {
			for port := range uint16(1024) {
				out(b, tab, client+1, packet.TCP, port, syn)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(tab.Stats().Mappings), "B/mapping")
		runtime.KeepAlive(tab)
	}
}

func ExampleTable() {
	tab := New(Config{})
	public, _ := tab.Outward(7, packet.UDP, 51820, 0, 8192, 9215)
	inner, _ := tab.Inward(7, packet.UDP, public, 0)
	fmt.Println(public, inner)
	// Output: 8812 51820
}
