package server

import (
	"bytes"
	"encoding/binary"
)

// Acknowledgements that a later one makes superfluous. When the servers share a
// client's upload packet by packet, segments reach their destination out of
// order, and it acknowledges almost each of them. In a batch from the device most
// of these are history already, and to seal, carry and process them costs about
// as much as the data. So one is left out when another behind it in the batch,
//
//   - a segment without data, too, of the same flow, with the same flags,
//   - acknowledges more, and
//   - covers all blocks that the first reports as received (RFC 2018), by its
//     acknowledgement or by a block of its own.
//
// What has a meaning of its own stays: duplicates of which the last in the batch
// is none that moves on, window updates, reports of duplicate segments (RFC 2883),
// ECN marks that change, options other than timestamps and SACK. The order of what
// stays is that in which it came. (RFC 3449 section 5.2.1 knows this as ACK
// filtering.)

const (
	thinFlows   = 4  // flows of a batch that are looked at
	thinPending = 16 // acknowledgements of each that may still turn out superfluous
	sackMost    = 4  // SACK blocks that fit into a TCP header
)

// thinner finds superfluous acknowledgements in one batch.
type thinner struct {
	flows [thinFlows]thinFlow
	used  int // flows in use
	gone  int // acknowledgements left out
}

type thinFlow struct {
	key     []byte // addresses and ports as they stand in a packet of the batch
	pending [thinPending]pureAck
	n       int
}

// pureAck is what a TCP segment without data says.
type pureAck struct {
	at     int // place in the batch
	flags  uint16
	number uint32
	blocks [sackMost][2]uint32
	n      int
}

// begin prepares for a new batch.
func (t *thinner) begin() {
	for i := range t.flows[:t.used] {
		t.flows[i].key, t.flows[i].n = nil, 0
	}
	t.used, t.gone = 0, 0
}

// add looks at the last packet of list, whose transport header is at l4, and sets
// those that it makes superfluous to nil.
func (t *thinner) add(list [][]byte, l4 int) {
	p := inside(list[len(list)-1])
	var a pureAck
	if !a.parse(p[l4:]) {
		return
	}
	a.at = len(list) - 1
	addresses := 12
	if p[0]>>4 == 6 {
		addresses = 8
	}
	f := t.flow(p[addresses : l4+4])
	if f == nil {
		return
	}
	left := 0
	for i := range f.n {
		if b := &f.pending[i]; a.covers(b) {
			list[b.at] = nil
			t.gone++
		} else {
			f.pending[left] = *b
			left++
		}
	}
	if f.n = left; left == thinPending { // the oldest stays, whatever comes
		copy(f.pending[:], f.pending[1:])
		f.n--
	}
	f.pending[f.n] = a
	f.n++
}

// flow finds a flow's entry, or nil if there are too many.
func (t *thinner) flow(key []byte) *thinFlow {
	for i := range t.flows[:t.used] {
		if bytes.Equal(t.flows[i].key, key) {
			return &t.flows[i]
		}
	}
	if t.used == thinFlows {
		return nil
	}
	f := &t.flows[t.used]
	t.used++
	f.key = key
	return f
}

// end returns list without the superfluous.
func (t *thinner) end(list [][]byte) [][]byte {
	if t.gone == 0 {
		return list
	}
	left := list[:0]
	for _, b := range list {
		if b != nil {
			left = append(left, b)
		}
	}
	clear(list[len(left):])
	return left
}

// parse reads the TCP segment t, whose header is whole. It is false if that is
// more than an acknowledgement.
func (a *pureAck) parse(t []byte) bool {
	const (
		fin, syn, rst, ack, urg           = 1, 2, 4, 16, 32
		end, noOperation, sack, timestamp = 0, 1, 5, 8
	)
	options := t[20 : int(t[12]>>4)*4]
	if len(t) > 20+len(options) || t[13]&(fin|syn|rst|ack|urg) != ack {
		return false
	}
	a.flags = binary.BigEndian.Uint16(t[12:]) & 0x0fff
	a.number = binary.BigEndian.Uint32(t[8:])
	for len(options) > 0 {
		switch {
		case options[0] == noOperation:
			options = options[1:]
			continue
		case options[0] == end:
			return true
		case len(options) < 2 || options[1] < 2 || int(options[1]) > len(options):
			return false
		}
		n := int(options[1])
		switch options[0] {
		case timestamp:
		case sack:
			for b := options[2:n]; len(b) >= 8 && a.n < sackMost; b = b[8:] {
				a.blocks[a.n] = [2]uint32{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}
				a.n++
			}
		default:
			return false
		}
		options = options[n:]
	}
	return true
}

// covers says whether b, which came before a, tells nothing that a doesn't.
func (a *pureAck) covers(b *pureAck) bool {
	if a.flags != b.flags || !seqLess(b.number, a.number) || b.reportsDuplicate() {
		return false
	}
	for _, x := range b.blocks[:b.n] {
		if seqLess(a.number, x[1]) && !a.has(x) {
			return false
		}
	}
	return true
}

// has says whether the bytes of x lie in one of a's blocks.
func (a *pureAck) has(x [2]uint32) bool {
	for _, y := range a.blocks[:a.n] {
		if !seqLess(x[0], y[0]) && !seqLess(y[1], x[1]) {
			return true
		}
	}
	return false
}

// reportsDuplicate says whether the first block is of a segment that had come
// before (RFC 2883 section 4).
func (a *pureAck) reportsDuplicate() bool {
	if a.n == 0 {
		return false
	}
	x := a.blocks[0]
	if seqLess(x[0], a.number) {
		return true
	}
	return a.n > 1 && !seqLess(x[0], a.blocks[1][0]) && !seqLess(a.blocks[1][1], x[1])
}

// seqLess compares sequence numbers (RFC 9293 section 3.4).
func seqLess(a, b uint32) bool { return int32(a-b) < 0 }
