package netstack

import (
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A few losses are no congestion. gVisor halves its window, nearly, for every
// lost segment, and a path that loses one segment in a thousand for reasons of
// its own keeps it at a few megabytes per second, whatever the path could carry.
// And while gVisor recovers it looks at every segment in flight for every
// acknowledgement. So the device mends small losses itself: it keeps the packets
// that a connection has in flight, and when the acknowledgements that hold.go
// keeps have waited long enough, it sends again what they say is missing, instead
// of telling gVisor. The acknowledgement that follows finds gVisor in the belief
// that the segment was late.
//
//	out               sendLog.add: new data that leaves is kept, by reference
//	in                sendLog.reported: SACK blocks make and fill holes
//	releaseHeld       mend: holes that are old enough are sent again
//	advancedLocked    sendLog.acked: what is acknowledged is let go
//
// What is hidden from gVisor is bounded, so that congestion is answered:
//
//   - no more than one byte in hideShare of those that arrive, averaged over a
//     round trip or so. BBR has the same limit (draft-ietf-ccwg-bbr, BBR.LossThresh).
//     What gVisor is told of doesn't count.
//   - nothing while the round trip says that a queue is filling up on the path:
//     then gVisor gets every loss, as it would without all this.
//   - nothing for so long that gVisor's retransmission timer would run out.
//
// Beyond, the acknowledgements are released and gVisor recovers in its way. It
// has kept everything and knows nothing of the device's copies, so they may be
// dropped at any time. Nothing is said to gVisor that the peer hasn't acknowledged or
// reported before.

const (
	hideShare = 50

	// hideBurst is what may be lost at once on top of that, in segments: half of
	// a super-packet that crosses a network of virtual machines whole.
	hideBurst = 24

	// hideMax is less than gVisor's least retransmission timeout, 200 ms. A
	// retransmission that was lost is repeated only if the answer will be here by
	// then.
	hideMax = 180 * time.Millisecond

	// hideQueue is by how much the round trip may exceed twice the shortest.
	hideQueue = 10 * time.Millisecond

	// logFrom is how many segments must be in flight before packets are kept: most
	// connections never have more. logIdle after that many are needed again.
	logFrom = 16
	logIdle = time.Second

	logMax   = 8192 // packets kept for a connection
	maxHoles = 512
)

// sentPacket is a packet in flight, perhaps a super-segment, of [seq, end).
type sentPacket struct {
	seq, end uint32
	p        *stack.PacketBuffer
}

// hole is a range below the highest byte that arrived, of which nothing is known.
type hole struct {
	start, end uint32
	seen       int64  // when it was noticed, ns
	again      int64  // when it was last sent again; 0: never
	ts         uint32 // the timestamp of the first time
}

// sendLog is what is known of a connection's data in flight. It covers
// [pkts[first].seq, top of the last), which need not begin with what the peer
// waits for.
type sendLog struct {
	pkts  []sentPacket
	first int

	holes []hole // in order
	top   uint32 // one past the highest byte that arrived

	mss    int
	credit int // bytes that may be hidden
	fresh  int // bytes that have arrived and not been counted yet
}

// logState is what a flow remembers between two logs.
type logState struct {
	until  int64 // keep packets from the first one on until then, ns
	credit int
}

var sendLogs = sync.Pool{New: func() any { return new(sendLog) }}

// dropLog lets the packets go.
func (f *tcpFlow) dropLog() {
	g := f.log
	if g == nil {
		return
	}
	f.log = nil
	f.logs.credit = g.credit
	for i := range g.pkts[g.first:] {
		g.pkts[g.first+i].p.DecRef()
	}
	clear(g.pkts)
	*g = sendLog{pkts: g.pkts[:0], holes: g.holes[:0]}
	sendLogs.Put(g)
}

// logSent keeps p, which holds the new data [seq, end).
func (f *tcpFlow) logSent(p *stack.PacketBuffer, seq, end uint32, now int64) {
	if !f.unaKnown {
		return
	}
	mss := int(end - seq)
	if p.GSOOptions.Type != stack.GSONone && p.GSOOptions.MSS != 0 {
		mss = min(mss, int(p.GSOOptions.MSS))
	}
	g := f.log
	if g == nil {
		if now > f.logs.until {
			if int(seq-f.una) < logFrom*mss {
				return
			}
			f.logs.credit = hideBurst * mss
		}
		g = sendLogs.Get().(*sendLog)
		g.top, g.mss, g.credit = f.una, mss, f.logs.credit
		f.log = g
	}
	f.logs.until = now + int64(logIdle)
	g.mss = max(g.mss, mss)
	if n := len(g.pkts); n > g.first && g.pkts[n-1].end != seq || n-g.first >= logMax {
		f.dropLog()
		return
	}
	g.pkts = append(g.pkts, sentPacket{seq, end, p.IncRef()})
}

// acked lets go what lies before una. in flight are the bytes from there on.
func (g *sendLog) acked(una uint32, inFlight int) {
	for g.first < len(g.pkts) && !before(una, g.pkts[g.first].end) {
		g.pkts[g.first].p.DecRef()
		g.pkts[g.first].p = nil
		g.first++
	}
	if g.first > len(g.pkts)/2 {
		k := copy(g.pkts, g.pkts[g.first:])
		clear(g.pkts[k:])
		g.pkts, g.first = g.pkts[:k], 0
	}
	k := 0
	for k < len(g.holes) && !before(una, g.holes[k].end) {
		g.fresh += int(g.holes[k].end - g.holes[k].start)
		k++
	}
	g.holes = append(g.holes[:0], g.holes[k:]...)
	if len(g.holes) > 0 && before(g.holes[0].start, una) {
		g.fresh += int(una - g.holes[0].start)
		g.holes[0].start = una
	}
	if before(g.top, una) {
		g.fresh += int(una - g.top)
		g.top = una
	}
	g.earn(inFlight)
}

// earn gives credit for what has arrived. That doesn't wait for acknowledgements
// to pass it: a window that has many holes may arrive behind the first.
func (g *sendLog) earn(inFlight int) {
	n := g.fresh / hideShare
	g.fresh -= n * hideShare
	g.credit = min(g.credit+n, hideBurst*g.mss+inFlight/hideShare)
}

// repeated notes that gVisor, which recovers, has sent [seq, end) again.
func (g *sendLog) repeated(seq, end uint32, now int64, ts uint32) {
	for i := 0; i < len(g.holes); i++ {
		h := g.holes[i]
		if !before(seq, h.end) || !before(h.start, end) {
			continue
		}
		var parts [3]hole
		p := parts[:0]
		if before(h.start, seq) {
			left := h
			left.end, h.start = seq, seq
			p = append(p, left)
		}
		right := h
		if h.again == 0 {
			h.ts = ts
		}
		h.again = now
		if p = append(p, h); before(end, h.end) {
			p[len(p)-1].end, right.start = end, end
			p = append(p, right)
		}
		g.holes = slices.Replace(g.holes, i, i+1, p...)
		i += len(p) - 1
	}
}

// reported takes note of SACK blocks. It reports false when there are too many
// holes.
func (g *sendLog) reported(blocks []byte, una, sent uint32, now int64) bool {
	// The lowest first, so that what lies between two blocks of one
	// acknowledgement is a hole at once and none above it is made twice.
	var order [4]span
	n := 0
	for ; len(blocks) >= 8 && n < len(order); blocks = blocks[8:] {
		b := blockOf(blocks)
		if !before(b.start, b.end) || before(b.start, una) || before(sent, b.end) {
			continue // a DSACK, or nonsense
		}
		i := n
		for ; i > 0 && before(b.start, order[i-1].start); i-- {
			order[i] = order[i-1]
		}
		order[i] = b
		n++
	}
	for _, b := range order[:n] {
		if before(b.start, g.top) {
			g.fill(b.start, b.end)
		}
		if before(g.top, b.start) {
			g.holes = append(g.holes, hole{start: g.top, end: b.start, seen: now})
			g.top = b.start
		}
		if before(g.top, b.end) {
			g.fresh += int(b.end - g.top)
			g.top = b.end
		}
	}
	g.earn(int(sent - una))
	return len(g.holes) <= maxHoles
}

// arrived appends what is known to have arrived out of order.
func (g *sendLog) arrived(to spans) spans {
	for i := range g.holes {
		end := g.top
		if i+1 < len(g.holes) {
			end = g.holes[i+1].start
		}
		to = append(to, span{g.holes[i].end, end})
	}
	return to
}

// fill takes [start, end) out of the holes.
func (g *sendLog) fill(start, end uint32) {
	for i := 0; i < len(g.holes); i++ {
		h := &g.holes[i]
		switch {
		case !before(h.start, end):
			return
		case !before(start, h.end):
		case !before(h.start, start) && !before(end, h.end): // all of it
			g.fresh += int(h.end - h.start)
			g.holes = append(g.holes[:i], g.holes[i+1:]...)
			i--
		case !before(h.start, start):
			g.fresh += int(end - h.start)
			h.start = end
		case !before(end, h.end):
			g.fresh += int(h.end - start)
			h.end = start
		default:
			g.fresh += int(end - start)
			rest := *h
			h.end, rest.start = start, end
			g.holes = append(g.holes, hole{})
			copy(g.holes[i+2:], g.holes[i+1:])
			g.holes[i+1] = rest
		}
	}
}

// reportedLocked looks at the SACK blocks of an acknowledgement.
func (f *tcpFlow) reportedLocked(options []byte, now int64) {
	if len(options) <= 12 {
		return
	}
	blocks := sackBlocks(options)
	// What is timed may arrive long before it is acknowledged, while gVisor
	// recovers, too.
	for b := blocks; f.timing && len(b) >= 8; b = b[8:] {
		if blockOf(b).has(span{f.timedEnd - 1, f.timedEnd}) {
			f.timed(now)
		}
	}
	if g := f.log; g != nil && len(blocks) > 0 && !g.reported(blocks, f.una, f.sent, now) {
		f.dropLog()
	}
}

// patience is how long after a retransmission it counts as lost.
func (f *tcpFlow) patience(p *reorderPath, now int64) int64 {
	return int64(max(f.rtt, f.recent.most()) + f.rtt/4 + p.window(now, f.rtt, 0))
}

// due returns when a hole is to be sent again, at the earliest, or 0.
func (f *tcpFlow) due(p *reorderPath, now int64) (at int64) {
	window, patience := int64(p.window(now, f.rtt, f.recent.most())), f.patience(p, now)
	for i := range f.log.holes {
		h := &f.log.holes[i]
		t := h.seen + window
		if h.again != 0 {
			t = h.again + patience
		}
		if at == 0 || t < at {
			at = t
		}
	}
	return at
}

// watchLocked sees to it that the holes of f are looked at in time. The list that
// it takes for that may be without acknowledgements.
func (t *flowTable) watchLocked(s *flowSet, f *tcpFlow, now int64) {
	if f.log == nil || len(f.log.holes) == 0 || f.hold.open {
		return
	}
	path, _ := t.path(f)
	at := f.due(path, now)
	if f.hold.since == 0 {
		f.hold.since = now
	}
	if f.hold.acks == nil {
		if f.hold.acks = t.hold.get(s, &f.key, false, now, at); f.hold.acks == nil {
			f.dropLog()
		}
	} else {
		t.hold.sooner(f.hold.acks, now, at)
	}
}

// rememberLocked puts b, an acknowledgement that moves on, into the list that
// waits for the next hole, so that gVisor gets to see its blocks should the list
// be released.
func (t *flowTable) rememberLocked(f *tcpFlow, b, options []byte, ack uint32, pure bool) {
	l := f.hold.acks
	if l == nil || l.n > 0 || !pure || ack != f.una || len(b) > ackSize || len(options) <= 12 {
		return
	}
	if blocks := sackBlocks(options); len(blocks) >= 8 && !reportsDuplicate(blocks, ack) {
		copy(l.next(len(b)), b)
		t.counters.heldAcks.Add(1)
	}
}

// sooner moves the deadline of a list forward.
func (h *holder) sooner(l *heldList, now, deadline int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if deadline < l.deadline && !h.closed {
		l.deadline = deadline
		h.armLocked(now, deadline)
	}
}

// later gives a list that was due another deadline.
func (h *holder) later(l *heldList, now, deadline int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l.deadline = deadline
	if !h.closed {
		h.armLocked(now, deadline)
	}
}

// repeat is a part of a packet to be sent again.
type repeat struct {
	p          *stack.PacketBuffer // with a reference of its own
	skip, n    int                 // bytes of its payload
	mss        int
	ack        uint32
	window     uint16
	tsVal, tsE uint32
}

// mend appends to r what is to be sent again for a list that was due. It reports
// false when the list is to be released instead.
func (t *flowTable) mend(d dueHold, r []repeat) (_ []repeat, ok bool) {
	if d.ours {
		return r, false
	}
	d.set.mu.Lock()
	defer d.set.mu.Unlock()
	f := d.set.findLocked(&d.key)
	if f == nil || f.log == nil {
		return r, false
	}
	l := f.hold.acks
	if l == nil || f.hold.open {
		return r, false
	}
	now := t.now()
	if l.deadline > now {
		t.hold.later(l, now, l.deadline)
		return r, true
	}
	path, _ := t.path(f)
	window, patience := int64(path.window(now, f.rtt, f.recent.most())), f.patience(path, now)
	if !f.hides(window, patience, now) {
		return r, false // release follows, and ends the log
	}
	for i := range f.log.holes {
		if h := &f.log.holes[i]; h.waited(window, patience, now) {
			if h.again == 0 {
				h.ts = f.tsVal
			}
			r = f.repeats(h, r)
			f.hold.sentAgain(f, h.end)
			h.again = now
			t.counters.mended.Add(1)
		}
	}
	t.hold.later(l, now, f.due(path, now))
	return r, true
}

// waited reports whether it is time to send a hole again.
func (h *hole) waited(window, patience, now int64) bool {
	if h.again != 0 {
		return h.again+patience <= now
	}
	return h.seen+window <= now
}

// hides reports whether all that is to be sent again now may be hidden from
// gVisor, and takes the credit for it.
func (f *tcpFlow) hides(window, patience, now int64) bool {
	g := f.log
	if f.recent.least() > 2*f.rtt+hideQueue || len(g.holes) == 0 || g.holes[0].start != f.una ||
		g.first == len(g.pkts) || before(f.una, g.pkts[g.first].seq) {
		return false
	}
	n := 0
	for i := range g.holes {
		h := &g.holes[i]
		if !h.waited(window, patience, now) {
			continue
		}
		if h.again != 0 && now-f.hold.since+patience > int64(hideMax) {
			return false
		}
		n += int(h.end - h.start)
	}
	if n > g.credit {
		return false
	}
	g.credit -= n
	return true
}

// repeats appends the packets of a hole.
func (f *tcpFlow) repeats(h *hole, r []repeat) []repeat {
	g := f.log
	if f.timing && before(h.start, f.timedEnd) && !before(h.end, f.timedEnd) {
		f.timing = false // Karn's rule
	}
	for i := g.first; i < len(g.pkts) && before(g.pkts[i].seq, h.end); i++ {
		s := &g.pkts[i]
		if !before(h.start, s.end) {
			continue
		}
		from, to := s.seq, s.end
		if before(from, h.start) {
			from = h.start
		}
		if before(h.end, to) {
			to = h.end
		}
		r = append(r, repeat{
			p: s.p.IncRef(), skip: int(from - s.seq), n: int(to - from), mss: g.mss,
			ack: f.ack, window: f.window, tsVal: f.tsVal, tsE: f.tsE,
		})
	}
	return r
}

// repeat appends segments with the data of x, and gives up its reference. What
// they acknowledge, and their timestamps, are those of the latest packet.
func (b *batch) repeat(x *repeat) {
	defer x.p.DecRef()
	hdrLen := x.p.Size() - x.p.Data().Size()
	ipLen := len(x.p.NetworkHeader().Slice())
	var hdr [maxHeaders]byte
	if hdrLen > len(hdr) || hdrLen+x.mss > int(b.dev.mtu) {
		return
	}
	h := hdr[:hdrLen]
	c := cursorOf(x.p)
	c.read(h)
	c.skip(x.skip)
	tcp := h[ipLen:]
	stripSACK(tcp)
	seq := binary.BigEndian.Uint32(tcp[4:]) + uint32(x.skip)
	id := binary.BigEndian.Uint16(h[4:]) + uint16(x.skip/x.mss)
	binary.BigEndian.PutUint32(tcp[8:], x.ack)
	binary.BigEndian.PutUint16(tcp[14:], x.window)
	if o := tcp[header.TCPMinimumSize:]; len(o) >= 12 && o[0] == 1 && o[1] == 1 && o[2] == 8 && o[3] == 10 {
		binary.BigEndian.PutUint32(o[4:], x.tsVal)
		binary.BigEndian.PutUint32(o[8:], x.tsE)
	}
	tcp[13] &^= flagCWR | flagPSH
	for x.n > 0 {
		n := min(x.mss, x.n)
		b.segment(&c, h, ipLen, seq, id, n)
		id++
		seq += uint32(n)
		x.n -= n
	}
}

// skip passes over n bytes.
func (c *cursor) skip(n int) {
	for n > 0 && c.view != nil {
		k := min(n, len(c.rest))
		c.rest = c.rest[k:]
		n -= k
		if len(c.rest) == 0 {
			if c.view = c.view.Next(); c.view != nil {
				c.rest = c.view.AsSlice()
			}
		}
	}
}
