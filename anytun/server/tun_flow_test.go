package server

import (
	"bytes"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// batchFlows are flows that take every turn of the road, in or out.
func (r *tunRig) batchFlows(out bool) (flows [][]byte) {
	for _, v := range []struct{ two, nine, world, public, other netip.Addr }{
		{testInner.IPv4(2), testInner.IPv4(9), tunWorld4, tunEgress4, netip.MustParseAddr("127.0.0.1")},
		{testInner.IPv6(2), testInner.IPv6(9), tunWorld6, tunEgress6, netip.MustParseAddr("::1")},
	} {
		for port := range uint16(3) {
			for _, proto := range []packet.Protocol{packet.TCP, packet.UDP} {
				world := netip.AddrPortFrom(v.world, 80+port)
				if !out {
					p := r.out(datagram(proto, netip.AddrPortFrom(v.nine, 5000+port), world, 1))
					mapped := one(r.t, p).SourcePort
					flows = append(flows,
						datagram(proto, world, netip.AddrPortFrom(v.public, port2+port), 200),
						datagram(proto, world, netip.AddrPortFrom(v.public, 9), 200), // nobody's
						datagram(proto, world, netip.AddrPortFrom(v.public, mapped), 200),
						datagram(proto, world, netip.AddrPortFrom(v.world, port2), 200)) // no egress address
					continue
				}
				flows = append(flows,
					datagram(proto, netip.AddrPortFrom(v.two, port2+port), world, 200),
					datagram(proto, netip.AddrPortFrom(v.two, 1000), world, 200), // not its port
					datagram(proto, netip.AddrPortFrom(v.nine, 5000+port), world, 200),
					datagram(proto, netip.AddrPortFrom(v.two, port2), netip.AddrPortFrom(v.other, 80), 200),       // forbidden
					datagram(proto, netip.AddrPortFrom(v.two, port2+9), netip.AddrPortFrom(v.public, port2), 200)) // to itself, by its public port
			}
		}
	}
	return flows
}

// odd changes something about a packet that may matter.
func odd(r *rand.Rand, p []byte) []byte {
	l4 := 20
	if p[0]>>4 == 6 {
		l4 = 40
	}
	switch r.IntN(12) {
	case 0: // anything of the headers
		p[r.IntN(l4+8)] ^= 1 << r.IntN(8)
	case 1:
		p = append(p, 0)
	case 2:
		p = p[:len(p)-1]
	case 3:
		p[l4+4+r.IntN(2)] = byte(r.Uint32()) // UDP's length
	case 4:
		p[l4+12] = byte(r.Uint32()) // TCP's
	case 5:
		p[l4+13] = byte(r.Uint32()) // and its flags
	case 6:
		p[l4+6], p[l4+7] = 0, 0 // no UDP checksum
	case 7:
		if l4 == 20 {
			p = slices.Insert(p, 20, 1, 1, 1, 0) // an option
			p[0]++
			binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		}
	case 8: // as short as TCP's header, or shorter
		p = p[:l4+8+r.IntN(32)]
		if l4 == 20 {
			binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		} else {
			binary.BigEndian.PutUint16(p[4:], uint16(len(p)-l4))
		}
	}
	return p
}

// seen is what came of some packets.
type seen struct {
	out, in  [][]byte
	rejected []packet.ErrorKind
	stats    TunStats
}

// see lets packets go through by f and gathers what came of them. Counters are
// those of these packets alone.
func (r *tunRig) see(f func()) (s seen) {
	r.host.out, r.host.in, r.rejected = nil, nil, nil
	before := r.stats()
	f()
	s = seen{r.host.out, r.host.in, r.rejected, r.stats()}
	s.stats.PacketsOut -= before.PacketsOut
	s.stats.BytesOut -= before.BytesOut
	s.stats.PacketsIn -= before.PacketsIn
	s.stats.BytesIn -= before.BytesIn
	s.stats.Hairpinned -= before.Hairpinned
	for k, n := range before.Drops {
		s.stats.Drops[k] -= n
	}
	return s
}

func (s *seen) equal(t *testing.T, seed uint64, want *seen) {
	t.Helper()
	if !slices.EqualFunc(s.out, want.out, bytes.Equal) || !slices.EqualFunc(s.in, want.in, bytes.Equal) {
		t.Fatalf("seed %d: a batch gave the kernel %d and clients %d packets, one by one it was %d and %d, or others",
			seed, len(s.out), len(s.in), len(want.out), len(want.in))
	}
	if !slices.Equal(s.rejected, want.rejected) {
		t.Fatalf("seed %d: rejected %v, want %v", seed, s.rejected, want.rejected)
	}
	a, b := s.stats, want.stats
	if a.PacketsOut != b.PacketsOut || a.BytesOut != b.BytesOut || a.PacketsIn != b.PacketsIn || a.BytesIn != b.BytesIn ||
		a.Hairpinned != b.Hairpinned || !maps.Equal(a.Drops, b.Drops) {
		t.Fatalf("seed %d: counted %+v, want %+v", seed, a, b)
	}
}

// What happens to a packet in a batch is what happens to it alone.
func TestTunBatchTwin(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for _, outward := range []bool{true, false} {
		r := newTunRig(t)
		flows := r.batchFlows(outward)
		out, in := 0, 0
		for range 300 {
			var pkts [][]byte
			some := flows[random.IntN(len(flows)):]
			for range 1 + random.IntN(60) {
				p := slices.Clone(some[random.IntN(min(len(some), 10))])
				if l4 := len(p) - 224; p[len(p)-224+12] == 6<<4 && random.IntN(10) > 0 { // the same as TCP in its midst
					p[l4+13] = packet.ACK
				}
				if random.IntN(4) == 0 {
					p = odd(random, p)
				}
				pkts = append(pkts, p)
			}
			give := func(pkts [][]byte) {
				list := make([][]byte, len(pkts))
				for i, p := range pkts {
					if list[i] = slices.Clone(p); !outward {
						list[i] = room(len(p))
						copy(inside(list[i]), p)
					}
				}
				if outward {
					r.Input(list)
				} else {
					r.fromDevice(list)
				}
			}
			slow := func() {
				for i := range pkts {
					give(pkts[i : i+1])
				}
			}
			slow() // mappings and fragments
			want := r.see(slow)
			got := r.see(func() { give(pkts) })
			got.equal(t, seed, &want)
			out, in = out+len(got.out), in+len(got.in)
		}
		if outward && out < 1000 || !outward && in < 1000 {
			t.Errorf("outward %v: only %d packets went out and %d in", outward, out, in)
		}
	}
}

// A translation must not outlive its batch: what it rests on may change.
func TestTunForgetsFlows(t *testing.T) {
	r := newTunRig(t)
	p := datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv4(2), port2), netip.AddrPortFrom(tunWorld4, 80), 20)
	b := new(outBatch)
	r.scratch.New = func() any { return b }
	one(t, r.out(slices.Clone(p)))
	r.leases.Set(2, 5, time.Now().Add(time.Hour))
	r.dropped(TunDropPort, func() [][]byte { return r.out(slices.Clone(p)) })
}
