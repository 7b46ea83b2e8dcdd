package packet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Reassembly is what became of a fragment.
type Reassembly uint8

// The outcomes. All but the first two are reasons for a drop.
const (
	// Complete: the datagram is whole.
	Complete Reassembly = iota
	// Waiting for other fragments.
	Waiting
	// DuplicateFragment: the same bytes were there already.
	DuplicateFragment
	// OverlappingFragment: it contradicts another one. The whole datagram is
	// dropped, with what is still to come of it (RFC 5722, RFC 8200 section 4.5,
	// done for IPv4 as well).
	OverlappingFragment
	// BadFragment: not a fragment, an empty one, one before the last whose length
	// is not divisible by eight, or one of a datagram that would be too long.
	BadFragment
	// TooManyFragments of one datagram. It is dropped.
	TooManyFragments
	// NoRoom: the datagram alone would exceed the bound on memory.
	NoRoom

	// NumReassembly is the number of values above.
	NumReassembly = iota
)

var reassemblyNames = [NumReassembly]string{
	Complete:            "complete",
	Waiting:             "waiting",
	DuplicateFragment:   "duplicate_fragment",
	OverlappingFragment: "overlapping_fragment",
	BadFragment:         "bad_fragment",
	TooManyFragments:    "too_many_fragments",
	NoRoom:              "no_room",
}

// String is the outcome's name as a metrics label.
func (r Reassembly) String() string {
	if int(r) < len(reassemblyNames) {
		return reassemblyNames[r]
	}
	return "unknown"
}

// ReassemblyLimits bounds what fragments may cost. Zero fields mean the value in
// parentheses.
type ReassemblyLimits struct {
	// Bytes of memory for data (4 MiB).
	Bytes int
	// Datagrams that are incomplete at the same time (1024).
	Datagrams int
	// PerSource is that for one source address (64).
	PerSource int
	// Timeout from the first fragment on, after which the datagram is dropped (15
	// s, RFC 791; RFC 8200 allows up to 60 s).
	Timeout time.Duration
}

const (
	// maxFragments of a datagram: of 64 KiB with an MTU of 552 bytes.
	maxFragments = 128
	maxPacket    = 0xffff
)

// Reassembler puts fragments together again. Where there is no room for a new
// datagram, the oldest incomplete one makes room, of the same source if it is
// that source that has too many; so a flood of fragments that never
// complete costs only those who wait long. Safe for concurrent use.
type Reassembler struct {
	limits ReassemblyLimits

	mu      sync.Mutex
	parts   map[fragmentKey]*datagram
	sources map[netip.Addr]*fragmentQueue
	all     fragmentQueue // oldest first, which is also the order of the deadlines
	bytes   int
	stats   ReassemblyStats
}

// ReassemblyStats are a Reassembler's counters.
type ReassemblyStats struct {
	// Outcomes counts fragments by what became of them.
	Outcomes [NumReassembly]uint64
	// Expired and Evicted count datagrams that were dropped incomplete: for their
	// age, to make room.
	Expired, Evicted uint64
	// Datagrams that are incomplete now, and Bytes they take.
	Datagrams, Bytes int
}

// fragmentKey is what fragments of one datagram have in common. IPv6 doesn't count
// the protocol in; it is 0 there.
type fragmentKey struct {
	source, destination netip.Addr
	id                  uint32
	protocol            Protocol
}

// datagram is an incomplete one, or one that was dropped and whose further fragments
// are to be dropped as well: then it is dead and holds no bytes.
type datagram struct {
	key      fragmentKey
	deadline time.Time
	dead     bool

	header []byte  // as it will be, but for the lengths; nil until the first fragment is there
	pieces []piece // in order of their place
	have   int     // bytes of data in them
	total  int     // bytes of data in all, 0 while unknown
	marked bool    // one fragment has the mark "congestion experienced" (RFC 3168)

	queues [2]links
}

// piece is a fragment's data and its place. Each has memory of its own, so that
// what is held is no more than what was sent, wherever it claims to belong.
type piece struct {
	start, end int
	data       []byte
}

// NewReassembler returns a Reassembler without fragments.
func NewReassembler(limits ReassemblyLimits) *Reassembler {
	def := func(field *int, value int) {
		if *field <= 0 {
			*field = value
		}
	}
	def(&limits.Bytes, 4<<20)
	def(&limits.Datagrams, 1024)
	def(&limits.PerSource, 64)
	if limits.Timeout <= 0 {
		limits.Timeout = 15 * time.Second
	}
	return &Reassembler{
		limits: limits, parts: make(map[fragmentKey]*datagram), sources: make(map[netip.Addr]*fragmentQueue),
		all: fragmentQueue{which: 0},
	}
}

// Add takes the fragment that v has parsed. When it completes a datagram, whole is
// that packet, which the caller may keep and change: it is new memory. Its IP
// header is valid; of the rest, nothing has been looked at. Otherwise whole is nil
// and why says what happened. v is not changed and not kept.
func (r *Reassembler) Add(v *View, now time.Time) (whole []byte, why Reassembly) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expireLocked(now)
	whole, why = r.addLocked(v, now)
	r.stats.Outcomes[why]++
	return whole, why
}

// Sweep drops what is too old. Add does it, too; so it is for times in which no
// fragments come.
func (r *Reassembler) Sweep(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expireLocked(now)
}

// Stats are the counters now.
func (r *Reassembler) Stats() ReassemblyStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Datagrams, s.Bytes = len(r.parts), r.bytes
	return s
}

func (r *Reassembler) addLocked(v *View, now time.Time) ([]byte, Reassembly) {
	if !v.Fragmented || v.quoted {
		return nil, BadFragment
	}
	header, data := v.fragmentParts()
	p := piece{v.FragmentOffset, v.FragmentOffset + len(data), data}
	if len(data) == 0 || v.More && len(data)%8 != 0 || p.end+len(header) > maxPacket+v.fixedHeader() {
		return nil, BadFragment
	}
	d, why := r.findLocked(v, now)
	if d == nil {
		return nil, why
	}
	at, why := d.fit(p, v.More)
	if why == Waiting && !r.makeRoomLocked(d, len(data)) {
		why = NoRoom
	}
	switch why {
	case Waiting:
	case DuplicateFragment:
		return nil, why
	default:
		r.killLocked(d)
		return nil, why
	}
	p.data = bytes.Clone(data)
	d.pieces = slices.Insert(d.pieces, at, p)
	d.have += len(data)
	r.bytes += len(data)
	if !v.More {
		d.total = p.end
	}
	if p.start == 0 {
		d.header = bytes.Clone(header)
		if v.Version == 6 {
			d.header[v.next] = v.Bytes[v.fragment]
		}
	}
	d.marked = d.marked || v.congestion() == 3
	if d.have != d.total || d.header == nil {
		return nil, Waiting
	}
	r.removeLocked(d)
	if len(d.header)+d.total > maxPacket+v.fixedHeader() {
		return nil, BadFragment
	}
	return d.whole(v.Version), Complete
}

// fixedHeader is how much of the header a packet's length field doesn't count.
func (v *View) fixedHeader() int {
	if v.Version == 6 {
		return ipv6HeaderLen
	}
	return 0
}

// fragmentParts cuts a fragment into what stays with the whole packet's headers and
// the data at FragmentOffset.
func (v *View) fragmentParts() (header, data []byte) {
	if v.Version == 4 {
		return v.Bytes[:v.transport4()], v.Bytes[v.transport4():]
	}
	return v.Bytes[:v.fragment], v.Bytes[v.fragment+fragmentHeaderLen:]
}

// congestion is the ECN field (RFC 3168 section 5).
func (v *View) congestion() byte {
	if v.Version == 4 {
		return v.Bytes[1] & 3
	}
	return v.Bytes[1] >> 4 & 3
}

// findLocked returns the datagram of a fragment, a new one if need be.
func (r *Reassembler) findLocked(v *View, now time.Time) (*datagram, Reassembly) {
	key := fragmentKey{source: v.Source, destination: v.Destination, id: v.FragmentID}
	if v.Version == 4 {
		key.protocol = v.Protocol
	}
	if d := r.parts[key]; d != nil {
		if d.dead {
			return nil, OverlappingFragment
		}
		return d, Waiting
	}
	source := r.sources[v.Source]
	if source != nil && source.length >= r.limits.PerSource {
		r.evictLocked(source.first)
	}
	if len(r.parts) >= r.limits.Datagrams {
		r.evictLocked(r.all.first)
	}
	// The source's queue may have gone with its last datagram.
	if source = r.sources[v.Source]; source == nil {
		source = &fragmentQueue{which: 1}
		r.sources[v.Source] = source
	}
	d := &datagram{key: key, deadline: now.Add(r.limits.Timeout)}
	r.parts[key] = d
	r.all.push(d)
	source.push(d)
	return d, Waiting
}

// fit says whether a fragment goes with those that are there, and at which index of
// pieces.
func (d *datagram) fit(p piece, more bool) (at int, why Reassembly) {
	i, _ := slices.BinarySearchFunc(d.pieces, p.start, func(q piece, start int) int { return q.start - start })
	if i < len(d.pieces) && d.pieces[i].start == p.start && d.pieces[i].end == p.end {
		// RFC 8200 lets exact copies pass: networks do duplicate.
		if bytes.Equal(d.pieces[i].data, p.data) && more == (d.total != p.end) {
			return 0, DuplicateFragment
		}
		return 0, OverlappingFragment
	}
	switch {
	case i > 0 && d.pieces[i-1].end > p.start,
		i < len(d.pieces) && d.pieces[i].start < p.end,
		d.total > 0 && (p.end > d.total || !more),
		!more && i < len(d.pieces):
		return 0, OverlappingFragment
	case len(d.pieces) >= maxFragments:
		return 0, TooManyFragments
	}
	return i, Waiting
}

// makeRoomLocked lets datagrams other than d make room for n more bytes of d.
func (r *Reassembler) makeRoomLocked(d *datagram, n int) bool {
	for r.bytes+n > r.limits.Bytes {
		oldest := r.all.first
		if oldest == d {
			oldest = d.queues[0].next
		}
		if oldest == nil {
			return false
		}
		r.evictLocked(oldest)
	}
	return true
}

// whole is the packet of a complete datagram.
func (d *datagram) whole(version uint8) []byte {
	b := make([]byte, 0, len(d.header)+d.total)
	b = append(b, d.header...)
	for _, p := range d.pieces {
		b = append(b, p.data...)
	}
	if version == 6 {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6HeaderLen))
		if d.marked && b[1]>>4&3 != 0 {
			b[1] |= 3 << 4
		}
		return b
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	if d.marked && b[1]&3 != 0 {
		b[1] |= 3
	}
	b[6], b[7] = 0, 0 // whole, and may be cut again
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], Checksum(b[:len(d.header)], 0))
	return b
}

func (r *Reassembler) expireLocked(now time.Time) {
	for d := r.all.first; d != nil && !d.deadline.After(now); d = r.all.first {
		if !d.dead {
			r.stats.Expired++
		}
		r.removeLocked(d)
	}
}

func (r *Reassembler) evictLocked(d *datagram) {
	if !d.dead {
		r.stats.Evicted++
	}
	r.removeLocked(d)
}

// killLocked frees what a datagram holds and leaves it there, so that its further
// fragments are recognised.
func (r *Reassembler) killLocked(d *datagram) {
	r.bytes -= d.have
	d.dead, d.have, d.header, d.pieces = true, 0, nil, nil
}

func (r *Reassembler) removeLocked(d *datagram) {
	r.bytes -= d.have
	delete(r.parts, d.key)
	r.all.remove(d)
	source := r.sources[d.key.source]
	source.remove(d)
	if source.length == 0 {
		delete(r.sources, d.key.source)
	}
}

// fragmentQueue is a list of datagrams in order of arrival. Each datagram is in two
// of them: that of all, and that of its source.
type fragmentQueue struct {
	which       int // index of datagram.queues
	first, last *datagram
	length      int
}

type links struct{ previous, next *datagram }

func (q *fragmentQueue) push(d *datagram) {
	d.queues[q.which] = links{previous: q.last}
	if q.last == nil {
		q.first = d
	} else {
		q.last.queues[q.which].next = d
	}
	q.last = d
	q.length++
}

func (q *fragmentQueue) remove(d *datagram) {
	l := d.queues[q.which]
	if l.previous == nil {
		q.first = l.next
	} else {
		l.previous.queues[q.which].next = l.next
	}
	if l.next == nil {
		q.last = l.previous
	} else {
		l.next.queues[q.which].previous = l.previous
	}
	q.length--
}
