package server

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// What a packet costs a server when many clients talk to it at once.

// growthBatch is how many packets are in hand at once.
const growthBatch = 64

// growthRig is a server with clients 1 to n, all of which have a session.
type growthRig struct {
	*Server
	in       *receiver
	sessions []*session.Granted // each client's side
	ends     []udp.Endpoint     // where it is
	public   []netip.AddrPort   // one of its ports
	order    []int
	at       int
}

// clientEnd is client i's outer endpoint, of which loopback has enough.
func clientEnd(i int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), port)
}

// newGrowthRig makes one that hears its clients at conn, where they send from the
// given port.
func newGrowthRig(b *testing.B, n int, conn udp.Conn, port uint16) *growthRig {
	b.Helper()
	now := time.Now()
	cluster, err := session.NewCluster(now)
	if err != nil {
		b.Fatal(err)
	}
	list := make([]Enrolment, n)
	for i := range list {
		list[i] = Enrolment{Name: fmt.Sprint("client", i+1), Number: uint32(i + 1)}
		binary.BigEndian.PutUint32(list[i].Key[:], uint32(i+1))
	}
	blocks := portblock.Blocks{}
	addresses := make([]netip.Addr, blocks.Addresses(uint32(n)))
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
	}
	plan, err := portblock.NewPlan(blocks, addresses, nil, netip.Prefix{})
	if err != nil {
		b.Fatal(err)
	}
	s, err := New(Config{
		Conns: []udp.Conn{conn}, Cluster: cluster, Clients: NewDirectory(list), Device: discard{}, Plan: plan,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.egress.(*tunEgress).Services.stack.Close() })
	r := &growthRig{Server: s, in: &receiver{Server: s, conn: conn}}
	for i := range n {
		r.sessions = append(r.sessions, granted(b, cluster, uint32(i+1), now))
		r.ends = append(r.ends, udp.Endpoint{Addr: clientEnd(i, port), Local: conn.LocalAddr().Addr()})
		place, _ := plan.Of(uint32(i + 1))
		r.public = append(r.public, netip.AddrPortFrom(place.IPv4, place.First+7))
	}
	r.turns(n)
	for i := range n { // the first packet of each derives its session
		p := r.outward(i, 64)
		r.sessions[i].Seal([][]byte{p})
		r.pass([]udp.Group{{From: r.ends[i], Packets: [][]byte{p}}})
	}
	return r
}

// turns lets the first n clients take their turns in a random order.
func (r *growthRig) turns(n int) { r.order, r.at = rand.New(rand.NewPCG(1, uint64(n))).Perm(n), 0 }

func (r *growthRig) next() int {
	i := r.order[r.at]
	if r.at++; r.at == len(r.order) {
		r.at = 0
	}
	return i
}

// outward is a packet of client i to the world, with n bytes of payload, unsealed.
func (r *growthRig) outward(i, n int) []byte {
	p := datagram(17, netip.AddrPortFrom(r.inner.IPv4(uint32(i+1)), r.public[i].Port()), netip.AddrPortFrom(testWorld, 80), n)
	return slices.Concat(make([]byte, wire.DataHeaderLen), p, make([]byte, wire.TagLen))
}

// pass is what receiveLoop does with what it has read.
func (r *growthRig) pass(groups []udp.Group) {
	r.in.now = time.Now()
	r.in.egress, r.in.peers = r.in.egress[:0], r.in.peers[:0]
	for i := range groups {
		r.in.group(&groups[i])
	}
	if len(r.in.egress) > 0 {
		r.egress.Input(r.in.egress)
	}
}

// growthLoad is how packets of many clients mix: of how many of them, and how
// many of one come in a row.
type growthLoad struct {
	name             string
	active, size, in int
}

func growthLoads(n int) []growthLoad {
	return []growthLoad{
		{"runs", n, 1300, 16}, {"single", n, 1300, 1}, {"small", n, 64, 1}, {"few", min(n, 10), 1300, 1},
	}
}

// BenchmarkGrowth is a packet of so many clients that talk at once. An operation
// is a packet, from opening it to the device (receive) or from the device to a
// sealed datagram (send). All clients have their turns in a random order, or 10 of
// them (few); packets come alone, each of another client, or in runs. What is
// measured between 10 clients and 1,000 is caches; between 1 and 10 of single
// packets, that 64 packets of one are one batch.
func BenchmarkGrowth(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			r := newGrowthRig(b, n, nowhere{}, 4444)
			for _, l := range growthLoads(n) {
				b.Run("receive/"+l.name, func(b *testing.B) { r.receive(b, l, nil) })
			}
			for _, l := range growthLoads(n) {
				b.Run("send/"+l.name, func(b *testing.B) { r.send(b, l) })
			}
		})
	}
}

// BenchmarkGrowthUDP is the same with the kernel's part of a datagram, over
// loopback, where sending ends in the buffer of a socket that nobody reads.
func BenchmarkGrowthUDP(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			conn, err := udp.Listen(netip.MustParseAddrPort("127.0.0.1:0"), udp.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			clients, err := udp.Listen(netip.MustParseAddrPort("0.0.0.0:0"), udp.Options{RecvBuffer: 4096})
			if err != nil {
				b.Fatal(err)
			}
			defer clients.Close()
			r := newGrowthRig(b, n, conn, clients.LocalAddr().Port())
			for _, l := range growthLoads(n) {
				b.Run("receive/"+l.name, func(b *testing.B) { r.receive(b, l, clients) })
			}
			for _, l := range growthLoads(n) {
				b.Run("send/"+l.name, func(b *testing.B) { r.send(b, l) })
			}
		})
	}
}

// receive measures the way in: if the clients have a socket, from reading the
// server's on.
func (r *growthRig) receive(b *testing.B, l growthLoad, clients udp.Conn) {
	r.turns(l.active)
	fresh := make([][]byte, l.active)
	for _, i := range r.order {
		fresh[i] = r.outward(i, l.size)
	}
	bufs := make([][]byte, growthBatch)
	for i := range bufs {
		bufs[i] = make([]byte, len(fresh[0]))
	}
	groups := make([]udp.Group, 0, growthBatch)
	before, _ := r.Tun()
	b.SetBytes(int64(l.size))
	b.ReportAllocs()
	b.ResetTimer()
	var took time.Duration
	sent := 0
	for ; sent < b.N || sent == 0; sent += growthBatch {
		groups = groups[:0]
		for at := 0; at < growthBatch; at += l.in {
			i := r.next()
			run := bufs[at : at+l.in]
			for _, p := range run {
				copy(p, fresh[i])
			}
			r.sessions[i].Seal(run)
			if k := len(groups) - 1; k >= 0 && groups[k].From == r.ends[i] {
				groups[k].Packets = groups[k].Packets[:len(groups[k].Packets)+l.in]
				continue
			}
			groups = append(groups, udp.Group{From: r.ends[i], Packets: run[:l.in:cap(bufs[at:])]})
		}
		if clients == nil {
			start := time.Now()
			r.pass(groups)
			took += time.Since(start)
			continue
		}
		for _, g := range groups {
			to := udp.Endpoint{Addr: r.in.conn.LocalAddr(), Local: g.From.Addr.Addr()}
			if err := clients.WriteBatch(g.Packets, to); err != nil {
				b.Fatal(err)
			}
		}
		start := time.Now()
		for n := 0; n < growthBatch; {
			got, err := r.in.conn.ReadBatch()
			if err != nil {
				b.Fatal(err)
			}
			for i := range got {
				n += len(got[i].Packets)
			}
			r.pass(got)
		}
		took += time.Since(start)
	}
	if st, _ := r.Tun(); st.PacketsOut-before.PacketsOut != uint64(sent) {
		b.Fatalf("%d of %d packets went out: %v, %v", st.PacketsOut-before.PacketsOut, sent, st.Drops, r.Stats().Drops)
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(sent), "ns/op")
}

// send measures the way back.
func (r *growthRig) send(b *testing.B, l growthLoad) {
	r.turns(l.active)
	fresh := make([][]byte, l.active)
	for _, i := range r.order {
		fresh[i] = datagram(17, netip.AddrPortFrom(testWorld, 80), r.public[i], l.size)
	}
	bufs := make([][]byte, growthBatch)
	block := make([]byte, growthBatch*(wire.Overhead+len(fresh[0]))) // as the device gives them
	for i := range bufs {
		n := wire.Overhead + len(fresh[0])
		bufs[i] = block[i*n : (i+1)*n : (i+1)*n]
	}
	before := r.Stats().SentPackets
	b.SetBytes(int64(l.size))
	b.ReportAllocs()
	b.ResetTimer()
	var took time.Duration
	sent := 0
	for ; sent < b.N || sent == 0; sent += growthBatch {
		for at := 0; at < growthBatch; at += l.in {
			i := r.next()
			for _, p := range bufs[at : at+l.in] {
				copy(inside(p), fresh[i])
			}
		}
		start := time.Now()
		r.egress.(*tunEgress).fromDevice(bufs)
		took += time.Since(start)
	}
	if n := r.Stats().SentPackets - before; n != uint64(sent) {
		b.Fatalf("%d of %d packets were sent: %v", n, sent, r.Stats().Drops)
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(sent), "ns/op")
}
