package netstack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// What reaches gVisor of a flow is what arrived, in that order, but for plain
// acknowledgements of which another one, with nothing else of the flow between
// them, tells all and more.
func TestAcksAgainstTwin(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	left := 0
	for range 3000 {
		flows := 1 + rng.IntN(12)
		numbers := make([]uint32, flows)
		var pkts [][]byte
		for range 1 + rng.IntN(40) {
			i := rng.IntN(flows)
			numbers[i] += uint32(rng.IntN(3)) * 1000
			spec := tcpSpec{v4: i%2 == 0, ttl: 64, sport: uint16(i), flags: flagACK, ack: numbers[i], window: 77}
			switch rng.IntN(16) {
			case 0:
				spec.payload = []byte("data")
			case 1:
				spec.flags |= flagRST
			case 2:
				spec.flags |= flagECE
			case 3, 4, 5:
				start := spec.ack + uint32(rng.IntN(4))*500
				spec.options = []byte{1, 1, 5, 10}
				spec.options = binary.BigEndian.AppendUint32(spec.options, start)
				spec.options = binary.BigEndian.AppendUint32(spec.options, start+uint32(1+rng.IntN(3))*500)
			case 6:
				spec.ack -= 1500 // it took another road
			case 7:
				spec.ipOptions = spec.v4
			}
			pkts = append(pkts, tcpPacket(spec))
		}
		inOrder, _ := orderTwin(pkts)
		want := ackTwin(inOrder)
		s, c := captureStack()
		s.Input(pkts)
		sameFlows(t, c.got, want)
		if n := int(s.Stats().AcksSuperseded); n != len(pkts)-len(want) || n != len(pkts)-len(c.got) {
			t.Fatalf("%d of %d are said to be superseded, %d are left, want %d", n, len(pkts), len(c.got), len(want))
		}
		left += len(pkts) - len(want)
	}
	if left < 10000 {
		t.Errorf("only %d acknowledgements were left out", left)
	}
}

// sameFlows compares what reached gVisor of each flow. Between flows there is no
// order.
func sameFlows(t *testing.T, got, want [][]byte) {
	t.Helper()
	g, w := byFlow(got), byFlow(want)
	if len(got) != len(want) {
		t.Errorf("%d packets, want %d", len(got), len(want))
	}
	for key, list := range w {
		if len(g[key]) != len(list) {
			t.Fatalf("flow %x: %d packets, want %d", key, len(g[key]), len(list))
		}
		for i := range list {
			if !bytes.Equal(g[key][i], list[i]) {
				t.Fatalf("flow %x: packet %d of %d is\n%.80x, want\n%.80x", key, i, len(list), g[key][i], list[i])
			}
		}
	}
}

func byFlow(pkts [][]byte) map[uint32][][]byte {
	m := make(map[uint32][][]byte)
	for _, b := range pkts {
		m[flowOf(b)] = append(m[flowOf(b)], b)
	}
	return m
}

// flowOf tells flows apart that tests send: by version and source port.
func flowOf(b []byte) uint32 {
	p, _ := parseIP(b)
	return uint32(b[0]>>4)<<16 | uint32(binary.BigEndian.Uint16(p.payload()))
}

// ackTwin says the same as gatherer, packet by packet. IP options, fragments, and one
// flow more than are watched, end what waits of all flows.
func ackTwin(pkts [][]byte) (out [][]byte) {
	gone := make([]bool, len(pkts))
	waits := map[uint32]int{} // the place of the flow's highest
	type ack struct {
		number uint32
		bytes  map[uint32]bool // acknowledged by blocks
	}
	read := func(b []byte) (a ack, plain, options bool) {
		p, _ := parseIP(b)
		tcp := p.payload()
		a = ack{binary.BigEndian.Uint32(tcp[8:]), map[uint32]bool{}}
		for o := tcp[20:min(len(tcp), int(tcp[12]>>4)*4)]; len(o) >= 12 && o[2] == 5; o = o[12:] { // one block in each option
			for s := binary.BigEndian.Uint32(o[4:]); s != binary.BigEndian.Uint32(o[8:]); s++ {
				a.bytes[s] = true
			}
		}
		options = p.v4 && p.l4 != 20 || p.frag
		return a, !options && len(tcp) == int(tcp[12]>>4)*4 && tcp[13]&^flagPSH == flagACK, options
	}
	// knows: a tells all that b does.
	knows := func(a, b ack) bool {
		for s := range b.bytes {
			if int32(s-a.number) >= 0 && !a.bytes[s] {
				return false
			}
		}
		return int32(a.number-b.number) > 0 || a.number == b.number && len(a.bytes) > 0 && len(b.bytes) > 0
	}
	for i, b := range pkts {
		a, plain, options := read(b)
		flow := flowOf(b)
		at, waiting := waits[flow]
		switch {
		case options:
			clear(waits)
		case !plain:
			delete(waits, flow)
		case !waiting && len(waits) == gatheredFlows:
			clear(waits)
			waits[flow] = i
		case !waiting:
			waits[flow] = i
		default:
			first, _, _ := read(pkts[at])
			switch {
			case knows(a, first):
				gone[at] = true
			case knows(first, a) && first.number != a.number:
				gone[i] = true
				continue
			}
			waits[flow] = i
		}
	}
	for i, b := range pkts {
		if !gone[i] {
			out = append(out, b)
		}
	}
	return out
}
