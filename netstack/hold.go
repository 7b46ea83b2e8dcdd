package netstack

import (
	"encoding/binary"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Reordering and the sender. Without RACK (see outage.go) gVisor takes a segment
// for lost as soon as duplicate acknowledgements name two or three segments
// behind it, and a tunnel whose packets take different roads makes such
// acknowledgements all the time. So they wait here for a moment: when the
// acknowledgement passes them, the segment was only late and nobody needs them
// any more; when the moment has passed, gVisor gets them and recovers.
//
//	Input            flowTable.in
//	duplicateLocked  a pure duplicate with SACK is kept, the window starts
//	resolvedLocked   the acknowledgement moves on: the kept ones are dropped, and
//	                 it is learned how late the segment was
//	mend             the window is over: the device sends again what is missing,
//	                 if it is little (resend.go)
//	release          otherwise the kept ones go to gVisor, and from
//	                 now on, until all that was in flight then is acknowledged,
//	                 duplicates pass, since recovery lives on them; but no longer
//	                 than until it turns out that nothing was lost
//
// The window is that of RFC 8985 section 6.2 in spirit: small until reordering
// was seen, then as long as segments were late, and back after a while without
// evidence. Evidence is a late segment that was not sent again, or of which the
// echoed timestamp says that the first transmission arrived (Eifel, RFC 3522),
// or a duplicate that the peer reports (DSACK, RFC 2883).
//
// There is a second reason to keep SACK blocks from gVisor while it does not
// recover: a segment that was reported arrived before the acknowledgement passed
// it is never taken off gVisor's count of segments in flight, unless in recovery,
// where the count is made anew. Reordering would so use up the congestion window,
// until the connection is idle. So blocks that come outside of recovery with
// acknowledgements that move on, or with data, are blanked out.
//
// All of it is bounded: holds many flows at once, heldAcks acknowledgements each,
// holdMax long. Beyond, acknowledgements pass at once.

const (
	// Without evidence the window is a quarter of the round trip, as in RFC 8985,
	// from holdMin to holdRTT.
	holdMin = time.Millisecond
	holdRTT = 10 * time.Millisecond

	// holdMax leaves the retransmission timer, 200 ms at least, far behind.
	holdMax = 80 * time.Millisecond

	// holdMemory is how long evidence counts, at least; twice that at most.
	holdMemory = 10 * time.Second

	holds    = 256
	heldAcks = 32
	ackSize  = 100 // IPv6 and the longest TCP header

	dupThreshold = 3 // duplicates that gVisor wants, RFC 5681

	// reorderPaths tells apart the clients of a stack that serves many.
	reorderPaths = 64
)

// holdState is a flow's part.
type holdState struct {
	since int64 // when the first duplicate of una came, ns; 0: none
	acks  *heldList

	// recovering: gVisor recovers, until recover is acknowledged. open: duplicates
	// pass, since it does.
	recovering, open bool
	recover          uint32

	// judge: the next progress shows whether the recovery was for nothing.
	// spurious: it was, and needs no duplicates. restart: it has ended.
	judge, spurious, restart bool

	// again: [una, againEnd) may have been sent again, first with againTS.
	again    bool
	againEnd uint32
	againTS  uint32
}

// sentAgain notes a retransmission that ends before end. f has its timestamp.
func (h *holdState) sentAgain(f *tcpFlow, end uint32) {
	if !h.again {
		h.again, h.againEnd, h.againTS = true, end, f.tsVal
	} else if before(h.againEnd, end) {
		h.againEnd = end
	}
}

// heldList is the acknowledgements held for a flow.
type heldList struct {
	set      *flowSet // whose flow it is
	key      flowKey
	ours     bool  // on their way out
	deadline int64 // ns
	at       int   // its place in holder.active

	n    int
	size [heldAcks]uint8
	buf  [heldAcks][ackSize]byte

	// more are blocks that are to be reported, too, when the list is released; said
	// counts the acknowledgements that do.
	more spans
	said [maxHoles]uint8
}

// next returns the place for an IP packet of n bytes. When the list is full every
// second one goes: what an acknowledgement says of arrived segments, its two
// successors repeat (RFC 2018 section 4).
func (l *heldList) next(n int) []byte {
	if l.n == heldAcks {
		for i := range heldAcks / 2 {
			l.size[i] = l.size[2*i+1]
			l.buf[i] = l.buf[2*i+1]
		}
		l.n = heldAcks / 2
	}
	b := l.buf[l.n][:n]
	l.size[l.n] = uint8(n)
	l.n++
	return b
}

// blocks returns the SACK blocks of an acknowledgement of the list.
func (*heldList) blocks(b []byte) []byte {
	p, ok := parseIP(b)
	if !ok {
		return nil // it was one when it came
	}
	tcp := p.payload()
	return sackBlocks(tcp[header.TCPMinimumSize : int(tcp[12]>>4)*4])
}

// each calls do with the acknowledgements of the list, and with copies of the last
// that report what is in more. What an acknowledgement said that was dropped, as one
// of too many or because of progress, those behind it need not repeat: they have
// room for three blocks or four. So first comes what none has, since the receiver
// acts upon each at once. What leaves is said twice (RFC 2018 section 4 wants three
// times), for it may get lost. b is valid until do returns.
func (l *heldList) each(do func(b []byte)) {
	var buf [ackSize]byte
	l.count()
	l.report(1, &buf, do)
	if !l.ours {
		l.enough()
	}
	for i := range l.n {
		do(l.buf[i][:l.size[i]])
	}
	if l.ours {
		l.report(2, &buf, do)
	}
}

// count notes how many acknowledgements report each block of more.
func (l *heldList) count() {
	clear(l.said[:])
	for i := range l.n {
		for b := l.blocks(l.buf[i][:l.size[i]]); len(b) >= 8; b = b[8:] {
			x := blockOf(b)
			for j := range l.more {
				if x.has(l.more[j]) {
					l.said[j]++
				}
			}
		}
	}
}

// report calls do with copies of the last acknowledgement that report, instead of
// its own blocks, those of more that were said fewer times than that.
func (l *heldList) report(times uint8, buf *[ackSize]byte, do func(b []byte)) {
	if l.n == 0 {
		return
	}
	b := buf[:l.size[l.n-1]]
	var to []byte // the blocks of b that can still be replaced
	for j := range l.more {
		if l.said[j] >= times {
			continue
		}
		if to == nil {
			copy(b, l.buf[l.n-1][:])
			to = l.blocks(b)
		}
		l.said[j]++
		binary.BigEndian.PutUint32(to, l.more[j].start)
		binary.BigEndian.PutUint32(to[4:], l.more[j].end)
		if to = to[8:]; len(to) < 8 {
			do(b)
			to = nil
		}
	}
	if to != nil {
		do(b)
	}
}

// enough makes three duplicates of fewer, since gVisor counts them, while the
// window has shown by time that the segment is lost (RFC 8985 section 6.2, and
// RFC 5827 for the few segments of a small window). Each says a little more than
// the one before, which is what gVisor wants of a duplicate.
func (l *heldList) enough() {
	if l.n == 0 || l.n >= dupThreshold {
		return
	}
	ack, size := l.buf[0], l.size[0]
	more := dupThreshold - l.n
	copy(l.buf[more:], l.buf[:l.n])
	copy(l.size[more:], l.size[:l.n])
	for i := range more {
		l.buf[i], l.size[i] = ack, size
		b := l.blocks(l.buf[i][:size])
		x := blockOf(b)
		binary.BigEndian.PutUint32(b[4:], x.start+uint32(i+1)*((x.end-x.start)/dupThreshold))
	}
	l.n = dupThreshold
}

// holder owns the lists and the timer of all flows.
type holder struct {
	clock tcpip.Clock
	fire  func() // releases what is due

	mu     sync.Mutex
	active []*heldList
	free   []*heldList
	timer  tcpip.Timer
	armed  int64 // when the timer fires, ns; 0: it doesn't
	closed bool
}

// get returns an empty list, or nil when there are too many.
func (h *holder) get(s *flowSet, k *flowKey, ours bool, now, deadline int64) *heldList {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || len(h.active) >= holds {
		return nil
	}
	var l *heldList
	if n := len(h.free); n > 0 {
		l, h.free = h.free[n-1], h.free[:n-1]
	} else {
		l = new(heldList)
	}
	l.set, l.key, l.ours, l.deadline, l.n = s, *k, ours, deadline, 0
	l.at = len(h.active)
	h.active = append(h.active, l)
	h.armLocked(now, deadline)
	return l
}

// armLocked sees to it that the timer fires at the deadline at the latest.
func (h *holder) armLocked(now, deadline int64) {
	if h.armed != 0 && h.armed <= deadline {
		return
	}
	h.armed = deadline
	d := time.Duration(max(deadline-now, 0))
	if h.timer == nil {
		h.timer = h.clock.AfterFunc(d, h.fire)
		return
	}
	h.timer.Stop()
	h.timer.Reset(d)
}

// remove takes a list away from those that wait.
func (h *holder) remove(l *heldList) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last := h.active[len(h.active)-1]
	last.at = l.at
	h.active[l.at] = last
	h.active[len(h.active)-1] = nil
	h.active = h.active[:len(h.active)-1]
}

// put takes back a list that was removed.
func (h *holder) put(l *heldList) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.free = append(h.free, l)
}

// dueHold names a list that was due. It may have been given up since.
type dueHold struct {
	set  *flowSet
	key  flowKey
	ours bool
}

// due appends the lists that are due and arms the timer for the others.
func (h *holder) due(now int64, to []dueHold) []dueHold {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = 0
	if h.closed {
		return to
	}
	next := int64(0)
	for _, l := range h.active {
		if l.deadline <= now {
			to = append(to, dueHold{l.set, l.key, l.ours})
		} else if next == 0 || l.deadline < next {
			next = l.deadline
		}
	}
	if next != 0 {
		h.armLocked(now, next)
	}
	return to
}

// close stops the timer for good.
func (h *holder) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	if h.timer != nil {
		h.timer.Stop()
	}
}

// duplicateLocked decides about b, an acknowledgement without data of what was
// acknowledged before, while something is in flight.
func (t *flowTable) duplicateLocked(s *flowSet, f *tcpFlow, b, options []byte, now int64) (held bool) {
	blocks := sackBlocks(options)
	if len(blocks) < 8 || len(b) > ackSize {
		return false // gVisor wants SACK for a duplicate, else it is a window update
	}
	path, _ := t.path(f)
	if reportsDuplicate(blocks, f.una) {
		path.spurious(now)
		if len(blocks) < 16 {
			return false
		}
	}
	h := &f.hold
	if h.since == 0 {
		h.since = now
	}
	if h.open {
		return false
	}
	if h.acks == nil {
		if h.acks = t.hold.get(s, &f.key, false, now, now+int64(path.window(now, f.rtt, f.recent.most()))); h.acks == nil {
			f.openUntil(f.sent)
			return false
		}
	}
	copy(h.acks.next(len(b)), b)
	t.counters.heldAcks.Add(1)
	return true
}

// openUntil lets gVisor recover.
func (f *tcpFlow) openUntil(sent uint32) {
	f.hold.open, f.hold.recovering, f.hold.recover, f.hold.judge = true, true, sent, true
	f.dropLog()
}

// resolvedLocked looks at an acknowledgement that moves on. It reports whether
// the connection has just come out of a recovery that was for nothing.
func (t *flowTable) resolvedLocked(f *tcpFlow, ack uint32, options []byte, now int64) (restart bool) {
	h := &f.hold
	if h.restart {
		h.restart, restart = false, true
	}
	if h.since != 0 {
		since, again, ts := h.since, h.again && before(f.una, h.againEnd), h.againTS
		if g := f.log; g != nil && len(g.holes) > 0 && g.holes[0].start == f.una {
			since, again, ts = g.holes[0].seen, g.holes[0].again != 0, g.holes[0].ts
		}
		late := !again
		if again && f.ts {
			_, echo, ok := timestamps(options)
			late = ok && before(echo, ts)
		}
		if late {
			path, _ := t.path(f)
			path.late(time.Duration(now-since), now)
		}
		if h.judge {
			h.judge, h.spurious = false, late
			h.open = !late
		}
		h.since = 0
	}
	if h.acks != nil {
		t.counters.heldDropped.Add(uint64(h.acks.n))
		t.hold.remove(h.acks)
		t.hold.put(h.acks)
		h.acks = nil
	}
	if h.again && !before(ack, h.againEnd) {
		h.again = false
	}
	if h.recovering && !before(ack, h.recover) {
		h.recovering, h.open, h.restart = false, false, h.spurious
		h.spurious = false
	}
	return restart
}

// reportsDuplicate reports whether the first SACK block is a DSACK: below the
// acknowledgement, or inside the second (RFC 2883 section 4).
func reportsDuplicate(blocks []byte, ack uint32) bool {
	x := blockOf(blocks)
	return !before(ack, x.end) || len(blocks) >= 16 && blockOf(blocks[8:]).has(x)
}

// stripSACK overwrites the SACK option of a TCP segment with no-operations.
func stripSACK(tcp []byte) {
	o := tcp[header.TCPMinimumSize : int(tcp[12]>>4)*4]
	for len(o) > 0 && o[0] != 0 {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return
		}
		n := int(o[1])
		if o[0] == 5 {
			for i := range n {
				o[i] = 1
			}
		}
		o = o[n:]
	}
}

// releaseHeld hands over what has waited long enough. It is the timer's
// function; Close waits for it.
func (s *Stack) releaseHeld() {
	if !s.enter() {
		return
	}
	defer s.handlers.Done()
	t := &s.dev.flows
	var due [16]dueHold
	var again []repeat
	for _, d := range t.hold.due(t.now(), due[:0]) {
		var ok bool
		if again, ok = t.mend(d, again[:0]); ok {
			if len(again) > 0 {
				b := s.dev.batch()
				for i := range again {
					b.repeat(&again[i])
				}
				b.done()
			}
			continue
		}
		l := t.release(d)
		if l == nil {
			continue
		}
		s.handOver(l)
		t.hold.put(l)
	}
}

// handOver sends the acknowledgements of a list on their way.
func (s *Stack) handOver(l *heldList) {
	if l.ours {
		b := s.dev.batch()
		l.each(func(ack []byte) { copy(b.next(len(ack)), ack) })
		b.done()
		return
	}
	l.each(func(ack []byte) {
		if p, ok := parseIP(ack); ok {
			s.dev.deliver(&p, nil, len(p.b))
		}
	})
}

// release takes the list from the flow, unless it isn't due any more, and lets
// duplicates pass from now on.
func (t *flowTable) release(d dueHold) *heldList {
	d.set.mu.Lock()
	defer d.set.mu.Unlock()
	f := d.set.findLocked(&d.key)
	if f == nil {
		return nil
	}
	acks := &f.hold.acks
	if d.ours {
		acks = &f.mute.acks
	}
	l := *acks
	if l == nil || l.deadline > t.now() {
		return nil
	}
	*acks = nil
	l.more = l.more[:0]
	if d.ours {
		l.more = append(l.more, f.mute.untold...)
		f.mute.openUntil(f.high)
	} else {
		if f.log != nil {
			l.more = f.log.arrived(l.more)
		}
		f.openUntil(f.sent)
	}
	t.hold.remove(l)
	t.counters.heldReleased.Add(uint64(l.n))
	return l
}

// reorderPath is how late segments were lately.
type reorderPath struct {
	mu       sync.Mutex
	now, old time.Duration // the most in this stretch of time and in the last
	began    int64         // of this stretch, ns
	reported int64         // the last spurious, ns
}

func (p *reorderPath) turnLocked(now int64) {
	if age := now - p.began; age >= int64(2*holdMemory) {
		p.now, p.old, p.began = 0, 0, now
	} else if age >= int64(holdMemory) {
		p.now, p.old, p.began = 0, p.now, now
	}
}

// late notes a segment that came d after the first sign of its absence.
func (p *reorderPath) late(d time.Duration, now int64) {
	if d > holdMax {
		return // nothing that waiting would help
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turnLocked(now)
	p.now = max(p.now, d)
}

// spurious notes that something was sent again in vain. One recovery gives many
// such reports, so they count once in a while.
func (p *reorderPath) spurious(now int64) {
	w := p.window(now, 0, 0)
	p.mu.Lock()
	again := p.reported != 0 && now-p.reported < int64(holdMax)
	if !again {
		p.reported = now
	}
	p.mu.Unlock()
	if !again {
		p.late(min(w, holdMax), now)
	}
}

// window returns how long duplicates of a flow are to be held whose round trips
// were rtt at least, and most lately, or 0. By what most is longer, data lies in
// queues, perhaps of one road only, and where there is a queue it costs nothing to
// recover that much later.
func (p *reorderPath) window(now int64, rtt, most time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turnLocked(now)
	d := max(p.now, p.old)
	return min(max(d+d/4+holdMin, min(rtt/4, holdRTT), most-rtt), holdMax)
}

// reorders reports whether segments were late lately.
func (p *reorderPath) reorders(now int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turnLocked(now)
	return max(p.now, p.old) > 0
}

// path is the flow's, for what we send and for what we receive: all flows of a
// client share the tunnel, on a server those of one client do.
func (t *flowTable) path(f *tcpFlow) (out, in *reorderPath) {
	p := &t.paths[0]
	if r := &f.key.remote; t.many {
		p = &t.paths[(r[3]^r[7]^r[13]^r[14]^r[15])%reorderPaths]
	}
	return &p.out, &p.in
}
