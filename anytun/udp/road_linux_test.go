package udp

import (
	"net/netip"
	"testing"
	"time"
)

// The two stages that BenchmarkBatch has together. A batch is 64 datagrams of the
// size that a tunnel with an MTU of 1400 makes: for one endpoint, or each for
// another one, as a server with many clients has them.

const roadBatch = 64

var kernel = implementation{"offload", Listen}

// roadEnds are endpoints on loopback, all of one socket.
func roadEnds(n int, port uint16) []Endpoint {
	list := make([]Endpoint, n)
	for i := range list {
		list[i].Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 0, byte(i + 1)}), port)
	}
	return list
}

// BenchmarkWrite sends batches that end in the buffer of a socket which nobody
// reads.
func BenchmarkWrite(b *testing.B) {
	for name, ends := range map[string]int{"one endpoint": 1, "64 endpoints": roadBatch} {
		b.Run(name, func(b *testing.B) {
			sink := open(b, kernel, families[1].bind, Options{RecvBuffer: 4096})
			c := open(b, kernel, families[0].bind, Options{})
			to := roadEnds(ends, sink.LocalAddr().Port())
			pkts := makePackets(repeat(1436, roadBatch), 0)
			run := roadBatch / ends
			b.SetBytes(1436 * roadBatch)
			b.ReportAllocs()
			for b.Loop() {
				for i, e := range to {
					if err := c.WriteBatch(pkts[i*run:(i+1)*run], e); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*roadBatch), "ns/packet")
		})
	}
}

// BenchmarkRead takes what was sent before, which isn't counted.
func BenchmarkRead(b *testing.B) {
	for name, ends := range map[string]int{"one endpoint": 1, "64 endpoints": roadBatch} {
		b.Run(name, func(b *testing.B) {
			from := open(b, kernel, families[1].bind, Options{})
			c := open(b, kernel, families[0].bind, Options{})
			sources := roadEnds(ends, 0)
			pkts := makePackets(repeat(1436, roadBatch), 0)
			run := roadBatch / ends
			var took time.Duration
			b.SetBytes(1436 * roadBatch)
			b.ReportAllocs()
			for b.Loop() {
				for i, e := range sources {
					to := Endpoint{Addr: c.LocalAddr(), Local: e.Addr.Addr()}
					if err := from.WriteBatch(pkts[i*run:(i+1)*run], to); err != nil {
						b.Fatal(err)
					}
				}
				start := time.Now()
				for n := 0; n < roadBatch; {
					groups, err := c.ReadBatch()
					if err != nil {
						b.Fatal(err)
					}
					for _, g := range groups {
						n += len(g.Packets)
					}
				}
				took += time.Since(start)
			}
			b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/op")
			b.ReportMetric(float64(took.Nanoseconds())/float64(b.N*roadBatch), "ns/packet")
		})
	}
}
