package netstack

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// What the stack does so that a gap, a time during which the tunnel lost
// everything, ends for its connections when it ends for the tunnel. Otherwise
// each waits for a retransmission timer that has doubled with every loss: a
// connection sleeps on average as long again as the gap was.
//
// Our own data: the device keeps a copy of the packet that begins with the first
// byte in flight, for each connection, from its first retransmission on, or for
// as long as a gap is suspected. Resume sends the copies.
//
// Data for us: Resume tells the peers of connections that were receiving.
// Duplicate acknowledgements do not help by themselves: senders that know SACK
// (Linux, gVisor) don't count those without SACK blocks. But they name our next
// byte, should the peer not know it. What makes Linux send at once is RFC 6069:
// an ICMP "host unreachable" that quotes the segment it is sending again and
// again says that the silence was the path's and not congestion, and takes back
// one doubling of its timer, which then has run out already. Several messages
// take back several doublings; those in excess do nothing. To an established
// connection such a message is otherwise no more than a hint (RFC 1122 section
// 4.2.3.9).
//
// The stack listens to the same messages itself: see unreachableFor.

const (
	// busyBefore is how long before the gap a connection must have received
	// something to be taken for one whose peer has more.
	busyBefore = time.Second

	// nudgeAcks is what a sender without SACK wants (RFC 5681 section 3.2).
	nudgeAcks = 3

	// firstRTO is the least retransmission timeout of common senders; with it a
	// gap has seen the most doublings.
	firstRTO = 200 * time.Millisecond

	maxReverts = 8
)

// Suspect tells the stack that the tunnel suspects that nothing gets through
// (true), or that the suspicion was wrong (false). It is quick and may be called
// from anywhere.
func (s *Stack) Suspect(yes bool) { s.dev.flows.suspect.Store(yes) }

// Resume tells the stack that packets flow again after a gap of the given
// length, so that its connections don't wait for the retransmission timers,
// theirs and their peers', which have backed off meanwhile. It ends the
// suspicion of Suspect. It calls Output, so it must not be called from there; it
// sends a few packets for each connection that was busy.
func (s *Stack) Resume(gap time.Duration) {
	d := s.dev
	t := &d.flows
	t.suspect.Store(false)
	if gap <= 0 || !s.enter() {
		return
	}
	defer s.handlers.Done()
	r := resume{now: t.now(), gap: int64(gap), reverts: min(bits.Len64(uint64(gap/firstRTO))+1, maxReverts)}
	// Our own data first, since it may be what the peers wait for.
	for i := range t.sets {
		if set := t.sets[i].Load(); set != nil {
			r.collect(set)
		}
	}
	b := d.batch()
	for _, p := range r.firsts {
		copy(b.next(len(p)), p)
	}
	for i := range r.nudges {
		b.putNudge(&r.nudges[i], r.reverts)
	}
	b.done()
	// The timeouts were the gap's fault, not congestion's: see outage.go.
	for i := range r.senders {
		s.restartFlow(&r.senders[i])
	}
	d.counters.gapResent.Add(uint64(len(r.firsts)))
	d.counters.gapNudged.Add(uint64(len(r.nudges)))
	s.log.Debug("netstack resumed", "gap", gap, "resent", len(r.firsts), "nudged", len(r.nudges))
}

// resume is what is to be sent after a gap.
type resume struct {
	now, gap int64 // ns
	reverts  int
	firsts   [][]byte
	senders  []flowKey // of firsts
	nudges   []nudge
}

// nudge is what a packet to a peer is made of.
type nudge struct {
	key        flowKey
	seq, ack   uint32
	window     uint16
	ts         bool
	tsVal, tsE uint32
}

// collect looks at the flows of a set. A copy belongs to the flow until then,
// and to r from then on.
func (r *resume) collect(set *flowSet) {
	set.mu.Lock()
	defer set.mu.Unlock()
	for i := range set.ways {
		f := &set.ways[i]
		if f.used == 0 {
			continue
		}
		if f.first != nil && (!f.unaKnown || before(f.una, f.firstEnd)) {
			r.firsts = append(r.firsts, f.first)
			r.senders = append(r.senders, f.key)
			f.first = nil
		}
		// A flow that received something after the gap has its timers in order.
		if age := r.now - f.received; f.received != 0 && age < r.gap+int64(busyBefore) && age > r.gap/2 {
			r.nudges = append(r.nudges, nudge{
				key: f.key, seq: f.sent, ack: f.ack, window: f.window, ts: f.ts, tsVal: f.tsVal, tsE: f.tsE,
			})
		}
	}
}

// keepFirst keeps a copy of p, which holds the sequence numbers [seq, end), if it
// is the packet to begin with after a gap. again tells a retransmission.
func (f *tcpFlow) keepFirst(p *stack.PacketBuffer, seq, end uint32, again, suspect bool) {
	stale := f.first == nil || f.unaKnown && !before(f.una, f.firstEnd)
	switch {
	case again && (seq == f.una || !f.unaKnown):
	case suspect && (stale || !before(f.firstSeq, seq)):
	default:
		return
	}
	f.first = appendFirst(f.first[:0], p)
	f.firstSeq = seq
	// At least: a super-segment counts as its first segment.
	f.firstEnd = seq + min(end-seq, uint32(max(len(f.first)-p.HeaderSize(), 1)))
}

// appendFirst appends the first segment of p to b: all of p, unless it is a
// super-segment.
func appendFirst(b []byte, p *stack.PacketBuffer) []byte {
	n := p.Size()
	mss := int(p.GSOOptions.MSS)
	cut := p.GSOOptions.Type != stack.GSONone && mss > 0 && p.Data().Size() > mss
	if cut {
		n += mss - p.Data().Size()
	}
	if cap(b) < n {
		b = make([]byte, 0, n)
	}
	b = b[:n]
	c := cursorOf(p)
	c.read(b)
	if cut {
		if ip := p.NetworkHeader().Slice(); b[0]>>4 == 4 {
			binary.BigEndian.PutUint16(b[2:], uint16(n))
			setIPv4Checksum(b[:len(ip)])
		} else {
			binary.BigEndian.PutUint16(b[4:], uint16(n-header.IPv6MinimumSize))
		}
		b[p.HeaderSize()-len(p.TransportHeader().Slice())+13] &^= flagFIN | flagPSH
	}
	return b
}

// addrs returns the addresses of a flow.
func (k *flowKey) addrs() (local, remote netip.Addr) {
	if k.v4 {
		return netip.AddrFrom4([4]byte(k.local[:4])), netip.AddrFrom4([4]byte(k.remote[:4]))
	}
	return netip.AddrFrom16(k.local), netip.AddrFrom16(k.remote)
}

// putNudge appends the packets that make the peer of a flow send again.
func (b *batch) putNudge(n *nudge, reverts int) {
	for range nudgeAcks {
		b.putAck(n)
	}
	for range reverts {
		b.putRevert(n)
	}
}

// putAck appends an acknowledgement.
func (b *batch) putAck(n *nudge) {
	size := header.TCPMinimumSize
	if n.ts {
		size += 12
	}
	tcp := b.putHeader(n, protoTCP, size)
	clear(tcp)
	copy(tcp, n.key.ports[:])
	binary.BigEndian.PutUint32(tcp[4:], n.seq)
	binary.BigEndian.PutUint32(tcp[8:], n.ack)
	tcp[12], tcp[13] = byte(size/4)<<4, flagACK
	binary.BigEndian.PutUint16(tcp[14:], n.window)
	if n.ts {
		copy(tcp[header.TCPMinimumSize:], []byte{1, 1, 8, 10})
		binary.BigEndian.PutUint32(tcp[header.TCPMinimumSize+4:], n.tsVal)
		binary.BigEndian.PutUint32(tcp[header.TCPMinimumSize+8:], n.tsE)
	}
}

// putRevert appends an unreachable message about the segment of the peer's that
// begins with the byte that we wait for. Codes are those that RFC 6069 section
// 3 and Linux take: host unreachable, and no route for IPv6.
func (b *batch) putRevert(n *nudge) {
	ip := header.IPv6MinimumSize
	if n.key.v4 {
		ip = header.IPv4MinimumSize
	}
	m := b.putHeader(n, protoICMPv6, icmpHeader+ip+header.TCPMinimumSize)
	clear(m)
	local, remote := n.key.addrs()
	q := m[icmpHeader:]
	if n.key.v4 {
		putIPv4(q, protoTCP, remote, local, 0, 0)
	} else {
		putIPv6(q, protoTCP, remote, local)
	}
	tcp := q[ip:]
	copy(tcp, n.key.ports[2:])
	copy(tcp[2:], n.key.ports[:2])
	binary.BigEndian.PutUint32(tcp[4:], n.ack)
	binary.BigEndian.PutUint32(tcp[8:], n.seq)
	tcp[12], tcp[13] = header.TCPMinimumSize/4<<4, flagACK
	if n.key.v4 {
		m[0], m[1] = icmpUnreachable, icmpHost
		binary.BigEndian.PutUint16(m[2:], ^fold(sum(0, m)))
	} else {
		m[0], m[1] = icmpv6Unreachable, icmpv6Net
		binary.BigEndian.PutUint16(m[2:], ^fold(sum(pseudoSum(local, remote, protoICMPv6, len(m)), m)))
	}
}

// putHeader appends a packet to the flow's peer with room for size bytes of
// payload, and returns the payload. ICMPv6 stands for ICMP, too.
func (b *batch) putHeader(n *nudge, proto byte, size int) []byte {
	local, remote := n.key.addrs()
	if n.key.v4 {
		if proto == protoICMPv6 {
			proto = protoICMP
		}
		p := b.next(header.IPv4MinimumSize + size)
		putIPv4(p, proto, local, remote, 0, 0)
		return p[header.IPv4MinimumSize:]
	}
	p := b.next(header.IPv6MinimumSize + size)
	putIPv6(p, proto, local, remote)
	return p[header.IPv6MinimumSize:]
}

// unreachableFor is RFC 6069 for our own connections: an unreachable message
// about the segment that we send again and again, and to whose timeouts the copy
// bears witness, means that the path was broken and somebody can tell us so. The
// copy is sent at once, and once for each retransmission. q is the quoted packet
// with a TCP header of 8 bytes at least.
func (s *Stack) unreachableFor(q *packet) {
	d := s.dev
	k := outKey(q.b, q.payload())
	set := d.flows.set(&k, false)
	if set == nil {
		return
	}
	seq := binary.BigEndian.Uint32(q.payload()[4:])
	var p []byte
	set.mu.Lock()
	if f := set.findLocked(&k); f != nil && f.unaKnown && f.first != nil && f.una == seq && f.firstSeq == seq {
		p, f.first = f.first, nil
	}
	set.mu.Unlock()
	if p == nil || d.outClosed.Load() {
		return
	}
	b := d.batch()
	copy(b.next(len(p)), p)
	b.done()
	d.counters.gapResent.Add(1)
}
