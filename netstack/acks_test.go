package netstack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// What reaches gVisor of a flow is what arrived, in that order, but for plain
// acknowledgements that a higher one follows, or goes before, with nothing else of
// the flow between them.
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
			case 3:
				spec.options = []byte{1, 1, 5, 10, 0, 0, 0, 9, 0, 0, 0, 12}
			case 4:
				spec.ack -= 1500 // it took another road
			case 5:
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
	for i, b := range pkts {
		p, _ := parseIP(b)
		tcp := p.payload()
		port, ack := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint32(tcp[8:])
		options := p.v4 && p.l4 != 20
		plain := !options && len(tcp) == 20 && tcp[13] == flagACK
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
		case int32(ack-binary.BigEndian.Uint32(pkts[at][len(pkts[at])-12:])) < 0:
			gone[i] = true
		default:
			gone[at] = binary.BigEndian.Uint32(pkts[at][len(pkts[at])-12:]) != ack
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
