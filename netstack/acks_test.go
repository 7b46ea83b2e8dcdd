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
	for round := range 3000 {
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
		want := ackTwin(pkts)
		s, c := captureStack()
		s.Input(pkts)
		got := byPort(c.got)
		for port, list := range byPort(want) {
			if len(got[port]) != len(list) {
				t.Fatalf("round %d, flow %d: %d packets, want %d", round, port, len(got[port]), len(list))
			}
			for i := range list {
				if !bytes.Equal(got[port][i], list[i]) {
					t.Fatalf("round %d, flow %d: packet %d is\n%x, want\n%x", round, port, i, got[port][i], list[i])
				}
			}
		}
		if n := int(s.Stats().AcksSuperseded); n != len(pkts)-len(want) || n != len(pkts)-len(c.got) {
			t.Fatalf("round %d: %d of %d are said to be superseded, %d are left, want %d", round, n, len(pkts), len(c.got), len(want))
		}
		left += len(pkts) - len(want)
	}
	if left < 10000 {
		t.Errorf("only %d acknowledgements were left out", left)
	}
}

func byPort(pkts [][]byte) map[uint16][][]byte {
	m := make(map[uint16][][]byte)
	for _, b := range pkts {
		p, _ := parseIP(b)
		port := binary.BigEndian.Uint16(p.payload())
		m[port] = append(m[port], b)
	}
	return m
}

// ackTwin says the same as gatherer, packet by packet. IP options, and one flow more
// than are watched, end what waits of all flows.
func ackTwin(pkts [][]byte) (out [][]byte) {
	gone := make([]bool, len(pkts))
	waits := map[uint16]int{} // the place of the flow's highest
	type ack struct {
		number uint32
		bytes  map[uint32]bool // acknowledged by blocks
	}
	read := func(b []byte) (port uint16, a ack, plain, options bool) {
		p, _ := parseIP(b)
		tcp := p.payload()
		a = ack{binary.BigEndian.Uint32(tcp[8:]), map[uint32]bool{}}
		for o := tcp[20:min(len(tcp), int(tcp[12]>>4)*4)]; len(o) >= 12; o = o[12:] { // one block in each option
			for s := binary.BigEndian.Uint32(o[4:]); s != binary.BigEndian.Uint32(o[8:]); s++ {
				a.bytes[s] = true
			}
		}
		options = p.v4 && p.l4 != 20
		return binary.BigEndian.Uint16(tcp), a, !options && len(tcp) == int(tcp[12]>>4)*4 && tcp[13] == flagACK, options
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
		port, a, plain, options := read(b)
		at, waiting := waits[port]
		switch {
		case options:
			clear(waits)
		case !plain:
			delete(waits, port)
		case !waiting && len(waits) == gatheredFlows:
			clear(waits)
			waits[port] = i
		case !waiting:
			waits[port] = i
		default:
			_, first, _, _ := read(pkts[at])
			switch {
			case knows(a, first):
				gone[at] = true
			case knows(first, a) && first.number != a.number:
				gone[i] = true
				continue
			}
			waits[port] = i
		}
	}
	for i, b := range pkts {
		if !gone[i] {
			out = append(out, b)
		}
	}
	return out
}
