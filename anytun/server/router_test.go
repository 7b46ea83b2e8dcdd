package server

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
)

var testInner = session.NewInner(session.PublicKey{1, 2, 3})

// ipPacket is a bare IP packet with a payload of n bytes.
func ipPacket(src, dst netip.Addr, n int) []byte {
	if src.Is4() {
		b := make([]byte, 20+n)
		b[0] = 0x45
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[8], b[9] = 64, 17
		s, d := src.As4(), dst.As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		return b
	}
	b := make([]byte, 40+n)
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(n))
	b[6], b[7] = 17, 64
	s, d := src.As16(), dst.As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
	return b
}

func TestRoute(t *testing.T) {
	in := testInner
	ip := netip.MustParseAddr
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		want     verdict
		to       uint32
		why      Drop
	}{
		{"world", in.IPv4(7), ip("198.51.100.1"), toEgress, 0, 0},
		{"world v6", in.IPv6(7), ip("2001:db8::1"), toEgress, 0, 0},
		{"gateway", in.IPv4(7), in.IPv4(0), toEgress, 0, 0},
		{"gateway v6", in.IPv6(7), in.IPv6(0), toEgress, 0, 0},
		{"client", in.IPv4(7), in.IPv4(8), toClient, 8, 0},
		{"client v6", in.IPv6(7), in.IPv6(70000), toClient, 70000, 0},
		{"itself", in.IPv4(7), in.IPv4(7), toNowhere, 0, DropLoop},
		{"another's source", in.IPv4(8), ip("198.51.100.1"), toNowhere, 0, DropSpoofed},
		{"another's source v6", in.IPv6(8), ip("2001:db8::1"), toNowhere, 0, DropSpoofed},
		{"the gateway's source", in.IPv4(0), ip("198.51.100.1"), toNowhere, 0, DropSpoofed},
		{"a public source", ip("198.51.100.1"), ip("198.51.100.2"), toNowhere, 0, DropSpoofed},
		{"another host of its /64", in.IPv6(7).Next(), ip("2001:db8::1"), toNowhere, 0, DropSpoofed},
		{"multicast", in.IPv4(7), ip("224.0.0.1"), toNowhere, 0, DropNoRoute},
		{"multicast v6", in.IPv6(7), ip("ff02::1"), toNowhere, 0, DropNoRoute},
		{"nobody inside", in.IPv6(7), in.IPv6(9).Next(), toNowhere, 0, DropNoRoute},
		{"loopback is the egress's to refuse", in.IPv4(7), ip("127.0.0.1"), toEgress, 0, 0},
	} {
		p := ipPacket(c.src, c.dst, 8)
		if v, to, why := route(p, 7, in); v != c.want || to != c.to || why != c.why {
			t.Errorf("%s: verdict %v, client %d, reason %v; want %v, %d, %v", c.name, v, to, why, c.want, c.to, c.why)
		}
		for n := range p {
			if v, _, why := route(p[:n], 7, in); v != toNowhere || why != DropMalformedInner {
				t.Fatalf("%s: the first %d bytes: verdict %v, reason %v", c.name, n, v, why)
			}
		}
		if v, _, why := route(append(p, 0), 7, in); v != toNowhere || why != DropMalformedInner {
			t.Errorf("%s with a byte too many: verdict %v, reason %v", c.name, v, why)
		}
	}
	p := ipPacket(in.IPv4(7), ip("198.51.100.1"), 0)
	p[0] = 0x44
	if _, _, why := route(p, 7, in); why != DropMalformedInner {
		t.Errorf("header length 16: %v", why)
	}
	p[0] = 0x55
	if _, _, why := route(p, 7, in); why != DropMalformedInner {
		t.Errorf("version 5: %v", why)
	}
	p[0] = 0x45
	if n := testing.AllocsPerRun(100, func() { route(p, 7, in) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// likely makes two packets that differ little, or not at all, in what tells where
// they go.
func likely(r *rand.Rand) (p, q []byte) {
	ip := netip.MustParseAddr
	pairs := [][2]netip.Addr{
		{testInner.IPv4(7), ip("198.51.100.1")},
		{testInner.IPv4(7), testInner.IPv4(0)},
		{testInner.IPv4(8), testInner.IPv4(7)},
		{testInner.IPv6(7), ip("2001:db8::1")},
		{testInner.IPv6(7), testInner.IPv6(0)},
		{testInner.IPv6(8), testInner.IPv6(7)},
	}
	make1 := func(pair [2]netip.Addr) []byte {
		b := ipPacket(pair[0], pair[1], r.IntN(30))
		if b[0] == 0x45 && r.IntN(4) == 0 {
			b[0] = 0x46
		}
		switch r.IntN(8) {
		case 0:
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		case 1:
			b = b[:r.IntN(len(b))]
		case 2:
			b = append(b, 0)
		}
		return b
	}
	pair := pairs[r.IntN(len(pairs))]
	p = make1(pair)
	if r.IntN(4) == 0 {
		pair = pairs[r.IntN(len(pairs))]
	}
	return p, make1(pair)
}

// TestBeaten: where a packet may follow another one, route sends it there, too.
func TestBeaten(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	followed := 0
	for range 100000 {
		p, q := likely(r)
		var w beaten
		if w.leads(q) {
			t.Fatalf("seed %d: % x follows nobody", seed, q)
		}
		if v, _, _ := route(p, 7, testInner); v != toEgress {
			continue
		}
		w.note(p)
		if !w.leads(q) {
			continue
		}
		followed++
		if v, _, why := route(q, 7, testInner); v != toEgress {
			t.Fatalf("seed %d: % x follows % x, but: %v", seed, q, p, why)
		}
	}
	if followed < 10000 {
		t.Errorf("only %d of 100000 follow", followed)
	}
}

// TestBeatenByAnother: a client can't take another one's way, not even right behind
// its packets.
func TestBeatenByAnother(t *testing.T) {
	r := newServerRig(t)
	world4, world6 := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")
	var list [][]byte
	for _, client := range []uint32{2, 3, 2} {
		b := [][]byte{around(ipPacket(r.inner.IPv6(2), world6, 8)), around(ipPacket(r.inner.IPv4(2), world4, 8))}
		granted(t, r.cluster, client, time.Now()).Seal(b)
		list = append(list, b...)
	}
	r.in.now = time.Now()
	r.in.group(&udp.Group{From: udp.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:1"), Local: testService.Addr()}, Packets: list})
	if n, spoofed := len(r.in.egress), r.counters.drops[DropSpoofed].Load(); n != 4 || spoofed != 2 {
		t.Errorf("%d packets of client 2 went on, %d of client 3 in its name were dropped; want 4, 2", n, spoofed)
	}
}

// TestSameDestination: what goes with another packet is for the same client.
func TestSameDestination(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	s := &Server{inner: testInner}
	same := 0
	for range 100000 {
		p, q := likely(r)
		if !sameDestination(p, q) {
			continue
		}
		same++
		c, ok := s.clientOf(around(p))
		if d, o := s.clientOf(around(q)); d != c || o != ok {
			t.Fatalf("seed %d: % x is for %d, %v; % x is not: %d, %v", seed, p, c, ok, q, d, o)
		}
	}
	if same < 10000 {
		t.Errorf("only %d of 100000 go together", same)
	}
}

// around puts the tunnel's room around a packet.
func around(p []byte) []byte {
	b := room(len(p))
	copy(inside(b), p)
	return b
}

func FuzzRoute(f *testing.F) {
	f.Add(ipPacket(testInner.IPv4(7), testInner.IPv4(8), 3), uint32(7))
	f.Add(ipPacket(testInner.IPv6(7), netip.MustParseAddr("2001:db8::1"), 3), uint32(7))
	f.Fuzz(func(t *testing.T, p []byte, from uint32) {
		if v, _, _ := route(p, from, testInner); v == toNowhere {
			return
		}
		src, _, ok := addresses(p)
		if n, inner := testInner.Client(src); !ok || !inner || n != from {
			t.Errorf("client %d got away with source %v", from, src)
		}
	})
}

func BenchmarkRoute(b *testing.B) {
	p := ipPacket(testInner.IPv4(7), netip.MustParseAddr("198.51.100.1"), 1380)
	b.ReportAllocs()
	for b.Loop() {
		if v, _, _ := route(p, 7, testInner); v != toEgress {
			b.Fatal("verdict changed")
		}
	}
}
