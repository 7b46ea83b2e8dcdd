package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Reordering and the receiver, part two (part one is order.go). A peer takes
// duplicate acknowledgements for loss just as gVisor does. Linux has RACK, but
// with a window of a quarter of the shortest round trip, which grows only by
// DSACK blocks, and those gVisor doesn't send: over roads whose delays differ by
// more, it sees losses everywhere and slows down to nothing. So gVisor's
// duplicate acknowledgements wait here, in the device, before they leave, in the
// same way and with the same bounds as the peer's do in hold.go before gVisor
// sees them:
//
//	WritePackets     flowTable.out
//	complaintLocked  a pure duplicate with SACK is kept, the window starts
//	filledLocked     gVisor acknowledges more: the kept ones are dropped
//	release          the window is over: they leave, and from now on all do,
//	                 until what had arrived then is acknowledged
//
// As long as they don't leave, other packets lack the SACK blocks, too. What these
// would have reported, and those that were dropped, is remembered and said when the
// next are released: gVisor repeats the latest three blocks only, and a peer that
// was never told of the others takes them for lost, which may be most of a window.
//
// Evidence of lateness: the segment that filled the hole bears an older timestamp
// than one behind the hole that came before it, so it was not sent again.
//
// A stack in Forward mode does nothing of this. Its peers are the clients of the
// tunnel, whose devices wait by themselves, and to wait twice costs time and room
// in the receive window.

// muteState is a flow's part.
type muteState struct {
	since int64 // when gVisor first acknowledged the same again, ns; 0: it hasn't
	acks  *heldList

	// newest is the peer's latest timestamp at that time, if known.
	newest uint32

	// untold are the blocks that gVisor has reported and the peer may not know of.
	untold spans

	// open: all leave, until recover is acknowledged.
	open    bool
	recover uint32
}

// openUntil is called when the peer has been told, or will be at once.
func (m *muteState) openUntil(high uint32) {
	m.open, m.recover = true, high
	m.untold = m.untold[:0]
}

// withhold remembers the SACK blocks of a segment that acknowledges ack. It
// reports false if that is too much.
func (m *muteState) withhold(blocks []byte, ack uint32) bool {
	for ; len(blocks) >= 8; blocks = blocks[8:] {
		b := blockOf(blocks)
		if before(ack, b.start) && before(b.start, b.end) && !m.untold.add(b, maxHoles) {
			return false
		}
	}
	return true
}

// complaintLocked decides about p, a segment without data that acknowledges what
// was acknowledged before.
func (t *flowTable) complaintLocked(s *flowSet, f *tcpFlow, p *stack.PacketBuffer, options []byte, now int64) (held bool) {
	n := p.Size()
	blocks := sackBlocks(options)
	if len(blocks) < 8 || n > ackSize {
		return false
	}
	m := &f.mute
	if m.since == 0 {
		m.since, m.newest = now, f.newest
	}
	if m.open {
		return false
	}
	if m.acks == nil {
		_, path := t.path(f)
		if m.acks = t.hold.get(s, &f.key, true, now, now+int64(path.window(now, f.rtt, 0))); m.acks == nil {
			m.openUntil(f.high)
			return false
		}
	}
	c := cursorOf(p)
	c.read(m.acks.next(n))
	if !m.withhold(blocks, f.ack) {
		t.hold.sooner(m.acks, now, now) // the newest acknowledgement of the list has them
	}
	t.counters.heldAcks.Add(1)
	return true
}

// filledLocked notes that gVisor acknowledges more.
func (t *flowTable) filledLocked(f *tcpFlow, ack uint32, now int64) {
	m := &f.mute
	m.untold.cut(ack)
	if m.since != 0 {
		late := m.acks != nil
		if f.ts {
			late = !before(m.newest, f.tsE)
		}
		if late {
			_, path := t.path(f)
			path.late(time.Duration(now-m.since), now)
		}
		m.since = 0
	}
	if m.acks != nil {
		t.counters.heldDropped.Add(uint64(m.acks.n))
		t.hold.remove(m.acks)
		t.hold.put(m.acks)
		m.acks = nil
	}
	if m.open && !before(ack, m.recover) {
		m.open = false
	}
}
