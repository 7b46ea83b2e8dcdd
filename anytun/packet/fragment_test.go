package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// cut is Fragment with new memory for every piece.
func cut(t testing.TB, pkt []byte, mtu int) ([][]byte, bool) {
	t.Helper()
	var out [][]byte
	before := bytes.Clone(pkt)
	ok := Fragment(pkt, mtu, 0xfedcba98, func(n int) []byte {
		b := bytes.Repeat([]byte{0xaa}, n) // nothing is taken for granted
		out = append(out, b)
		return b
	})
	if !bytes.Equal(pkt, before) {
		t.Fatal("the packet was changed")
	}
	return out, ok
}

// bigPacket has n random bytes of upper layer behind the headers chosen by kind.
func bigPacket(rng *rand.Rand, kind, n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	six := kind%2 == 1
	u := udpDatagram(six, string(data))
	switch kind {
	case 0:
		return ip4(UDP, u)
	case 1:
		return ip6(UDP, u)
	case 2: // options, those from 128 up (148 is router alert) to be copied into every fragment
		return ip4(UDP, u, 7, 7, 4, 0, 0, 0, 0, 148, 4, 0, 0, 158, 3, 1, 0, 0)
	case 3:
		return ip6(HopByHop, extension(DestOptions, 1, extension(UDP, 0, u)))
	case 4:
		return ip4(UDP, u, 1, 1, 1, 1)
	case 6:
		return ip4(UDP, u, 136, 4, 1, 2)
	case 7: // a routing header behind one that is measured otherwise
		ah := append([]byte{uint8(Routing), 2}, make([]byte, 14)...)
		return ip6(AH, append(ah, extension(UDP, 0, u)...))
	default:
		return ip6(HopByHop, extension(DestOptions, 0, extension(Routing, 0, extension(DestOptions, 0, extension(UDP, 1, u)))))
	}
}

const kinds = 8

// TestFragment checks every piece by itself, with gVisor for a witness, and the whole
// against a twin that puts bytes where the offsets say.
func TestFragment(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for kind := range kinds {
		for _, n := range []int{0, 1, 1200, 1391, 1392, 1500, 4000, 9001, 65000} {
			for _, mtu := range []int{68, 576, 1280, 1281, 1400, 1407} {
				if kind%2 == 1 && mtu < 1280 {
					continue
				}
				pkt := bigPacket(rng, kind, n)
				name := fmt.Sprintf("kind %d, %d bytes, mtu %d", kind, n, mtu)
				pieces, ok := cut(t, pkt, mtu)
				if !ok {
					t.Fatalf("%s: refused", name)
				}
				if len(pkt) <= mtu {
					if len(pieces) != 1 || !bytes.Equal(pieces[0], pkt) {
						t.Fatalf("%s: not left as it is", name)
					}
					continue
				}
				var whole View
				if whole.Parse(pkt) != OK {
					t.Fatal(name)
				}
				got := make([]byte, 0, len(pkt))
				for i, p := range pieces {
					var v View
					if r := v.Parse(p); r != OK || len(v.Bytes) != len(p) {
						t.Fatalf("%s: piece %d: %v", name, i, r)
					}
					last := i == len(pieces)-1
					if len(p) > mtu || !v.Fragmented || v.More == last || !v.ChecksumsValid() {
						t.Fatalf("%s: piece %d of %d has %d bytes, more %v", name, i, len(pieces), len(p), v.More)
					}
					if !last && len(p) < mtu-60-7 {
						t.Fatalf("%s: piece %d has only %d bytes", name, i, len(p))
					}
					_, data := v.fragmentParts()
					if v.FragmentOffset != len(got) || !last && len(data)%8 != 0 {
						t.Fatalf("%s: piece %d is at %d, want %d", name, i, v.FragmentOffset, len(got))
					}
					got = append(got, data...)
					if v.Source != whole.Source || v.Destination != whole.Destination || v.TTL != whole.TTL {
						t.Fatalf("%s: piece %d is another packet's", name, i)
					}
					if v.Version == 6 {
						if v.FragmentID != 0xfedcba98 {
							t.Fatalf("%s: id %x", name, v.FragmentID)
						}
						continue
					}
					g := header.IPv4(p)
					if !g.IsValid(len(p)) || !g.IsChecksumValid() || int(g.FragmentOffset()) != v.FragmentOffset {
						t.Fatalf("%s: piece %d by gVisor's account", name, i)
					}
					if alert := bytes.Contains(g.Options(), []byte{148, 4, 0, 0, 158, 3, 1, 0}); kind == 2 && !alert {
						t.Fatalf("%s: piece %d lost the option to be copied", name, i)
					}
					if route := bytes.Contains(g.Options(), []byte{7, 7, 4}); route != (kind == 2 && i == 0) {
						t.Fatalf("%s: piece %d and the option not to be copied: %v", name, i, route)
					}
				}
				if end := pkt[len(pkt)-len(got):]; !bytes.Equal(got, end) {
					t.Fatalf("%s: other bytes", name)
				}
				if kind%2 == 1 && len(pkt)-len(got) != map[int]int{1: 40, 3: 56, 5: 64, 7: 64}[kind] {
					t.Fatalf("%s: %d bytes repeated", name, len(pkt)-len(got))
				}
			}
		}
	}
}

// TestFragmentOfFragment: a router may cut again what is a fragment.
func TestFragmentOfFragment(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	pkt := bigPacket(rng, 2, 9000)
	binary.BigEndian.PutUint16(pkt[4:], 77)
	var v View
	v.Parse(pkt)
	v.FillChecksums()
	r := NewReassembler(ReassemblyLimits{})
	var whole []byte
	pieces, _ := cut(t, pkt, 1500)
	for _, p := range pieces {
		smaller, ok := cut(t, p, 700)
		if !ok {
			t.Fatal("refused")
		}
		for _, s := range smaller {
			if v.Parse(s) != OK || len(s) > 700 {
				t.Fatalf("%d bytes", len(s))
			}
			if w, _ := r.Add(&v, time.Time{}); w != nil {
				whole = w
			}
		}
	}
	if !bytes.Equal(whole, pkt) {
		t.Errorf("%d bytes, want %d", len(whole), len(pkt))
	}
}

func TestFragmentRefuses(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	dont := bigPacket(rng, 0, 2000)
	dont[6] |= 0x40
	atomic := ip6(FragmentHeader, fragment6(UDP, 0, false, udpDatagram(true, string(make([]byte, 2000)))))
	hidden := ip6(DestOptions, extension(FragmentHeader, 0, fragment6(UDP, 0, false, udpDatagram(true, string(make([]byte, 2000))))))
	piece6, _ := cut(t, bigPacket(rng, 1, 4000), 2000)
	for name, tt := range map[string]struct {
		pkt []byte
		mtu int
	}{
		"don't fragment":               {dont, 1500},
		"atomic fragment":              {atomic, 1280},
		"atomic fragment behind more":  {hidden, 1280},
		"IPv6 fragment":                {piece6[0], 1280},
		"mtu of a header v4":           {bigPacket(rng, 0, 2000), 27},
		"mtu of a header v6":           {bigPacket(rng, 1, 2000), 55},
		"mtu 0":                        {bigPacket(rng, 0, 2000), 0},
		"negative mtu":                 {bigPacket(rng, 1, 2000), -1},
		"TCP header in two v4":         {ip4(TCP, tcpSegment(false, string(make([]byte, 100)))), 40},
		"TCP header in two v6":         {ip6(TCP, tcpSegment(true, string(make([]byte, 100)))), 70},
		"not a packet":                 {[]byte("hello"), 3},
		"headers longer than the path": {ip6(HopByHop, extension(UDP, 200, udpDatagram(true, "x"))), 1280},
	} {
		if _, ok := cut(t, tt.pkt, tt.mtu); ok {
			t.Errorf("%s: cut", name)
		}
	}
	for kind := range 2 {
		pkt, calls := bigPacket(rng, kind, 5000), 0
		for _, enough := range []int{0, 2} {
			if Fragment(pkt, 1400, 1, func(n int) []byte {
				if calls++; calls > enough {
					return nil
				}
				return make([]byte, n)
			}) {
				t.Error("no room, and yet done")
			}
		}
	}
}

func TestFragmentAllocations(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	buf := make([]byte, 1500)
	room := func(n int) []byte { return buf[:n] }
	for kind := range kinds {
		pkt := bigPacket(rng, kind, 9000)
		if n := testing.AllocsPerRun(100, func() { Fragment(pkt, 1400, 1, room) }); n > 0 {
			t.Errorf("kind %d: %v allocations", kind, n)
		}
	}
}

func BenchmarkFragment(b *testing.B) {
	rng := rand.New(rand.NewPCG(4, 4))
	buf := make([]byte, 1500)
	room := func(n int) []byte { return buf[:n] }
	for kind := range 2 {
		b.Run([]string{"v4", "v6"}[kind], func(b *testing.B) {
			pkt := bigPacket(rng, kind, 9000)
			b.SetBytes(int64(len(pkt)))
			b.ReportAllocs()
			for b.Loop() {
				Fragment(pkt, 1400, 1, room)
			}
		})
	}
}
