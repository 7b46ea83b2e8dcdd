package netstack

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The device remembers a few numbers of each TCP connection, for two purposes:
// to tell reordering from loss (hold.go) and to start connections again after a
// gap (gap.go). They are looked at once for every packet of gVisor's, that is
// once for a super-segment out and once for a run of segments in.
//
//	WritePackets  flowTable.out   what was sent and acknowledged last
//	Input         flowTable.in    what the peer acknowledges; duplicates may be
//	                              taken away for a while
//
// Only what gVisor sends makes an entry, so the peer can't fill the table. It
// holds flowSets × flowWays connections; when a set is full the one not seen for
// longest makes room, and lacks the two benefits until it sends again.

const (
	flowSets = 4096
	flowWays = 4
)

// flowKey is a connection: addresses (IPv4 in the first four bytes) and ports.
type flowKey struct {
	local, remote [16]byte
	ports         [4]byte // local, remote
	v4            bool
}

// tcpFlow is what is known of a connection. Numbers of the sequence spaces are
// those on the wire.
type tcpFlow struct {
	key  flowKey
	used int64 // when it was last seen, ns; 0: the entry is free

	// What we sent.
	sent       uint32 // one past the highest byte
	ack        uint32 // the peer's next byte
	window     uint16
	ts         bool // with timestamps
	tsVal, tsE uint32

	// What the peer acknowledged.
	una      uint32
	unaKnown bool
	hold     holdState

	// What the peer sent.
	high   uint32 // one past the highest byte
	newest uint32 // its latest timestamp, if ts
	mute   muteState

	// rtt is the shortest round trip seen, 0 if none. timing: the acknowledgement
	// of timedEnd, sent at timedAt, will tell another.
	rtt      time.Duration
	recent   roundTrips
	timing   bool
	timedEnd uint32
	timedAt  int64

	// log is what is in flight, if that is much: see resend.go.
	log  *sendLog
	logs logState

	// received is when data came in last, ns.
	received int64

	// first is a copy of a packet in flight, from the IP header on, that begins
	// with the first byte not acknowledged: see gap.go. It covers [firstSeq,
	// firstEnd).
	first              []byte
	firstSeq, firstEnd uint32
}

type flowSet struct {
	mu   sync.Mutex
	ways [flowWays]tcpFlow
}

// flowTable is the table of a device. A set's mutex is held neither while
// gVisor is called nor Output; holder.mu and paths are taken under it.
type flowTable struct {
	seed  maphash.Seed
	sets  [flowSets]atomic.Pointer[flowSet] // nil: never used
	now   func() int64                      // ns, monotonic
	hold  holder
	paths [reorderPaths]struct{ out, in reorderPath } // of data sent, of data received
	// many: the peers are the tunnel's clients. Their paths are told apart by the
	// remote address, and they are stacks like this one, so that mute.go has nothing
	// to do.
	many bool

	suspect  atomic.Bool
	counters *counters // the device's
}

// init makes the zero flowTable ready, but for hold.fire.
func (t *flowTable) init(clock tcpip.Clock, many bool, c *counters) {
	t.seed = maphash.MakeSeed()
	t.many, t.counters = many, c
	t.hold.clock = clock
	began := clock.NowMonotonic()
	t.now = func() int64 { return int64(clock.NowMonotonic().Sub(began)) + 1 } // never 0
}

// set returns the set that k belongs to, or nil if there is none and it isn't to
// be made.
func (t *flowTable) set(k *flowKey, create bool) *flowSet {
	p := &t.sets[maphash.Comparable(t.seed, *k)%flowSets]
	if s := p.Load(); s != nil || !create {
		return s
	}
	p.CompareAndSwap(nil, new(flowSet))
	return p.Load()
}

// findLocked returns the entry of k, or nil.
func (s *flowSet) findLocked(k *flowKey) *tcpFlow {
	for i := range s.ways {
		if f := &s.ways[i]; f.used != 0 && f.key == *k {
			return f
		}
	}
	return nil
}

// claimLocked makes an entry for k, in place of the one not seen for longest.
func (t *flowTable) claimLocked(s *flowSet, k *flowKey) *tcpFlow {
	f := &s.ways[0]
	for i := range s.ways[1:] {
		if o := &s.ways[i+1]; o.used < f.used {
			f = o
		}
	}
	t.forgetLocked(f)
	f.key = *k
	return f
}

// forgetLocked empties an entry.
func (t *flowTable) forgetLocked(f *tcpFlow) {
	for _, l := range []*heldList{f.hold.acks, f.mute.acks} {
		if l != nil {
			t.hold.remove(l)
			t.hold.put(l)
		}
	}
	f.dropLog()
	*f = tcpFlow{}
}

// before reports whether a lies before b in a sequence space.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// connKey is the flow of a connection.
func connKey(local, remote netip.AddrPort) (k flowKey) {
	if k.v4 = local.Addr().Is4(); k.v4 {
		l, r := local.Addr().As4(), remote.Addr().As4()
		copy(k.local[:], l[:])
		copy(k.remote[:], r[:])
	} else {
		k.local, k.remote = local.Addr().As16(), remote.Addr().As16()
	}
	binary.BigEndian.PutUint16(k.ports[:], local.Port())
	binary.BigEndian.PutUint16(k.ports[2:], remote.Port())
	return k
}

// outKey is the flow of a packet that leaves, by its IP and TCP headers.
func outKey(ip, tcp []byte) (k flowKey) {
	if k.v4 = ip[0]>>4 == 4; k.v4 {
		copy(k.local[:], ip[12:16])
		copy(k.remote[:], ip[16:20])
	} else {
		copy(k.local[:], ip[8:24])
		copy(k.remote[:], ip[24:40])
	}
	copy(k.ports[:], tcp[:4])
	return k
}

// inKey is the flow of a packet that arrives.
func inKey(ip, tcp []byte) (k flowKey) {
	if k.v4 = ip[0]>>4 == 4; k.v4 {
		copy(k.remote[:], ip[12:16])
		copy(k.local[:], ip[16:20])
	} else {
		copy(k.remote[:], ip[8:24])
		copy(k.local[:], ip[24:40])
	}
	copy(k.ports[:2], tcp[2:4])
	copy(k.ports[2:], tcp[:2])
	return k
}

// out notes a packet of gVisor's that is about to leave. held: it is not to
// leave now. strip: without its SACK blocks.
func (t *flowTable) out(p *stack.PacketBuffer, now int64) (held, strip bool) {
	if p.TransportProtocolNumber != header.TCPProtocolNumber {
		return false, false
	}
	ip, tcp := p.NetworkHeader().Slice(), p.TransportHeader().Slice()
	if len(ip) < header.IPv4MinimumSize || ip[0]>>4 != 4 && len(ip) < header.IPv6MinimumSize || len(tcp) < header.TCPMinimumSize {
		return false, false
	}
	k := outKey(ip, tcp)
	flags := tcp[13]
	s := t.set(&k, flags&flagRST == 0)
	if s == nil {
		return false, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.findLocked(&k)
	seq, ack := binary.BigEndian.Uint32(tcp[4:]), binary.BigEndian.Uint32(tcp[8:])
	switch {
	case flags&flagRST != 0:
		if f != nil {
			t.forgetLocked(f)
		}
		return false, false
	case f == nil:
		f = t.claimLocked(s, &k)
		f.sent, f.ack, f.high = seq, ack, ack
	case flags&flagSYN != 0 && seq != f.una-1 && f.sent != seq+1: // a new connection
		t.forgetLocked(f)
		f.key, f.sent, f.ack, f.high = k, seq, ack, ack
	}
	f.used = now
	f.window = binary.BigEndian.Uint16(tcp[14:])
	options := tcp[header.TCPMinimumSize:]
	f.tsVal, f.tsE, f.ts = timestamps(options)
	end := seq + uint32(p.Data().Size())
	if flags&(flagSYN|flagFIN) != 0 {
		end++
	}
	if !t.many {
		if before(f.ack, ack) {
			t.filledLocked(f, ack, now)
		} else if ack == f.ack && end == seq && len(options) > 12 {
			if held = t.complaintLocked(s, f, p, options, now); held {
				return held, false
			}
		}
		strip = !f.mute.open && len(options) > 12 && flags&flagSYN == 0 && f.mute.withhold(sackBlocks(options), ack)
	}
	f.ack = ack
	if end == seq {
		return false, strip
	}
	again := before(seq, f.sent)
	if again {
		f.timing = false // Karn's rule
		f.hold.sentAgain(f, end)
		if f.hold.open && f.log != nil {
			f.log.repeated(seq, end, now, f.tsVal)
		} else {
			f.dropLog()
		}
	} else {
		if !f.timing {
			f.timing, f.timedEnd, f.timedAt = true, end, now
		}
		if flags&(flagSYN|flagFIN) == 0 {
			f.logSent(p, seq, end, now)
		}
	}
	if before(f.sent, end) {
		f.sent = end
	}
	f.keepFirst(p, seq, end, again, t.suspect.Load())
	return false, strip
}

// verdict is what in wants to happen to a packet.
type verdict uint8

const (
	pass verdict = iota
	// held: gVisor is not to see the packet now.
	held
	// passRestart: afterSpurious is to be called besides.
	passRestart
)

// in notes a TCP packet that arrives, or the first of a run, of which more bytes
// follow. strip says that gVisor is not to see its SACK blocks.
func (t *flowTable) in(p *packet, more int, now int64) (v verdict, strip bool) {
	tcp := p.payload()
	if len(tcp) < header.TCPMinimumSize {
		return pass, false
	}
	hl := int(tcp[12]>>4) * 4
	if hl < header.TCPMinimumSize || hl > len(tcp) {
		return pass, false
	}
	k := inKey(p.b, tcp)
	s := t.set(&k, false)
	if s == nil {
		return pass, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.findLocked(&k)
	if f == nil {
		return pass, false
	}
	f.used = now
	options := tcp[header.TCPMinimumSize:hl]
	if n := len(tcp) - hl + more; n > 0 {
		f.received = now
		if end := binary.BigEndian.Uint32(tcp[4:]) + uint32(n); before(f.high, end) {
			f.high = end
		}
		if v, _, ok := timestamps(options); ok && (before(f.newest, v) || f.newest == 0) {
			f.newest = v
		}
	}
	ack := binary.BigEndian.Uint32(tcp[8:])
	if f.timing && tcp[13]&flagACK != 0 && !before(ack, f.timedEnd) {
		f.timed(now)
	}
	if tcp[13]&(flagACK|flagSYN|flagRST) != flagACK {
		f.dropLog()
		return pass, false
	}
	switch {
	case !f.unaKnown:
		f.una, f.unaKnown = ack, true
	case before(f.una, ack) && !before(f.sent, ack):
		v = t.advancedLocked(f, ack, options, now)
	case ack == f.una && ack != f.sent && len(tcp) == hl && tcp[13]&^flagECE == flagACK:
		f.reportedLocked(options, now)
		if t.duplicateLocked(s, f, p.b, options, now) {
			t.watchLocked(s, f, now)
			return held, false
		}
	default:
		f.reportedLocked(options, now)
	}
	t.watchLocked(s, f, now)
	t.rememberLocked(f, p.b, options, ack, len(tcp) == hl)
	return v, !f.hold.open && hl > header.TCPMinimumSize+12
}

// advancedLocked notes that the peer has acknowledged more.
func (t *flowTable) advancedLocked(f *tcpFlow, ack uint32, options []byte, now int64) verdict {
	restart := t.resolvedLocked(f, ack, options, now)
	if g := f.log; g != nil {
		if ack == f.sent {
			f.dropLog()
		} else {
			g.acked(ack, int(f.sent-ack))
		}
	}
	f.una = ack
	f.reportedLocked(options, now)
	if f.first != nil && !before(ack, f.firstEnd) {
		f.first = nil
	}
	if restart {
		return passRestart
	}
	return pass
}

// timed notes that the timed data has arrived.
func (f *tcpFlow) timed(now int64) {
	f.timing = false
	d := time.Duration(now - f.timedAt)
	if f.rtt == 0 || d < f.rtt {
		f.rtt = d
	}
	f.recent.add(d, now, min(max(4*f.rtt, rttTurnMin), rttTurnMax))
}

// roundTrips is the range of the round trips of the last turn and this one.
type roundTrips struct {
	began                      int64 // of this turn, ns
	low, high, lowOld, highOld time.Duration
}

// A turn lasts four of the shortest round trips, from rttTurnMin to rttTurnMax.
const (
	rttTurnMin = 20 * time.Millisecond
	rttTurnMax = 100 * time.Millisecond
)

func (r *roundTrips) add(d time.Duration, now int64, turn time.Duration) {
	switch {
	case r.began == 0:
		*r = roundTrips{now, d, d, d, d}
	case now-r.began >= int64(turn):
		*r = roundTrips{now, d, d, r.low, r.high}
	default:
		r.low, r.high = min(r.low, d), max(r.high, d)
	}
}

// least is the shortest round trip: if that is long, there is a queue that stands.
func (r *roundTrips) least() time.Duration { return min(r.low, r.lowOld) }

// most is the longest.
func (r *roundTrips) most() time.Duration { return max(r.high, r.highOld) }

// pathState is what a sender wants to know of its path.
type pathState struct {
	shortest, lately time.Duration // the shortest round trip ever, and lately; 0: none was measured
	inFlight         int           // bytes
	reorders         bool
}

// state returns what is known of the path of a connection.
func (t *flowTable) state(k *flowKey) (p pathState) {
	s := t.set(k, false)
	if s == nil {
		return p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.findLocked(k)
	if f == nil {
		return p
	}
	out, _ := t.path(f)
	return pathState{f.rtt, f.recent.least(), int(f.sent - f.una), out.reorders(t.now())}
}

// timestamps returns TSval and TSecr of the options of a TCP segment (RFC 7323
// section 3.2).
func timestamps(o []byte) (val, echo uint32, ok bool) {
	if len(o) >= 12 && o[0] == 1 && o[1] == 1 && o[2] == 8 && o[3] == 10 { // where all put them
		return binary.BigEndian.Uint32(o[4:]), binary.BigEndian.Uint32(o[8:]), true
	}
	if o = tcpOption(o, 8); len(o) == 8 {
		return binary.BigEndian.Uint32(o), binary.BigEndian.Uint32(o[4:]), true
	}
	return 0, 0, false
}

// sackBlocks returns the blocks of a segment's SACK option, 8 bytes each
// (RFC 2018 section 3).
func sackBlocks(o []byte) []byte {
	if len(o) >= 14 && o[0] == 1 && o[1] == 1 && o[2] == 8 && o[3] == 10 {
		o = o[12:]
	}
	b := tcpOption(o, 5)
	return b[:len(b)&^7]
}

// blockOf returns the first of SACK blocks.
func blockOf(b []byte) span {
	return span{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}
}

// tcpOption returns the value of the option of a kind, or nil.
func tcpOption(o []byte, kind byte) []byte {
	for len(o) > 0 && o[0] != 0 {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return nil
		}
		if o[0] == kind {
			return o[2:o[1]]
		}
		o = o[o[1]:]
	}
	return nil
}
