package server

import (
	"context"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/netstack"
)

// The stages of the road that have no benchmark beside their tests: inward from
// the device, and all of the egress by the host's sockets.

// BenchmarkTunIn is the road from the device to packets for a client, unsealed.
func BenchmarkTunIn(b *testing.B) {
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{tunEgress4}, nil, netip.Prefix{})
	if err != nil {
		b.Fatal(err)
	}
	got := 0
	e := newTunEgress(tunConfig{
		Device: discard{}, Plan: &plan, Leases: new(portblock.Leases), Inner: testInner,
		AnyPort: func(uint32) bool { return false }, MTU: 1400, Policy: newEgressPolicy(nil, false),
		Output: func(bufs [][]byte) { got += len(bufs) },
	})
	const batch = 44
	fresh := datagram(packet.UDP, netip.AddrPortFrom(tunWorld4, 80), netip.AddrPortFrom(tunEgress4, port2), 1300)
	list := make([][]byte, batch)
	for i := range list {
		list[i] = room(len(fresh))
		copy(inside(list[i]), fresh)
	}
	b.SetBytes(int64(batch * len(fresh)))
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range list {
			copy(inside(p)[:28], fresh)
		}
		e.fromDevice(list)
	}
	if got != b.N*batch {
		b.Fatalf("%d of %d packets: %v", got, b.N*batch, e.stats().Drops)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}

// socketsRoad is a sockets egress and a client's netstack, back to back.
type socketsRoad struct {
	e      *sockets
	client *netstack.Stack
	out    func(pkts [][]byte) // what the egress sends; nil: to the client
}

func newSocketsRoad(b *testing.B, dns ...netip.AddrPort) *socketsRoad {
	b.Helper()
	r := new(socketsRoad)
	up, down := make(chan [][]byte, 4096), make(chan [][]byte, 4096)
	through := func(ch chan<- [][]byte) func([][]byte) {
		return func(bufs [][]byte) {
			list := make([][]byte, len(bufs))
			for i, p := range bufs {
				list[i] = slices.Clone(p[egressTestHead : len(p)-egressTestTail])
			}
			ch <- list
		}
	}
	toClient := through(down)
	var err error
	dir := b.TempDir()
	r.e, err = newSockets(socketsConfig{
		MTU: egressTestMTU, Headroom: egressTestHead, Tailroom: egressTestTail,
		Gateway: []netip.Addr{egressGate4}, ClientOf: egressClientOf, AllowLocal: true, DNS: dns,
		Output: func(bufs [][]byte) {
			if r.out != nil {
				r.out(bufs)
				return
			}
			toClient(bufs)
		},
		host: dnsHostFiles{Hosts: filepath.Join(dir, "hosts"), ResolvConf: filepath.Join(dir, "resolv.conf")},
	})
	if err != nil {
		b.Fatal(err)
	}
	r.client, err = netstack.New(netstack.Config{
		MTU: egressTestMTU, Headroom: egressTestHead, Tailroom: egressTestTail, Output: through(up),
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := r.client.SetAddresses([]netip.Addr{egressClient4}); err != nil {
		b.Fatal(err)
	}
	for _, way := range []struct {
		ch <-chan [][]byte
		to func([][]byte)
	}{{up, r.e.Input}, {down, r.client.Input}} {
		go func() {
			for list := range way.ch {
				way.to(list)
			}
		}()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.e.Run(ctx) }()
	egressUntil(b, "the egress to run", r.e.running.Load)
	b.Cleanup(func() {
		r.client.Close()
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
		close(up)
		close(down)
	})
	return r
}

// BenchmarkSocketsTCP moves 64 KiB between a client's netstack and a host's socket.
func BenchmarkSocketsTCP(b *testing.B) {
	for _, down := range []bool{false, true} {
		name := map[bool]string{false: "up", true: "down"}[down]
		b.Run(name, func(b *testing.B) {
			r := newSocketsRoad(b)
			ln, to := egressListenTCP(b, "127.0.0.1:0")
			c, err := r.client.DialTCP(b.Context(), to)
			if err != nil {
				b.Fatal(err)
			}
			h := egressAccept(b, ln)
			var from io.Writer = c
			var at io.Reader = h
			if down {
				from, at = h, c
			}
			_ = h.SetDeadline(time.Now().Add(time.Minute))
			const size = 64 << 10
			b.SetBytes(size)
			b.ReportAllocs()
			go func() {
				buf := make([]byte, size)
				for range b.N {
					if _, err := from.Write(buf); err != nil {
						return
					}
				}
			}()
			buf := make([]byte, size)
			for left := b.N * size; left > 0; {
				n, err := at.Read(buf)
				if err != nil {
					b.Fatal(err)
				}
				left -= n
			}
		})
	}
}

// BenchmarkSocketsDial is a TCP connection from a client's netstack through the
// egress to a socket that listens, made and reset.
func BenchmarkSocketsDial(b *testing.B) {
	r := newSocketsRoad(b)
	ln, to := egressListenTCP(b, "127.0.0.1:0")
	_ = ln.SetDeadline(time.Time{})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	b.ReportAllocs()
	for b.Loop() {
		c, err := r.client.DialTCP(b.Context(), to)
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Abort()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
}

// BenchmarkSocketsUDP is a batch of datagrams of one flow out by a host's socket, and
// the answers in.
func BenchmarkSocketsUDP(b *testing.B) {
	r := newSocketsRoad(b)
	echo, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer echo.Close()
	_ = echo.SetReadBuffer(1 << 20)
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	const batch = 32
	came := make(chan int, 1024)
	r.out = func(bufs [][]byte) { came <- len(bufs) }
	p := datagram(packet.UDP, netip.AddrPortFrom(egressClient4, 5000), echo.LocalAddr().(*net.UDPAddr).AddrPort(), 1200)
	list := make([][]byte, batch)
	for i := range list {
		list[i] = p
	}
	b.SetBytes(batch * 1200)
	b.ReportAllocs()
	for b.Loop() {
		r.e.Input(list)
		for n := 0; n < batch; {
			select {
			case k := <-came:
				n += k
			case <-time.After(time.Second):
				b.Fatalf("%d of %d answers came: %+v", n, batch, r.e.Stats())
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}

// BenchmarkDNS is a client's question to a gateway address, whose answer is in the
// cache, or asked of an upstream on loopback.
func BenchmarkDNS(b *testing.B) {
	for _, ttl := range []uint32{3600, 0} {
		name := map[bool]string{true: "cached", false: "asked"}[ttl > 0]
		b.Run(name, func(b *testing.B) {
			up := newDNSServer(b, func(s *dnsServer, q dnsmessage.Message, _ bool) []byte {
				return s.reply(q, func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{dnsA(q, ttl, 192, 0, 2, 1)} })
			})
			r := newSocketsRoad(b, up.at)
			came := make(chan struct{}, 16)
			r.out = func([][]byte) { came <- struct{}{} }
			q := question(b, "www.example.org.", dnsmessage.TypeA)
			p := datagram(packet.UDP, netip.AddrPortFrom(egressClient4, 5000), dnsGate(), len(q))
			copy(p[28:], q)
			list := [][]byte{p}
			b.ReportAllocs()
			for b.Loop() {
				r.e.Input(list)
				<-came
			}
		})
	}
}
