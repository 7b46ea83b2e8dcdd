package netstack

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Reordering and the receiver. When several servers carry a flow, each has a
// part of its segments, and a batch brings one part behind the other. Input puts
// the segments of a flow back into the order in which they were sent, as far as
// they are in one batch, before it joins them: fewer runs, and no duplicate
// acknowledgements where nothing is missing.

// orderedFlows is how many flows of a batch are watched at once.
const orderedFlows = 4

// ordered is a flow whose segments were seen in a batch.
type ordered struct {
	flow []byte // addresses and ports as they stand in the packet
	next uint32 // one past the highest byte
	late bool   // a segment came after its successor
}

// plainSegment looks for TCP data in an IP packet without options, extension
// headers or fragments, and returns what names its flow and where it belongs.
// RST, SYN and URG are not to be moved.
func plainSegment(b []byte) (flow []byte, seq uint32, n int) {
	l4, addrs := header.IPv4MinimumSize, 12
	switch {
	case len(b) >= header.IPv4MinimumSize+header.TCPMinimumSize && b[0] == 0x45:
		if b[9] != protoTCP || b[6]&0x3f != 0 || b[7] != 0 {
			return nil, 0, 0
		}
		n = min(int(binary.BigEndian.Uint16(b[2:])), len(b))
	case len(b) >= header.IPv6MinimumSize+header.TCPMinimumSize && b[0]>>4 == 6 && b[6] == protoTCP:
		l4, addrs = header.IPv6MinimumSize, 8
		n = min(int(binary.BigEndian.Uint16(b[4:]))+l4, len(b))
	default:
		return nil, 0, 0
	}
	if b[l4+13]&^(flagECE|flagCWR|flagPSH|flagFIN) != flagACK {
		return nil, 0, 0
	}
	if n -= l4 + int(b[l4+12]>>4)*4; n <= 0 {
		return nil, 0, 0
	}
	return b[addrs : l4+4], binary.BigEndian.Uint32(b[l4+4:]), n
}

// sorter is the working memory of one batch.
type sorter struct {
	flows [orderedFlows]ordered
	n     int // flows in use, and beyond that, how many were replaced

	pkts [][]byte
	at   []int // places of the flow being sorted
	part [][]byte

	acks gatherer
}

var sorters = sync.Pool{New: func() any { return new(sorter) }}

// sorted returns the packets in the order in which they are to be processed:
// pkts itself, or a slice of o.
func (o *sorter) sorted(pkts [][]byte) [][]byte {
	if !o.disordered(pkts) {
		return pkts
	}
	o.pkts = append(o.pkts[:0], pkts...)
	for i := range min(o.n, orderedFlows) {
		if o.flows[i].late {
			o.sort(o.flows[i].flow)
		}
	}
	return o.pkts
}

// disordered fills in the flows and reports whether one has a late segment.
func (o *sorter) disordered(pkts [][]byte) (late bool) {
	o.n = 0
	var f *ordered
	for _, b := range pkts {
		flow, seq, n := plainSegment(b)
		if flow == nil {
			continue
		}
		if f == nil || !bytes.Equal(f.flow, flow) {
			f = o.find(flow)
		}
		end := seq + uint32(n)
		switch {
		case f.flow == nil:
			*f = ordered{flow: flow, next: end}
		case before(seq, f.next):
			f.late, late = true, true
			if before(f.next, end) {
				f.next = end
			}
		default:
			f.next = end
		}
	}
	return late
}

// find returns the flow's entry; one whose flow is nil is new.
func (o *sorter) find(flow []byte) *ordered {
	for i := range min(o.n, orderedFlows) {
		if bytes.Equal(o.flows[i].flow, flow) {
			return &o.flows[i]
		}
	}
	f := &o.flows[o.n%orderedFlows]
	o.n++
	*f = ordered{}
	return f
}

// sort puts the segments of a flow in order, among the places that they have.
func (o *sorter) sort(flow []byte) {
	o.at, o.part = o.at[:0], o.part[:0]
	for i, b := range o.pkts {
		if f, _, _ := plainSegment(b); f != nil && bytes.Equal(f, flow) {
			o.at = append(o.at, i)
			o.part = append(o.part, b)
		}
	}
	slices.SortStableFunc(o.part, func(a, b []byte) int {
		_, x, _ := plainSegment(a)
		_, y, _ := plainSegment(b)
		return int(int32(x - y))
	})
	for i, b := range o.part {
		o.pkts[o.at[i]] = b
	}
}

// done gives the working memory back, without the packets.
func (o *sorter) done() {
	clear(o.flows[:])
	clear(o.pkts)
	clear(o.part)
	clear(o.acks.acks[:])
	sorters.Put(o)
}
