package netstack

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The stages of the road in this package, one connection or socket each, against
// the farEnd of growth_linux_test.go. Cutting and joining alone are in
// join_test.go.

// BenchmarkConnWrite is from Write to packets with room for the tunnel, and the
// acknowledgements for them; an operation is 64 KiB.
func BenchmarkConnWrite(b *testing.B) {
	r := newGrowthRig(b, 1, false)
	const size = 64 << 10
	payload := make([]byte, size)
	want := r.received()
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		before := want
		want += size
		if _, err := r.conns[0].Write(payload); err != nil {
			b.Fatal(err)
		}
		r.acknowledge()
		r.arrived(before) // one write may be on its way
	}
	r.arrived(want)
}

// BenchmarkConnRead is from a batch of packets to a buffer of the reader; an
// operation is a batch of 44 full segments.
func BenchmarkConnRead(b *testing.B) {
	r := newGrowthRig(b, 1, false)
	const run = 44
	t := newTurns(1)
	b.SetBytes(run * farSegment)
	b.ReportAllocs()
	sent := r.read.Load()
	for b.Loop() {
		before := sent
		sent += run * farSegment
		r.pkts = r.pkts[:0]
		r.segments(t, run, farSegment)
		r.stack.Input(r.pkts)
		r.await(before)
	}
	r.await(sent)
}

// BenchmarkDial is a TCP connection made and reset.
func BenchmarkDial(b *testing.B) {
	f := &farEnd{conns: make([]farConn, 1), wake: make(chan struct{}, 1)}
	var err error
	if f.stack, err = New(Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: f.output}); err != nil {
		b.Fatal(err)
	}
	if err := f.stack.SetAddresses([]netip.Addr{client4}); err != nil {
		b.Fatal(err)
	}
	stop := make(chan struct{})
	go f.shakeLoop(stop)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		c, err := f.stack.DialTCP(ctx, netip.AddrPortFrom(world4, 1))
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Abort()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
	f.stack.Close()
	close(stop)
}

// BenchmarkPacketConn is a datagram of 1200 bytes out of a UDP socket, and one in.
func BenchmarkPacketConn(b *testing.B) {
	s, err := New(Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: func([][]byte) {}})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if err := s.SetAddresses([]netip.Addr{client4}); err != nil {
		b.Fatal(err)
	}
	c, err := s.ListenUDP(netip.AddrPort{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	far := netip.AddrPortFrom(world4, 2)
	payload := make([]byte, 1200)
	b.Run("write", func(b *testing.B) {
		b.SetBytes(int64(len(payload)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.WriteToUDPAddrPort(payload, far); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		pkt := make([]byte, 28+len(payload))
		putIPv4(pkt, protoUDP, world4, client4, 0, 0)
		putUDPHeader(pkt[20:], far, netip.AddrPortFrom(client4, c.at.Port()), len(payload))
		batch := make([][]byte, growthBatch)
		for i := range batch {
			batch[i] = pkt
		}
		buf := make([]byte, 2048)
		b.SetBytes(int64(len(batch) * len(payload)))
		b.ReportAllocs()
		for b.Loop() {
			s.Input(batch)
			for range batch {
				if n, _, err := c.ReadFromUDPAddrPort(buf); err != nil || n != len(payload) {
					b.Fatal(n, err)
				}
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(batch)), "ns/packet")
	})
}

// BenchmarkForwardUDP is a datagram through a stack that takes those for every
// address, and the answer.
func BenchmarkForwardUDP(b *testing.B) {
	s, err := New(Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: func([][]byte) {}, Forward: true})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	s.ForwardUDP(func(from, to netip.AddrPort, payload []byte) {
		if err := s.WriteUDP(to, from, payload); err != nil {
			b.Error(err)
		}
	})
	payload := make([]byte, 1200)
	pkt := make([]byte, 28+len(payload))
	putIPv4(pkt, protoUDP, client4, world4, 0, 0)
	putUDPHeader(pkt[20:], netip.AddrPortFrom(client4, 1), netip.AddrPortFrom(world4, 2), len(payload))
	batch := [][]byte{pkt}
	b.SetBytes(int64(len(payload)))
	b.ReportAllocs()
	for b.Loop() {
		s.Input(batch)
	}
}

// BenchmarkResolver is a name looked up: asked for at a server in another stack,
// or found in the cache.
func BenchmarkResolver(b *testing.B) {
	p := newPair(b)
	ttl := uint32(0)
	d := p.serveDNS(b, 53, func(q dnsmessage.Question, _, _ bool) *dnsReply {
		return &dnsReply{question: q, records: []dnsRecord{{"name.example.com", "192.0.2.1", ttl}}}
	})
	ctx := context.Background()
	b.Run("asked", func(b *testing.B) {
		r := p.client.Resolver([]netip.AddrPort{d.at})
		b.ReportAllocs()
		for b.Loop() {
			if a, err := r.LookupNetIP(ctx, "ip4", "name.example.com"); err != nil || len(a) != 1 {
				b.Fatal(a, err)
			}
			r.mu.Lock()
			clear(r.cache)
			r.mu.Unlock()
		}
	})
	b.Run("cached", func(b *testing.B) {
		r := p.client.Resolver([]netip.AddrPort{d.at})
		ttl = uint32((time.Hour).Seconds())
		b.ReportAllocs()
		for b.Loop() {
			if a, err := r.LookupNetIP(ctx, "ip4", "name.example.com"); err != nil || len(a) != 1 {
				b.Fatal(a, err)
			}
		}
	})
}
