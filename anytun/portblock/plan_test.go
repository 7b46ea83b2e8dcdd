package portblock

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func addrs(t testing.TB, list ...string) []netip.Addr {
	t.Helper()
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func plan(t testing.TB, ports int, v4, v6 []netip.Addr, prefix string) *Plan {
	t.Helper()
	b, err := New(ports)
	if err != nil {
		t.Fatal(err)
	}
	var p netip.Prefix
	if prefix != "" {
		p = netip.MustParsePrefix(prefix)
	}
	made, err := NewPlan(b, v4, v6, p)
	if err != nil {
		t.Fatal(err)
	}
	return &made
}

var (
	now   = time.Unix(1_700_000_000, 0)
	later = now.Add(time.Hour)
)

// tablePlan is the twin: who owns each port of each address, filled in port by port.
type tablePlan struct {
	owner map[netip.AddrPort]uint32 // block
	lent  map[uint32]uint32         // block to client
	v4    []netip.Addr
	v6    []netip.Addr
	top   uint32
}

func newTable(ports int, v4, v6 []netip.Addr) *tablePlan {
	w := &tablePlan{owner: make(map[netip.AddrPort]uint32), lent: make(map[uint32]uint32), v4: v4, v6: v6}
	ends := map[bool]uint32{}
	for _, family := range []bool{false, true} {
		list := v4
		if family {
			list = v6
		}
		block := uint32(0)
		for _, a := range list {
			for port := 1024; port+ports <= 65536; port += ports {
				block++
				for i := range ports {
					w.owner[netip.AddrPortFrom(a, uint16(port+i))] = block
				}
			}
		}
		ends[family] = block
	}
	w.top = ends[false]
	if len(v4) == 0 {
		w.top = ends[true]
	}
	maps.DeleteFunc(w.owner, func(_ netip.AddrPort, block uint32) bool { return block > w.top })
	return w
}

func (w *tablePlan) inward(a netip.AddrPort) uint32 {
	block := w.owner[a]
	if client, ok := w.lent[block]; ok {
		return client
	}
	return block
}

// outward looks through all addresses for the client's.
func (w *tablePlan) outward(client uint32, port uint16, v6 bool) (netip.Addr, bool) {
	list := w.v4
	if v6 {
		list = w.v6
	}
	for _, a := range list {
		if client != 0 && w.inward(netip.AddrPortFrom(a, port)) == client {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// compare looks at every step-th port of every address, and at inner ports of every
// client.
func compare(t *testing.T, p *Plan, w *tablePlan, l *Leases, step int) {
	t.Helper()
	strangers := addrs(t, "203.0.113.99", "2001:db8::99")
	for _, a := range slices.Concat(w.v4, w.v6, strangers) {
		if got, want := p.Contains(a), !slices.Contains(strangers, a); got != want {
			t.Errorf("contains %v: %v", a, got)
		}
		for port := 0; port < 1<<16; port += step {
			to := netip.AddrPortFrom(a, uint16(port))
			block, ok := p.Owner(a, uint16(port))
			if want := w.owner[to]; block != want || ok != (want != 0) {
				t.Fatalf("%v is in block %d (%v), want %d", to, block, ok, want)
			}
			client, ok := p.Inward(a, uint16(port), l)
			if want := w.inward(to); client != want || ok != (want != 0) {
				t.Fatalf("%v is client %d's (%v), want %d", to, client, ok, want)
			}
		}
	}
	if p.Clients() != w.top {
		t.Errorf("%d clients, want %d", p.Clients(), w.top)
	}
	for client := range w.top + 70 {
		for port := 0; port < 1<<16; port += 509 {
			for _, v6 := range []bool{false, true} {
				got, ok := p.Outward(client, uint16(port), v6, l)
				if want, wantOK := w.outward(client, uint16(port), v6); got != want || ok != wantOK {
					t.Fatalf("client %d port %d (IPv6 %v): %v (%v), want %v", client, port, v6, got, ok, want)
				}
			}
		}
		place, ok := p.Of(client)
		if ok != (client > 0 && client <= w.top) {
			t.Fatalf("client %d has a block: %v", client, ok)
		}
		if !ok {
			continue
		}
		for port := int(place.First); port <= int(place.Last); port += 93 {
			for i, a := range []netip.Addr{place.IPv4, place.IPv6} {
				if a.IsValid() && w.owner[netip.AddrPortFrom(a, uint16(port))] != client {
					t.Fatalf("client %d was given %v:%d", client, a, port)
				}
				has := len([][]netip.Addr{w.v4, w.v6}[i])*p.blocks.PerAddress() >= int(client)
				if a.IsValid() != has {
					t.Fatalf("client %d has the address %v", client, a)
				}
			}
		}
		if again, ok := p.Block(client); !ok || again != place {
			t.Fatalf("block %d: %v, want %v", client, again, place)
		}
	}
}

func TestPlanAgainstTwin(t *testing.T) {
	v4 := addrs(t, "203.0.113.7", "203.0.113.1", "198.51.100.250")
	v6 := addrs(t, "2001:db8::1", "2001:db8:1::", "2001:db8::2", "2001:db8::3")
	for name, tt := range map[string]struct{ v4, v6 []netip.Addr }{
		"both": {v4, v6[:3]}, "IPv4 only": {v4, nil}, "IPv6 only": {nil, v6[:2]},
		"fewer IPv6": {v4, v6[:1]}, "more IPv6": {v4[:1], v6[:2]},
	} {
		sizes := []int{1024, 1000, 5000, 64512}
		if testing.Short() { // the race detector's pass
			sizes = sizes[1:2]
		}
		for _, ports := range sizes {
			t.Run(fmt.Sprint(name, " ", ports), func(t *testing.T) {
				t.Parallel()
				p, w := plan(t, ports, tt.v4, tt.v6, ""), newTable(ports, tt.v4, tt.v6)
				step := 1
				if name != "both" {
					step = 11
				}
				compare(t, p, w, nil, step)
				var l Leases
				if p.blocks.PerAddress() < 3 {
					return
				}
				// Lend blocks as Candidates says, to clients near both ends.
				rng := rand.New(rand.NewPCG(uint64(ports), 1))
				highest := w.top / 3
				for range 40 {
					client := 1 + rng.Uint32N(highest)
					block, ok := firstOf(p.Candidates(client, &l, highest, now))
					if !ok {
						continue
					}
					if w.lent[block] != 0 || block <= highest {
						t.Fatalf("client %d is offered block %d", client, block)
					}
					l.Set(block, client, later)
					w.lent[block] = client
					if rng.IntN(3) == 0 {
						l.Drop(block)
						delete(w.lent, block)
					}
				}
				if len(w.lent) == 0 || l.Len() != len(w.lent) {
					t.Fatalf("%d leases, want %d", l.Len(), len(w.lent))
				}
				compare(t, p, w, &l, 31)
			})
		}
	}
}

func firstOf(seq iter.Seq[uint32]) (uint32, bool) {
	for block := range seq {
		return block, true
	}
	return 0, false
}

// TestOutwardIsInward: what goes out from an address comes back to the same client,
// whatever leases there are, sensible or not.
func TestOutwardIsInward(t *testing.T) {
	p := plan(t, 1024, addrs(t, "203.0.113.1", "203.0.113.2", "203.0.113.3"), nil, "2001:db8::/64")
	rng := rand.New(rand.NewPCG(1, 2))
	var l Leases
	for range 200_000 {
		client, port, v6 := rng.Uint32N(p.Clients()+10), uint16(rng.Uint32()), rng.IntN(4) == 0
		if a, ok := p.Outward(client, port, v6, &l); ok {
			if back, ok := p.Inward(a, port, &l); !ok || back != client {
				t.Fatalf("client %d goes out as %v:%d, which is client %d's (%v)", client, a, port, back, ok)
			}
		}
		switch rng.IntN(100) {
		case 0:
			l.Set(rng.Uint32N(p.Clients()+2), rng.Uint32N(p.Clients()+2), later)
		case 1:
			l.Drop(rng.Uint32N(p.Clients() + 2))
		}
	}
	if l.Len() == 0 {
		t.Error("no leases were there")
	}
}

func TestPrefix(t *testing.T) {
	for _, tt := range []struct {
		prefix  string
		clients uint32
		of5     string
	}{
		{"2001:db8::/64", 1<<32 - 1, "2001:db8::5"},
		{"2001:db8:0:0:ffff:ffff:ffc0:0/106", 1<<22 - 1, "2001:db8::ffff:ffff:ffc0:5"},
		{"2001:db8::/96", 1<<32 - 1, "2001:db8::5"},
		{"2001:db8::/97", 1<<31 - 1, "2001:db8::5"},
	} {
		p := plan(t, 1024, nil, nil, tt.prefix)
		if p.Clients() != tt.clients {
			t.Errorf("%s: %d clients, want %d", tt.prefix, p.Clients(), tt.clients)
		}
		place, ok := p.Of(5)
		if want := (Place{IPv6: netip.MustParseAddr(tt.of5), First: 1024, Last: 65535}); !ok || place != want {
			t.Errorf("%s: client 5 has %v, want %v", tt.prefix, place, want)
		}
		for _, client := range []uint32{1, 5, 255, 65536, tt.clients} {
			for _, port := range []uint16{0, 80, 1024, 65535} {
				a, ok := p.Outward(client, port, true, nil)
				if !ok || !p.Contains(a) {
					t.Fatalf("%s: client %d port %d: %v %v", tt.prefix, client, port, a, ok)
				}
				if back, ok := p.Inward(a, port, nil); !ok || back != client {
					t.Errorf("%s: %v is client %d's, want %d", tt.prefix, a, back, client)
				}
				if back, ok := p.Owner(a, port); !ok || back != client {
					t.Errorf("%s: %v is client %d's, want %d", tt.prefix, a, back, client)
				}
			}
		}
		if _, ok := p.Outward(5, 2000, false, nil); ok {
			t.Error("an IPv4 address without any")
		}
		if _, ok := p.Outward(0, 2000, true, nil); ok {
			t.Error("the servers have an address")
		}
		base := netip.MustParsePrefix(tt.prefix).Addr()
		for _, a := range []netip.Addr{base, base.Prev(), netip.MustParseAddr("2001:db8::1:0:0:5"), netip.MustParseAddr("203.0.113.1")} {
			if client, ok := p.Inward(a, 2000, nil); ok {
				t.Errorf("%s: %v is client %d's", tt.prefix, a, client)
			}
		}
		if _, ok := firstOf(p.Candidates(5, nil, 5, now)); ok {
			t.Error("a block to lease where every client has all ports")
		}
	}
	p := plan(t, 1024, nil, nil, "2001:db8::/106")
	if _, ok := p.Of(1 << 22); ok {
		t.Error("a client beyond the prefix has a place")
	}
	if _, ok := p.Outward(1<<22, 2000, true, nil); ok {
		t.Error("a client beyond the prefix has an address")
	}
	// With IPv4, the block is what counts.
	p = plan(t, 1024, addrs(t, "203.0.113.1"), nil, "2001:db8::/64")
	place, ok := p.Of(2)
	want := Place{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::2"), 2048, 3071}
	if !ok || place != want || p.Clients() != 63 {
		t.Errorf("client 2 of %d has %v (%v), want %v", p.Clients(), place, ok, want)
	}
	if place, ok := p.Of(64); ok {
		t.Errorf("client 64 has %v", place)
	}
	if place, ok := p.Block(2); !ok || place.IPv6.IsValid() {
		t.Errorf("block 2 is %v (%v)", place, ok)
	}
}

func TestZeroPlan(t *testing.T) {
	var p Plan
	if _, ok := p.Of(1); ok || p.Clients() != 0 || p.Contains(netip.MustParseAddr("::")) || p.Contains(netip.Addr{}) {
		t.Error("the zero plan has addresses")
	}
	if _, ok := p.Outward(1, 1024, true, nil); ok {
		t.Error("the zero plan lets out")
	}
	if _, ok := p.Inward(netip.MustParseAddr("2001:db8::1"), 1024, nil); ok {
		t.Error("the zero plan lets in")
	}
	if _, ok := firstOf(p.Candidates(1, nil, 0, now)); ok {
		t.Error("the zero plan lends")
	}
}

func TestNewPlanRefuses(t *testing.T) {
	v4, v6 := addrs(t, "203.0.113.1"), addrs(t, "2001:db8::1")
	for _, tt := range []struct {
		v4, v6 []netip.Addr
		prefix string
		want   string
	}{
		{v6, nil, "", "wrong family"},
		{nil, v4, "", "wrong family"},
		{nil, addrs(t, "::ffff:203.0.113.1"), "", "wrong family"},
		{nil, addrs(t, "fe80::1%eth0"), "", "wrong family"},
		{[]netip.Addr{{}}, nil, "", "wrong family"},
		{addrs(t, "0.0.0.0"), nil, "", "unicast"},
		{addrs(t, "224.0.0.1"), nil, "", "unicast"},
		{addrs(t, "255.255.255.255"), nil, "", "unicast"},
		{nil, addrs(t, "ff02::1"), "", "unicast"},
		{append(v4, v4...), nil, "", "twice"},
		{nil, append(v6, v6...), "", "twice"},
		{v4, v6, "2001:db8::/64", "already"},
		{v4, nil, "203.0.113.0/24", "not IPv6"},
		{v4, nil, "::ffff:203.0.113.0/100", "not IPv6"},
		{v4, nil, "2001:db8::/107", "too small"},
		{v4, nil, "2001:db8::1/64", "2001:db8::/64"},
		{v4, nil, "ff02::/64", "not unicast"},
	} {
		var prefix netip.Prefix
		if tt.prefix != "" {
			prefix = netip.MustParsePrefix(tt.prefix)
		}
		if _, err := NewPlan(Blocks{}, tt.v4, tt.v6, prefix); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v %v %s: %v, want …%s…", tt.v4, tt.v6, tt.prefix, err, tt.want)
		}
	}
}

func TestLeases(t *testing.T) {
	var l Leases
	l.Set(0, 1, later)
	l.Set(60, 0, later)
	l.Set(60, 60, later)
	l.Drop(60)
	if l.Len() != 0 {
		t.Fatal("lent what can't be")
	}
	want := func(block, client uint32) {
		t.Helper()
		if got, ok := l.Client(block); got != client || ok != (client != 0) {
			t.Errorf("block %d: client %d (%v), want %d", block, got, ok, client)
		}
	}
	l.Set(60, 1, now.Add(time.Minute))
	l.Set(50, 1, now.Add(time.Hour))
	l.Set(55, 2, now.Add(time.Hour))
	mine := l.Blocks(1)
	if !slices.Equal(mine, []uint32{50, 60}) {
		t.Errorf("client 1 has %d", mine)
	}
	l.Set(50, 2, now.Add(time.Hour)) // to another
	want(50, 2)
	want(49, 0)
	want(61, 0)
	if !slices.Equal(mine, []uint32{50, 60}) {
		t.Error("a slice that was handed out has changed")
	}
	if n := l.Expire(now.Add(time.Minute)); n != 1 {
		t.Errorf("%d expired, want 1", n)
	}
	want(60, 0)
	want(55, 2)
	if got := l.Blocks(1); got != nil {
		t.Errorf("client 1 has %d", got)
	}
	l.Set(50, 2, now.Add(2*time.Hour)) // renewed
	if n := l.Expire(now.Add(time.Hour)); n != 1 {
		t.Errorf("%d expired, want 1", n)
	}
	want(50, 2)
	l.Drop(50)
	want(50, 0)
	if l.Len() != 0 || l.lowest.Load() != 0 {
		t.Errorf("%d leases left, lowest %d", l.Len(), l.lowest.Load())
	}
}

// TestCandidates: which blocks are offered, and in which order.
func TestCandidates(t *testing.T) {
	b, _ := New(16128) // 4 blocks an address
	p, err := NewPlan(b, addrs(t, "203.0.113.1", "203.0.113.2", "203.0.113.3"), nil, netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	var l Leases
	want := func(client, highest uint32, blocks ...uint32) {
		t.Helper()
		if got := slices.Collect(p.Candidates(client, &l, highest, now)); !slices.Equal(got, blocks) {
			t.Errorf("client %d with %d enrolled is offered %d, want %d", client, highest, got, blocks)
		}
	}
	want(1, 2, 12, 11, 10, 8, 7, 6, 4, 3) // not 9 and 5, which are in 1's position
	want(2, 9, 12, 11)
	want(2, 12)
	want(0, 2)
	l.Set(12, 1, later)
	want(1, 2, 11, 10, 7, 6, 3)
	want(3, 3, 10, 9, 8, 6, 5, 4)
	l.Set(10, 3, now) // over, though nobody has noticed
	want(1, 2, 11, 10, 7, 6, 3)
	l.Set(11, 1, later)
	l.Set(6, 1, later)
	want(1, 2) // a block in every position
	// A client enrolled after its block was lent.
	want(6, 6, 10, 9, 8, 7)
}

// TestLateEnrolment: block 12 is lent when client 12 comes.
func TestLateEnrolment(t *testing.T) {
	p := plan(t, 16128, addrs(t, "203.0.113.1", "203.0.113.2", "203.0.113.3"), nil, "")
	var l Leases
	l.Set(12, 1, later)
	place, _ := p.Of(12)
	if a, ok := p.Outward(12, place.First, false, &l); ok {
		t.Errorf("client 12 may use %v, which is lent", a)
	}
	if client, _ := p.Inward(place.IPv4, place.First, &l); client != 1 {
		t.Errorf("client %d", client)
	}
	l.Set(8, 12, later)
	if a, ok := p.Outward(12, place.First, false, &l); !ok || a != netip.MustParseAddr("203.0.113.2") {
		t.Errorf("client 12's leased block: %v %v", a, ok)
	}
}

func TestLeasesConcurrently(t *testing.T) {
	p := plan(t, 1024, addrs(t, "203.0.113.1", "203.0.113.2"), nil, "")
	var l Leases
	var wg sync.WaitGroup
	for i := range uint32(4) {
		wg.Go(func() {
			for n := range uint32(2000) {
				block := 64 + (n*7+i)%60
				l.Set(block, 1+i, later)
				for _, b := range l.Blocks(1 + i) {
					if _, ok := p.Block(b); !ok {
						t.Errorf("block %d", b)
					}
				}
				firstOf(p.Candidates(1+i, &l, 63, now))
				p.Outward(1+i, uint16(n), false, &l)
				p.Inward(p.v4[1], uint16(n+2000), &l)
				if n%3 == 0 {
					l.Drop(block)
				}
				if n%100 == 0 {
					l.Expire(later)
				}
			}
		})
	}
	wg.Wait()
	l.Expire(later)
	if l.Len() != 0 || len(l.clients) != 0 {
		t.Errorf("%d leases left", l.Len())
	}
}

func FuzzPlan(f *testing.F) {
	f.Add(uint16(1024), uint8(2), uint8(1), uint32(70), uint16(2000), uint32(100))
	f.Add(uint16(64512), uint8(1), uint8(0), uint32(1), uint16(65535), uint32(2))
	f.Fuzz(func(t *testing.T, ports uint16, n4, n6 uint8, client uint32, port uint16, lent uint32) {
		b, err := New(int(ports))
		if err != nil {
			return
		}
		var v4, v6 []netip.Addr
		for i := range n4 {
			v4 = append(v4, netip.AddrFrom4([4]byte{203, 0, 113, i}))
		}
		for i := range n6 {
			v6 = append(v6, netip.AddrFrom16([16]byte{0x20, 1, 13, 0xb8, 15: i}))
		}
		p, err := NewPlan(b, v4, v6, netip.Prefix{})
		if err != nil {
			t.Fatal(err)
		}
		var l Leases
		l.Set(lent, client, later)
		for _, is6 := range []bool{false, true} {
			a, ok := p.Outward(client, port, is6, &l)
			if !ok {
				continue
			}
			if back, ok := p.Inward(a, port, &l); !ok || back != client || !p.Contains(a) || a.Is4() == is6 {
				t.Errorf("client %d goes out as %v:%d, which is client %d's (%v)", client, a, port, back, ok)
			}
		}
	})
}

func benchPlan(b *testing.B) (*Plan, *Leases) {
	var v4 []netip.Addr
	for i := range 1000 {
		v4 = append(v4, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
	}
	p := plan(b, 1024, v4, nil, "2001:db8::/64")
	l := new(Leases)
	for i := range uint32(10_000) {
		l.Set(p.Clients()-i, 1+i%5000, later)
	}
	return p, l
}

func BenchmarkOutward(b *testing.B) {
	p, l := benchPlan(b)
	b.ReportAllocs()
	for b.Loop() {
		p.Outward(1000, FirstPort+(999%63)*1024, false, l)
	}
}

func BenchmarkOutwardLeased(b *testing.B) {
	p, l := benchPlan(b)
	place, _ := p.Block(l.Blocks(1000)[1])
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := p.Outward(1000, place.First, false, l); !ok {
			b.Fatal("not the client's")
		}
	}
}

func BenchmarkInward(b *testing.B) {
	p, l := benchPlan(b)
	b.ReportAllocs()
	for b.Loop() {
		p.Inward(p.v4[500], 4000, l)
	}
}

func BenchmarkInwardLeased(b *testing.B) {
	p, l := benchPlan(b)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			p.Inward(p.v4[999], 4000, l)
		}
	})
}

func BenchmarkInwardPrefix(b *testing.B) {
	p, l := benchPlan(b)
	a, _ := p.Outward(1000, 0, true, l)
	b.ReportAllocs()
	for b.Loop() {
		p.Inward(a, 4000, l)
	}
}

func TestNoAllocation(t *testing.T) {
	p := plan(t, 1024, addrs(t, "203.0.113.1", "203.0.113.2"), nil, "2001:db8::/64")
	var l Leases
	l.Set(126, 1, later)
	place, _ := p.Block(126)
	own, _ := p.Outward(1, 0, true, &l)
	if n := testing.AllocsPerRun(100, func() {
		p.Outward(1, place.First, false, &l)
		p.Outward(1, FirstPort, true, &l)
		p.Inward(place.IPv4, place.First, &l)
		p.Inward(own, 1, &l)
		p.Owner(place.IPv4, 2000)
		p.Contains(own)
		p.Of(1)
		l.Blocks(1)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
