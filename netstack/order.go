package netstack

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The order of a batch. When several servers carry a flow, each has a part of its
// segments, and a batch brings one part behind the other; and packets of several
// flows lie between each other. Input puts the segments of a flow together, and
// into the order in which they were sent, as far as they are in one batch, before
// it joins them: fewer runs, and no duplicate acknowledgements where nothing is
// missing.

// orderedFlows is how many flows of a batch are watched; those that come later are
// left as they are.
const orderedFlows = 64

// ordered is a flow whose segments were seen in a batch.
type ordered struct {
	flow        []byte // addresses and ports as they stand in the packet
	next        uint32 // one past the highest byte
	first, last int    // places of its segments
	late        bool   // a segment came after its successor
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
	n     int // flows in use

	// index has the flows by a hash, plus one; 0: none.
	index [4 * orderedFlows]uint8

	// after is the place of the flow's next segment; none: the last. Of a packet
	// that is no segment of a flow that is watched it is alone.
	after []int

	pkts [][]byte

	acks gatherer
}

const none, alone = -1, -2

var sorters = sync.Pool{New: func() any { return new(sorter) }}

// sorted returns the packets in the order in which they are to be processed:
// pkts itself, or a slice of o.
func (o *sorter) sorted(pkts [][]byte) [][]byte {
	if len(pkts) < 2 || !o.disordered(pkts) {
		return pkts
	}
	o.pkts = o.pkts[:0]
	f := 0 // flows appear in the order of their first segments
	for i, b := range pkts {
		switch {
		case o.after[i] == alone:
			o.pkts = append(o.pkts, b)
		case f < o.n && o.flows[f].first == i:
			o.gather(&o.flows[f], pkts)
			f++
		}
	}
	return o.pkts
}

// disordered fills in the flows and reports whether the segments of one are apart,
// or not in order.
func (o *sorter) disordered(pkts [][]byte) (yes bool) {
	if o.n > 0 {
		o.n = 0
		clear(o.index[:])
	}
	o.after = slices.Grow(o.after[:0], len(pkts))[:len(pkts)]
	var f *ordered
	for i, b := range pkts {
		flow, seq, n := plainSegment(b)
		if flow == nil {
			o.after[i] = alone
			continue
		}
		end := seq + uint32(n)
		if f == nil || !bytes.Equal(f.flow, flow) {
			if f = o.find(flow); f == nil {
				o.after[i] = alone
				continue
			}
			if f.flow == nil {
				*f = ordered{flow: flow, next: end, first: i, last: i}
				o.after[i] = none
				continue
			}
		}
		yes = yes || f.last != i-1
		o.after[f.last], o.after[i] = i, none
		f.last = i
		if before(seq, f.next) {
			f.late, yes = true, true
			if before(f.next, end) {
				f.next = end
			}
		} else {
			f.next = end
		}
	}
	return yes
}

// find returns the flow's entry, of which flow is nil if it is new, or nil if there
// are too many.
func (o *sorter) find(flow []byte) *ordered {
	// Ports and the end of the addresses differ most.
	h := binary.BigEndian.Uint64(flow[len(flow)-8:]) * 0x9e3779b97f4a7c15
	for at := h >> 56; ; at = (at + 1) % uint64(len(o.index)) {
		k := int(o.index[at])
		switch {
		case k == 0 && o.n == orderedFlows:
			return nil
		case k == 0:
			o.n++
			o.index[at] = uint8(o.n)
			return &o.flows[o.n-1]
		case bytes.Equal(o.flows[k-1].flow, flow):
			return &o.flows[k-1]
		}
	}
}

// gather appends the segments of f.
func (o *sorter) gather(f *ordered, pkts [][]byte) {
	from := len(o.pkts)
	for i := f.first; i != none; i = o.after[i] {
		o.pkts = append(o.pkts, pkts[i])
	}
	if f.late {
		slices.SortStableFunc(o.pkts[from:], func(a, b []byte) int {
			_, x, _ := plainSegment(a)
			_, y, _ := plainSegment(b)
			return int(int32(x - y))
		})
	}
}

// done gives the working memory back, without the packets.
func (o *sorter) done() {
	clear(o.flows[:o.n])
	clear(o.pkts)
	clear(o.acks.acks[:])
	sorters.Put(o)
}
