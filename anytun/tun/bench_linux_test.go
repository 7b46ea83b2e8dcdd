package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// superpacket is one of 47 pieces, as TCP makes them at full speed.
func superpacket() (vnet, []byte) {
	f := newFlow(rand.New(rand.NewPCG(1, 1)), 0)
	f.v4, f.udp, f.df, f.options, f.port = true, false, true, 12, 80
	v := vnet{flags: vnetNeedsChecksum, gso: gsoTCPv4, gsoSize: 1348, start: 20, offset: 16}
	return v, f.packet(47 * 1348)
}

// BenchmarkCut is the work on one super-packet, with putting it into the slab.
func BenchmarkCut(b *testing.B) {
	v, pkt := superpacket()
	r := room{20, 16}
	slab := make([]byte, slabSize)
	var dst [][]byte
	b.SetBytes(int64(len(pkt)))
	b.ReportAllocs()
	for b.Loop() {
		copy(slab[r.head:], pkt)
		p, _, ok := planCut(slab[r.head:r.head+len(pkt)], v)
		if !ok {
			b.Fatal("not cut")
		}
		dst = cut(dst[:0], slab[:p.space(r)], &p, r)
	}
}

// BenchmarkJoin is the same backwards, without the kernel's part.
func BenchmarkJoin(b *testing.B) {
	v, pkt := superpacket()
	pieces := twinCut(pkt, v)
	b.SetBytes(int64(len(pkt)))
	b.ReportAllocs()
	first := bytes.Clone(pieces[0])
	for b.Loop() {
		copy(pieces[0], first)
		head, l, _ := examine(pieces[0])
		r := startRun(head, &l, true)
		for _, p := range pieces[1:] {
			if !r.add(p) {
				b.Fatal("not joined")
			}
		}
		_ = r.seal(pieces[len(pieces)-1], &l)
	}
}

// benchHost is a device whose host throws away what it is given.
func benchHost(b *testing.B) (*space, *Device) {
	s := newSpace(b)
	d := s.open(Config{Name: "tun0", Headroom: 20, Tailroom: 16})
	s.run(`sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0
		ip addr add 10.0.0.1/24 dev tun0
		ip route add blackhole 192.0.2.0/24`)
	return s, d
}

// BenchmarkWrite gives the kernel a batch of 47 packets: one flow's; those of
// eight flows by turns; or each of another flow, so that nothing can be joined.
func BenchmarkWrite(b *testing.B) {
	v, pkt := superpacket()
	for _, flows := range []int{1, 8, 47} {
		b.Run(fmt.Sprintf("flows=%d", flows), func(b *testing.B) {
			_, d := benchHost(b)
			pieces := twinCut(pkt, v)
			seq := binary.BigEndian.Uint32(pieces[0][24:])
			for i, p := range pieces {
				p[21] += byte(i % flows) // port
				binary.BigEndian.PutUint32(p[24:], seq+uint32(i/flows*1348))
			}
			var fresh [][]byte // what WriteBatch changes
			for _, p := range pieces {
				fresh = append(fresh, bytes.Clone(p[:40]))
			}
			b.SetBytes(int64(len(pkt)))
			b.ReportAllocs()
			for b.Loop() {
				for i, p := range pieces[:flows] {
					copy(p, fresh[i])
				}
				d.WriteBatch(pieces)
			}
			s := d.Stats()
			b.ReportMetric(float64(s.Written.Packets)/float64(s.Written.Messages), "packets/message")
			if s.Drops != [NumDropReasons]uint64{} {
				b.Errorf("drops: %v", s.Drops)
			}
		})
	}
}

// BenchmarkRead takes packets that a socket sends: super-packets of 41 datagrams,
// or single ones. The sender's work counts, too.
func BenchmarkRead(b *testing.B) {
	for name, segment := range map[string]int{"super-packets": 1200, "single": 0} {
		b.Run(name, func(b *testing.B) {
			s, d := benchHost(b)
			c := s.dialUDP("10.0.0.2:9")
			rc, err := c.SyscallConn()
			if err != nil {
				b.Fatal(err)
			}
			size, count := 1200, 1
			if segment > 0 {
				size, count = 1200*41, 41
				_ = rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment) })
				if err != nil {
					b.Fatal(err)
				}
			}
			msg := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(msg); err != nil {
					b.Fatal(err)
				}
				for got := 0; got < count; {
					pkts, err := d.ReadBatch()
					if err != nil && !errors.Is(err, net.ErrClosed) {
						b.Fatal(err)
					}
					got += len(pkts)
				}
			}
		})
	}
}
