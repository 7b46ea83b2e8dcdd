package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"
)

var t0 = time.Unix(1_700_000_000, 0)

// numbered is bigPacket with an identification, so that pieces belong together.
func numbered(rng *rand.Rand, kind, n int, id uint16) []byte {
	b := bigPacket(rng, kind, n)
	if kind%2 == 0 {
		binary.BigEndian.PutUint16(b[4:], id)
		var v View
		v.Parse(b)
		v.FillChecksums()
	}
	return b
}

func addAll(t testing.TB, r *Reassembler, now time.Time, pieces ...[]byte) (whole []byte, why Reassembly) {
	t.Helper()
	var v View
	for _, p := range pieces {
		if got := v.Parse(p); got != OK {
			t.Fatal(got)
		}
		before := bytes.Clone(p)
		if whole != nil {
			t.Fatal("whole before the last piece")
		}
		whole, why = r.Add(&v, now)
		if !bytes.Equal(p, before) {
			t.Fatal("a fragment was changed")
		}
		clear(p) // nor may it be kept
		copy(p, before)
	}
	return whole, why
}

// TestReassemble puts together what Fragment cut, in any order and with copies.
func TestReassemble(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	r := NewReassembler(ReassemblyLimits{})
	for i := range 2000 {
		kind := rng.IntN(kinds)
		pkt := numbered(rng, kind, 1400+rng.IntN(9000), uint16(i))
		pieces, ok := cut(t, pkt, 1280+rng.IntN(100))
		if !ok || len(pieces) < 2 {
			t.Fatal("not cut")
		}
		rng.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
		if rng.IntN(2) == 0 { // a copy of one that is followed by another
			j := rng.IntN(len(pieces) - 1)
			if _, why := addAll(t, r, t0, pieces[:j+1]...); why != Waiting {
				t.Fatal(why)
			}
			if _, why := addAll(t, r, t0, pieces[j]); why != DuplicateFragment {
				t.Fatalf("copy: %v", why)
			}
			pieces = pieces[j+1:]
		}
		whole, why := addAll(t, r, t0, pieces...)
		if why != Complete || !bytes.Equal(whole, pkt) {
			t.Fatalf("kind %d: %v, %d bytes, want %d", kind, why, len(whole), len(pkt))
		}
	}
	if s := r.Stats(); s.Datagrams != 0 || s.Bytes != 0 || s.Evicted+s.Expired != 0 || s.Outcomes[Complete] != 2000 || len(r.sources) != 0 {
		t.Errorf("left over: %+v", s)
	}
}

// reassemblyTwin is a Reassembler for one datagram, byte by byte.
type reassemblyTwin struct {
	data  map[int]byte
	seen  map[[3]int]string
	total int
	dead  bool
}

func (w *reassemblyTwin) add(offset int, more bool, data []byte) Reassembly {
	last := 0
	if !more {
		last = 1
	}
	same := [3]int{offset, offset + len(data), last}
	switch {
	case len(data) == 0 || more && len(data)%8 != 0:
		return BadFragment
	case w.dead:
		return OverlappingFragment
	}
	if s, ok := w.seen[same]; ok && s == string(data) {
		return DuplicateFragment
	}
	end := offset + len(data)
	wrong := !more && w.total > 0 || w.total > 0 && end > w.total
	for i := range w.data {
		wrong = wrong || i >= offset && i < end || !more && i >= end
	}
	if wrong {
		w.dead = true
		return OverlappingFragment
	}
	for i, c := range data {
		w.data[offset+i] = c
	}
	w.seen[same] = string(data)
	if !more {
		w.total = end
	}
	if w.total > 0 && len(w.data) == w.total {
		return Complete
	}
	return Waiting
}

// fragmentOf is a fragment with no regard for what the datagram is.
func fragmentOf(six bool, id uint32, offset int, more bool, data []byte) []byte {
	if six {
		b := fragment6(ESP, uint16(offset), more, data)
		binary.BigEndian.PutUint32(b[4:], id)
		return ip6(FragmentHeader, b)
	}
	b := fragment4(ip4(ESP, data), uint16(offset), more)
	var v View
	binary.BigEndian.PutUint16(b[4:], uint16(id))
	v.Parse(b)
	v.FillChecksums()
	return b
}

// TestReassembleAgainstTwin feeds pieces that overlap, repeat and contradict each
// other.
func TestReassembleAgainstTwin(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	seen := make(map[Reassembly]int)
	for round := range 30_000 {
		r := NewReassembler(ReassemblyLimits{})
		w := reassemblyTwin{data: make(map[int]byte), seen: make(map[[3]int]string)}
		six := round%2 == 0
		for range 8 {
			offset, n := 8*rng.IntN(4), 8*(1+rng.IntN(2))
			more := rng.IntN(3) > 0
			if rng.IntN(10) == 0 {
				n -= rng.IntN(9)
			}
			if offset == 0 && !more {
				continue // whole
			}
			data := make([]byte, n)
			for i := range data {
				data[i] = byte(offset + i)
			}
			if n > 0 && rng.IntN(20) == 0 {
				data[rng.IntN(n)]++
			}
			var v View
			if why := v.Parse(fragmentOf(six, 9, offset, more, data)); why != OK {
				t.Fatal(why)
			}
			want := w.add(offset, more, data)
			whole, why := r.Add(&v, t0)
			if why != want || (whole != nil) != (why == Complete) {
				t.Fatalf("round %d: %d bytes at %d, more %v: %v, want %v", round, n, offset, more, why, want)
			}
			seen[why]++
			if whole == nil {
				continue
			}
			if v.Parse(whole) != OK || v.Fragmented || v.Protocol != ESP || len(v.Upper()) != w.total || !v.ChecksumsValid() {
				t.Fatalf("round %d: %x", round, whole)
			}
			for i, c := range v.Upper() {
				if w.data[i] != c {
					t.Fatalf("round %d: byte %d is %d, want %d", round, i, c, w.data[i])
				}
			}
			break
		}
	}
	for _, why := range []Reassembly{Complete, Waiting, DuplicateFragment, OverlappingFragment, BadFragment} {
		if seen[why] < 1000 {
			t.Errorf("%v only %d times", why, seen[why])
		}
	}
}

// TestReassembleKeys: pieces of different datagrams don't mix.
func TestReassembleKeys(t *testing.T) {
	data := make([]byte, 16)
	for _, six := range []bool{false, true} {
		base := func() []byte { return fragmentOf(six, 5, 0, true, data) }
		for name, change := range map[string]func(v *View){
			"source":      func(v *View) { v.SetSource(gateway(v)) },
			"destination": func(v *View) { v.SetDestination(gateway(v)) },
			"id":          func(v *View) { v.FragmentID++ },
			"protocol": func(v *View) { // IPv6's first fragment says the protocol, others don't count
				if v.Version == 4 {
					v.Protocol = AH
				} else {
					v.FragmentID++
				}
			},
		} {
			r := NewReassembler(ReassemblyLimits{})
			addAll(t, r, t0, base())
			var v View
			v.Parse(fragmentOf(six, 5, 16, false, data))
			change(&v)
			if whole, why := r.Add(&v, t0); why != Waiting || whole != nil {
				t.Errorf("another %s: %v", name, why)
			}
			if whole, why := addAll(t, r, t0, fragmentOf(six, 5, 16, false, data)); why != Complete || len(whole) == 0 {
				t.Errorf("%s: %v", name, why)
			}
		}
	}
}

// TestReassembleDead: after an overlap nothing more comes of the datagram, until it
// would have timed out.
func TestReassembleDead(t *testing.T) {
	r := NewReassembler(ReassemblyLimits{Timeout: 10 * time.Second})
	data := make([]byte, 16)
	first, last := fragmentOf(true, 1, 0, true, data), fragmentOf(true, 1, 16, false, data)
	addAll(t, r, t0, first)
	if _, why := addAll(t, r, t0, fragmentOf(true, 1, 8, true, data)); why != OverlappingFragment {
		t.Fatal(why)
	}
	if s := r.Stats(); s.Bytes != 0 || s.Datagrams != 1 {
		t.Errorf("a dead datagram holds %+v", s)
	}
	for _, p := range [][]byte{first, last, first, last} {
		if whole, why := addAll(t, r, t0.Add(9*time.Second), p); why != OverlappingFragment || whole != nil {
			t.Fatalf("%v", why)
		}
	}
	if whole, why := addAll(t, r, t0.Add(10*time.Second), first, last); why != Complete || whole == nil {
		t.Errorf("afterwards: %v", why)
	}
	if s := r.Stats(); s.Expired != 0 || s.Datagrams != 0 || s.Bytes != 0 {
		t.Errorf("%+v", s)
	}
}

func TestReassembleTimeout(t *testing.T) {
	r := NewReassembler(ReassemblyLimits{Timeout: 10 * time.Second})
	data := make([]byte, 16)
	addAll(t, r, t0, fragmentOf(false, 1, 0, true, data))
	// What comes later doesn't prolong it.
	addAll(t, r, t0.Add(9*time.Second), fragmentOf(false, 1, 16, true, data))
	r.Sweep(t0.Add(10*time.Second - 1))
	if s := r.Stats(); s.Expired != 0 || s.Bytes != 32 {
		t.Errorf("too early: %+v", s)
	}
	r.Sweep(t0.Add(10 * time.Second))
	if s := r.Stats(); s.Expired != 1 || s.Datagrams != 0 || s.Bytes != 0 {
		t.Errorf("%+v", s)
	}
	// Add does it as well.
	addAll(t, r, t0, fragmentOf(false, 1, 0, true, data))
	if _, why := addAll(t, r, t0.Add(time.Minute), fragmentOf(false, 1, 16, false, data)); why != Waiting {
		t.Errorf("%v", why)
	}
}

// TestReassembleLimits: the oldest makes room.
func TestReassembleLimits(t *testing.T) {
	from := func(source byte, id uint32, offset int, more bool, n int) []byte {
		b := fragmentOf(false, id, offset, more, make([]byte, n))
		var v View
		v.Parse(b)
		v.SetSource(netip.AddrFrom4([4]byte{10, 0, 0, source}))
		return b
	}
	// complete says whether the datagram's rest still finds its beginning.
	complete := func(r *Reassembler, source byte, id uint32) bool {
		_, why := addAll(t, r, t0, from(source, id, 1000, false, 8))
		return why == Complete
	}
	t.Run("per source", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{PerSource: 3})
		addAll(t, r, t0, from(9, 1, 0, true, 1000))
		for id := range uint32(4) {
			addAll(t, r, t0, from(1, id, 0, true, 1000))
		}
		if s := r.Stats(); s.Evicted != 1 || s.Datagrams != 4 {
			t.Errorf("%+v", s)
		}
		if !complete(r, 9, 1) || !complete(r, 1, 1) || !complete(r, 1, 3) {
			t.Error("the wrong one made room")
		}
		if complete(r, 1, 0) {
			t.Error("the oldest is still there")
		}
	})
	t.Run("one per source", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{PerSource: 1})
		for id := range uint32(4) {
			addAll(t, r, t0, from(1, id, 0, true, 1000))
		}
		if s := r.Stats(); s.Evicted != 3 || s.Datagrams != 1 || len(r.sources) != 1 || !complete(r, 1, 3) {
			t.Errorf("%+v", s)
		}
	})
	t.Run("datagrams", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{Datagrams: 3})
		for source := range byte(5) {
			addAll(t, r, t0, from(source, 1, 0, true, 1000))
		}
		if s := r.Stats(); s.Evicted != 2 || s.Datagrams != 3 || len(r.sources) != 3 {
			t.Errorf("%+v", s)
		}
		if !complete(r, 2, 1) || !complete(r, 4, 1) || complete(r, 1, 1) {
			t.Error("the wrong one made room")
		}
	})
	t.Run("bytes", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{Bytes: 3500})
		for source := range byte(3) {
			addAll(t, r, t0, from(source, 1, 0, true, 1000))
		}
		// The oldest itself grows: then the next one goes.
		addAll(t, r, t0, from(0, 1, 1008, true, 1000))
		if s := r.Stats(); s.Evicted != 1 || s.Bytes != 3000 {
			t.Errorf("%+v", s)
		}
		if complete(r, 1, 1) || !complete(r, 2, 1) {
			t.Error("the wrong one made room")
		}
	})
	t.Run("one too big", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{Bytes: 2500})
		addAll(t, r, t0, from(1, 1, 0, true, 1000), from(1, 1, 1000, true, 1000))
		if _, why := addAll(t, r, t0, from(1, 1, 2000, true, 1000)); why != NoRoom {
			t.Errorf("%v", why)
		}
		if s := r.Stats(); s.Bytes != 0 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("fragments", func(t *testing.T) {
		r := NewReassembler(ReassemblyLimits{})
		why := Waiting
		for i := 0; why == Waiting; i++ {
			_, why = addAll(t, r, t0, from(1, 1, 16*i, true, 8))
			if i > maxFragments {
				t.Fatal("no limit")
			}
		}
		if why != TooManyFragments || r.Stats().Bytes != 0 {
			t.Errorf("%v, %+v", why, r.Stats())
		}
	})
}

// TestReassembleTooLong: what couldn't be said in a length field.
func TestReassembleTooLong(t *testing.T) {
	r := NewReassembler(ReassemblyLimits{})
	data := make([]byte, 1024)
	// The data alone ends at 65528+8 > 65535-20.
	if _, why := addAll(t, r, t0, fragmentOf(false, 1, 65520, false, data[:8])); why != BadFragment {
		t.Errorf("%v", why)
	}
	// IPv6: 65,528 bytes of data fit, but not with 8 bytes of options.
	for _, options := range []bool{false, true} {
		var whole []byte
		var why Reassembly
		for offset := 0; offset < 65528; offset += 1024 {
			n := min(1024, 65528-offset)
			b := fragmentOf(true, 2, offset, offset+n < 65528, data[:n])
			if options {
				b = ip6(DestOptions, extension(FragmentHeader, 0, b[40:]))
			}
			if whole, why = addAll(t, r, t0, b); whole == nil && why != Waiting {
				break
			}
		}
		if want := map[bool]Reassembly{false: Complete, true: BadFragment}[options]; why != want {
			t.Errorf("options %v: %v", options, why)
		}
		var v View
		if !options && v.Parse(whole) != OK {
			t.Errorf("%d bytes", len(whole))
		}
	}
	// Only the first fragment has options: each piece is fine, the whole is not.
	r = NewReassembler(ReassemblyLimits{})
	first := fragment4(ip4(ESP, data, bytes.Repeat([]byte{1}, 40)...), 0, true)
	_, why := addAll(t, r, t0, first)
	var whole []byte
	for offset := 1024; offset < 65512 && why == Waiting; offset += 1024 {
		n := min(1024, 65512-offset)
		whole, why = addAll(t, r, t0, fragmentOf(false, 0x1234, offset, offset+n < 65512, data[:n]))
	}
	if why != BadFragment || whole != nil || r.Stats().Bytes != 0 {
		t.Errorf("%v, %d bytes, %+v", why, len(whole), r.Stats())
	}
}

func TestReassembleNoFragment(t *testing.T) {
	r := NewReassembler(ReassemblyLimits{})
	for _, s := range samples() {
		var v View
		v.Parse(s.bytes)
		if _, why := r.Add(&v, t0); (why == BadFragment) == v.Fragmented {
			t.Errorf("%s: %v", s.name, why)
		}
		if v.ParseQuoted(s.bytes) == OK {
			if _, why := r.Add(&v, t0); why != BadFragment {
				t.Errorf("%s, quoted: %v", s.name, why)
			}
		}
	}
}

// TestReassembleCongestion is RFC 3168 section 5.3: a mark on one is one on all.
func TestReassembleCongestion(t *testing.T) {
	mark := func(b []byte, ecn byte) []byte {
		if b[0]>>4 == 6 {
			b[1] |= ecn << 4
			return b
		}
		b[1] |= ecn
		var v View
		v.Parse(b)
		v.FillChecksums()
		return b
	}
	for _, six := range []bool{false, true} {
		for _, tt := range [][3]byte{{0, 0, 0}, {2, 2, 2}, {2, 3, 3}, {1, 3, 3}, {3, 2, 3}, {0, 3, 0}} {
			r := NewReassembler(ReassemblyLimits{})
			whole, _ := addAll(t, r, t0,
				mark(fragmentOf(six, 1, 0, true, make([]byte, 8)), tt[0]), mark(fragmentOf(six, 1, 8, false, make([]byte, 8)), tt[1]))
			var v View
			if v.Parse(whole) != OK || v.congestion() != tt[2] || !v.ChecksumsValid() {
				t.Errorf("%d and %d make %d, want %d", tt[0], tt[1], v.congestion(), tt[2])
			}
		}
	}
}

func TestReassembleConcurrently(t *testing.T) {
	r := NewReassembler(ReassemblyLimits{Datagrams: 50, Bytes: 100_000})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			var v View
			for i := range 3000 {
				p := fragmentOf(i%2 == 0, rng.Uint32N(100), 8*rng.IntN(4), rng.IntN(3) > 0, make([]byte, 8))
				if v.Parse(p) != OK {
					t.Error("not parsed")
				}
				r.Add(&v, t0.Add(time.Duration(i)*time.Millisecond))
				r.Stats()
			}
		})
	}
	wg.Wait()
	r.Sweep(t0.Add(time.Hour))
	if s := r.Stats(); s.Bytes != 0 || s.Datagrams != 0 || len(r.sources) != 0 || r.all.first != nil {
		t.Errorf("%+v", s)
	}
}

func TestReassemblyNames(t *testing.T) {
	seen := make(map[string]bool)
	for r := range Reassembly(NumReassembly) {
		if s := r.String(); s == "" || s == "unknown" || seen[s] {
			t.Errorf("%d is called %q", r, s)
		} else {
			seen[s] = true
		}
	}
	if Reassembly(NumReassembly).String() != "unknown" {
		t.Error("one too many has a name")
	}
}

// FuzzFragments cuts any packet and puts it together again, and feeds any bytes as
// fragments.
func FuzzFragments(f *testing.F) {
	for _, s := range samples() {
		f.Add(s.bytes, uint16(60), uint64(1))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for kind := range kinds {
		f.Add(bigPacket(rng, kind, 3000), uint16(1280), uint64(kind))
	}
	// As many extensions as there may be, and a fragment header besides.
	chain, next := udpDatagram(true, string(make([]byte, 2000))), UDP
	for range maxExtensions {
		chain, next = extension(next, 0, chain), DestOptions
	}
	f.Add(ip6(next, chain), uint16(1280), uint64(1))
	f.Fuzz(func(t *testing.T, data []byte, mtu uint16, seed uint64) {
		r := NewReassembler(ReassemblyLimits{Bytes: 1 << 17, Datagrams: 4})
		var v View
		var whole []byte
		why := v.Parse(data)
		if why == OK {
			r.Add(&v, t0)
			r.Add(&v, t0)
			if s := r.Stats(); s.Bytes > len(data) {
				t.Fatalf("%+v", s)
			}
		}
		pieces, ok := cut(t, data, int(mtu))
		if !ok {
			return
		}
		if why != OK {
			t.Fatalf("cut what can't be parsed: %v", why)
		}
		if len(v.Bytes) <= int(mtu) || v.Fragmented {
			return
		}
		v.FillChecksums()
		want := bytes.Clone(v.Bytes)
		if v.Version == 4 {
			want[6], want[7] = 0, 0 // the reserved bit doesn't survive
			v.Parse(want)
			v.FillChecksums()
		}
		pieces, _ = cut(t, v.Bytes, int(mtu))
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
		outcome := Waiting
		for _, p := range pieces {
			if len(p) > int(mtu) {
				t.Fatalf("%d bytes", len(p))
			}
			if got := v.Parse(p); got != OK {
				t.Fatalf("piece: %v", got)
			}
			whole, outcome = r.Add(&v, t0.Add(time.Hour))
		}
		if len(pieces) > maxFragments {
			return
		}
		if outcome != Complete || !bytes.Equal(whole, want) {
			t.Fatalf("%v: %d bytes of %d pieces\n%x, want\n%x", outcome, len(whole), len(pieces), whole, want)
		}
	})
}

func BenchmarkReassemble(b *testing.B) {
	rng := rand.New(rand.NewPCG(4, 4))
	for kind := range 2 {
		for _, n := range []int{2000, 60000} {
			b.Run(fmt.Sprint([]string{"v4", "v6"}[kind], " ", n), func(b *testing.B) {
				pieces, _ := cut(b, bigPacket(rng, kind, n), 1400)
				r := NewReassembler(ReassemblyLimits{})
				var v View
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					for _, p := range pieces {
						v.Parse(p)
						r.Add(&v, t0)
					}
				}
			})
		}
	}
}
