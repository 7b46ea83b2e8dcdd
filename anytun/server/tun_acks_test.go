package server

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/anytun-go/anytun/anytun/packet"
)

// ackPacket makes a segment without data. Blocks are pairs of edges.
func ackPacket(v6 bool, port uint16, number uint32, options []byte, blocks ...uint32) []byte {
	from, to := tunWorld4, tunEgress4
	if v6 {
		from, to = tunWorld6, tunEgress6
	}
	options = slices.Clone(options)
	if len(blocks) > 0 {
		options = append(options, 1, 1, 5, byte(2+4*len(blocks)))
		for _, b := range blocks {
			options = binary.BigEndian.AppendUint32(options, b)
		}
	}
	p := ipPacket(from, to, 20+len(options))
	t := p[len(p)-20-len(options):]
	p[map[bool]int{false: 9, true: 6}[v6]] = byte(packet.TCP)
	binary.BigEndian.PutUint16(t, 80)
	binary.BigEndian.PutUint16(t[2:], port)
	binary.BigEndian.PutUint32(t[8:], number)
	t[12], t[13] = byte(5+len(options)/4)<<4, packet.ACK
	copy(t[20:], options)
	return summed(p)
}

func changed(p []byte, at int, to byte) []byte {
	p = slices.Clone(p)
	p[at] = to
	return summed(p)
}

// fromKernel gives the egress a batch and returns which of it clients were given.
func (r *tunRig) fromKernel(pkts [][]byte) (kept []int) {
	r.t.Helper()
	bufs := make([][]byte, len(pkts))
	for i, p := range pkts {
		bufs[i] = room(len(p))
		copy(inside(bufs[i]), p)
	}
	given := slices.Clone(bufs)
	e := r.tunEgress
	output := e.Output
	e.Output = func(list [][]byte) {
		for _, b := range list {
			kept = append(kept, slices.IndexFunc(given, func(g []byte) bool { return &g[0] == &b[0] }))
		}
	}
	e.fromDevice(bufs)
	e.Output = output
	return kept
}

var stamps = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}

func TestThinAcks(t *testing.T) {
	r := newTunRig(t)
	for _, v6 := range []bool{false, true} {
		ack := func(number uint32, blocks ...uint32) []byte {
			return ackPacket(v6, port2, number, stamps, blocks...)
		}
		l4 := 20
		if v6 {
			l4 = 40
		}
		data := datagram(packet.TCP, netip.AddrPortFrom(tunWorld4, 80), netip.AddrPortFrom(tunEgress4, port2), 10)
		data[33] = packet.ACK
		other := datagram(packet.UDP, netip.AddrPortFrom(tunWorld4, 80), netip.AddrPortFrom(tunEgress4, port2), 10)
		for _, c := range []struct {
			name string
			pkts [][]byte
			kept []int
		}{
			{"one", [][]byte{ack(1)}, []int{0}},
			{"progress", [][]byte{ack(1), ack(2), ack(9)}, []int{2}},
			{"over the end of the numbers", [][]byte{ack(1<<32 - 5), ack(3)}, []int{1}},
			{"late", [][]byte{ack(9), ack(2)}, []int{0, 1}},
			{"duplicates", [][]byte{ack(9), ack(9), ack(9)}, []int{0, 1, 2}},
			{"duplicates that are passed", [][]byte{ack(5), ack(5, 7, 8), ack(5, 7, 9), ack(9)}, []int{3}},
			{"block passed in part", [][]byte{ack(5, 7, 20), ack(9)}, []int{0, 1}},
			{"block repeated", [][]byte{ack(5, 17, 20), ack(9, 17, 20)}, []int{1}},
			{"block grown", [][]byte{ack(5, 17, 20), ack(9, 16, 25)}, []int{1}},
			{"block shrunk", [][]byte{ack(5, 17, 20), ack(9, 18, 20)}, []int{0, 1}},
			{"one block of two", [][]byte{ack(5, 17, 20, 12, 14), ack(9, 17, 20)}, []int{0, 1}},
			{"found later", [][]byte{ack(5, 17, 20), ack(6), ack(20)}, []int{2}},
			{"segment that came twice", [][]byte{ack(5, 1, 2), ack(9)}, []int{0, 1}},
			{"segment behind the hole that came twice", [][]byte{ack(5, 7, 8, 6, 9), ack(9)}, []int{0, 1}},
			{"other flow", [][]byte{ack(1), ackPacket(v6, port2+1, 9, stamps)}, []int{0, 1}},
			{"other flow between", [][]byte{ack(1), ackPacket(v6, port2+1, 9, stamps), ack(2)}, []int{1, 2}},
			{"data between", [][]byte{ack(1), data, other, ack(2)}, []int{1, 2, 3}},
			{"no options", [][]byte{ackPacket(v6, port2, 1, nil), ackPacket(v6, port2, 2, nil)}, []int{1}},
			{"end of options", [][]byte{ackPacket(v6, port2, 1, []byte{0, 9, 9, 9}), ack(2)}, []int{1}},
			{"unknown option", [][]byte{ackPacket(v6, port2, 1, []byte{30, 4, 0, 0}), ack(2)}, []int{0, 1}},
			{"unknown option behind", [][]byte{ack(1), ackPacket(v6, port2, 2, []byte{30, 4, 0, 0})}, []int{0, 1}},
			{"bad options", [][]byte{ackPacket(v6, port2, 1, []byte{8, 10, 0, 0}), ack(2)}, []int{0, 1}},
			{"option of no length", [][]byte{ackPacket(v6, port2, 1, []byte{8, 0, 0, 0}), ack(2)}, []int{0, 1}},
			{"ece", [][]byte{changed(ack(1), l4+13, packet.ACK|0x40), ack(2)}, []int{0, 1}},
			{"ece both", [][]byte{changed(ack(1), l4+13, packet.ACK|0x40), changed(ack(2), l4+13, packet.ACK|0x40)}, []int{1}},
			{"accurate ecn", [][]byte{changed(ack(1), l4+12, ack(1)[l4+12]|1), ack(2)}, []int{0, 1}},
			{"fin", [][]byte{ack(1), changed(ack(2), l4+13, packet.ACK|packet.FIN)}, []int{0, 1}},
			{"rst", [][]byte{changed(ack(1), l4+13, packet.ACK|packet.RST), ack(2)}, []int{0, 1}},
			{"urg", [][]byte{changed(ack(1), l4+13, packet.ACK|packet.URG), ack(2)}, []int{0, 1}},
		} {
			before := r.stats()
			if kept := r.fromKernel(c.pkts); !slices.Equal(kept, c.kept) {
				t.Errorf("v6 %v, %s: %v were given on, want %v", v6, c.name, kept, c.kept)
			}
			after := r.stats()
			if n := after.Superfluous - before.Superfluous; n != uint64(len(c.pkts)-len(c.kept)) {
				t.Errorf("v6 %v, %s: counted %d", v6, c.name, n)
			}
			if n := after.PacketsIn - before.PacketsIn; n != uint64(len(c.pkts)) {
				t.Errorf("v6 %v, %s: counted %d in", v6, c.name, n)
			}
		}
	}
}

// More flows and more acknowledgements than are remembered pass.
func TestThinAcksBounds(t *testing.T) {
	r := newTunRig(t)
	var pkts [][]byte
	for range 2 {
		for port := range uint16(thinFlows + 2) {
			pkts = append(pkts, ackPacket(false, port2+port, uint32(len(pkts)), nil))
		}
	}
	if kept := r.fromKernel(pkts); len(kept) != len(pkts)-thinFlows {
		t.Errorf("%d of %d flows' acknowledgements were left out, want %d", len(pkts)-len(kept), thinFlows+2, thinFlows)
	}
	pkts = pkts[:0]
	for range 2 * thinPending {
		pkts = append(pkts, ackPacket(false, port2, 1, nil))
	}
	pkts = append(pkts, ackPacket(false, port2, 2, nil))
	if kept := r.fromKernel(pkts); len(kept) != len(pkts)-thinPending {
		t.Errorf("%d were given on of %d duplicates and one more, want %d", len(kept), 2*thinPending, len(pkts)-thinPending)
	}
}

// scoreboard is what a sender knows, byte by byte.
type scoreboard struct {
	acked uint32
	has   map[uint32]bool
}

func (s *scoreboard) take(a *pureAck) {
	s.acked = max(s.acked, a.number)
	for _, b := range a.blocks[:a.n] {
		for n := b[0]; n < b[1]; n++ {
			s.has[n] = true
		}
	}
}

func (s *scoreboard) String() string {
	var list []uint32
	for n := range s.has {
		if n >= s.acked {
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return fmt.Sprint(s.acked, list)
}

// TestThinTwin has a receiver of segments in random order acknowledge each. After
// a batch the sender must know the same as if nothing had been left out.
func TestThinTwin(t *testing.T) {
	r := newTunRig(t)
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	given, left := 0, 0
	for round := range 200 {
		// Two servers, one ahead of the other, and sometimes loss.
		const first = 1000
		var order []uint32
		ahead, behind := []uint32{}, []uint32{}
		for n := range uint32(60) {
			switch random.IntN(20) {
			case 0:
				if round%4 > 0 {
					ahead = append(ahead, first+n)
				}
			case 1, 2, 3, 4, 5, 6, 7, 8, 9:
				ahead = append(ahead, first+n)
			default:
				behind = append(behind, first+n)
			}
		}
		for skew := random.IntN(20); len(ahead)+len(behind) > 0; skew-- {
			if from := &ahead; len(*from) > 0 && (skew > 0 || len(behind) == 0 || random.IntN(2) == 0) {
				order, *from = append(order, (*from)[0]), (*from)[1:]
			} else {
				order, behind = append(order, behind[0]), behind[1:]
			}
		}
		got := map[uint32]bool{}
		number := uint32(first)
		all, kept := scoreboard{has: map[uint32]bool{}}, scoreboard{has: map[uint32]bool{}}
		var recent []uint32 // what came last, for the order of the blocks
		var pkts [][]byte
		for i, n := range order {
			got[n] = true
			for got[number] {
				number++
			}
			recent = append(recent, n)
			var blocks []uint32
			for j := len(recent) - 1; j >= 0 && len(blocks) < 6; j-- {
				lo, hi := recent[j], recent[j]
				for got[lo-1] {
					lo--
				}
				for got[hi] {
					hi++
				}
				if lo >= number && !slices.Contains(blocks, lo) {
					blocks = append(blocks, lo, hi)
				}
			}
			pkts = append(pkts, ackPacket(false, port2, number, stamps, blocks...))
			if random.IntN(30) > 0 && i < len(order)-1 {
				continue
			}
			places := r.fromKernel(pkts)
			if !slices.IsSorted(places) || places[len(places)-1] != len(pkts)-1 {
				t.Fatalf("seed %d: given on: %v of %d", seed, places, len(pkts))
			}
			for i, p := range pkts {
				var a pureAck
				if !a.parse(p[20:]) {
					t.Fatal("not an acknowledgement")
				}
				all.take(&a)
				if slices.Contains(places, i) {
					kept.take(&a)
				}
			}
			if all.String() != kept.String() {
				t.Fatalf("seed %d: without %d of %d the sender knows %v, else %v", seed, len(pkts)-len(places), len(pkts), &kept, &all)
			}
			given, left = given+len(pkts), left+len(places)
			pkts = pkts[:0]
		}
	}
	if left*2 > given {
		t.Errorf("%d of %d are left: that isn't worth it", left, given)
	}
}
