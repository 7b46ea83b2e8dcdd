package netstack

import (
	"net/netip"
	"slices"
	"sync"
)

// udpRoom is what a datagram in a queue has before it, in bytes: enough for the
// header that a proxy puts there.
const udpRoom = 32

const (
	// A socket on which little comes gets along with small chunks; one that
	// doesn't keep up gets large ones, which hold the longest datagram and are
	// handed over at once.
	smallChunk = 4 << 10
	largeChunk = 64<<10 + udpRoom

	// datagramCost is what a datagram counts for beside its payload, in bytes:
	// its room, and its place in the two lists.
	datagramCost = udpRoom + 56
)

// udpChunk is a run of datagrams one behind another in memory, each with udpRoom
// bytes before it. It belongs to the queue, then to the reader.
type udpChunk struct {
	buf       []byte
	used      int
	datagrams [][]byte // with their room
	from      []netip.AddrPort
	next      *udpChunk
}

var (
	smallChunks = sync.Pool{New: func() any { return &udpChunk{buf: make([]byte, smallChunk)} }}
	largeChunks = sync.Pool{New: func() any { return &udpChunk{buf: make([]byte, largeChunk)} }}
)

// done gives the chunk back; a nil one is none.
func (k *udpChunk) done() {
	if k == nil {
		return
	}
	k.used, k.datagrams, k.from = 0, k.datagrams[:0], k.from[:0]
	if len(k.buf) == smallChunk {
		smallChunks.Put(k)
	} else {
		largeChunks.Put(k)
	}
}

// put appends a datagram, or returns false if there is no room.
func (k *udpChunk) put(from netip.AddrPort, payload []byte) bool {
	n := udpRoom + len(payload)
	if n > len(k.buf)-k.used {
		return false
	}
	d := k.buf[k.used : k.used+n : k.used+n]
	k.used += n
	copy(d[udpRoom:], payload)
	k.datagrams, k.from = append(k.datagrams, d), append(k.from, from)
	return true
}

// udpQueue holds the datagrams that wait for a socket's reader.
type udpQueue struct {
	mu         sync.Mutex
	head, tail *udpChunk // tail means nothing without head
	bytes      int       // of payloads, and datagramCost each
	closed     bool
}

// put appends a copy of a datagram. first says that there was none before; ok is
// false if there is no space.
func (q *udpQueue) put(from netip.AddrPort, payload []byte) (first, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.bytes >= udpBuffer {
		return false, false
	}
	q.bytes += datagramCost + len(payload)
	if q.head != nil && q.tail.put(from, payload) {
		return false, true
	}
	pool := &largeChunks
	if q.head == nil && udpRoom+len(payload) <= smallChunk {
		pool = &smallChunks
	}
	k := pool.Get().(*udpChunk)
	k.put(from, payload)
	if first = q.head == nil; first {
		q.head = k
	} else {
		q.tail.next = k
	}
	q.tail = k
	return first, true
}

// take removes the first chunk, or returns nil if there is none.
func (q *udpQueue) take() *udpChunk {
	q.mu.Lock()
	defer q.mu.Unlock()
	k := q.head
	if k != nil {
		q.head, k.next = k.next, nil
		q.bytes -= k.used + (datagramCost-udpRoom)*len(k.datagrams)
	}
	return k
}

// close forgets what waits and takes nothing any more.
func (q *udpQueue) close() {
	q.mu.Lock()
	q.head, q.closed = nil, true
	q.mu.Unlock()
}

// udpSockets finds a stack's sockets by their port.
type udpSockets struct {
	mu     sync.RWMutex
	byPort map[uint16][]*PacketConn // several if bound to different addresses
}

func (u *udpSockets) add(c *PacketConn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byPort == nil {
		u.byPort = make(map[uint16][]*PacketConn)
	}
	port := c.at.Port()
	u.byPort[port] = append(u.byPort[port], c)
}

func (u *udpSockets) remove(c *PacketConn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	port := c.at.Port()
	rest := slices.DeleteFunc(u.byPort[port], func(o *PacketConn) bool { return o == c })
	if len(rest) > 0 {
		u.byPort[port] = rest
	} else {
		delete(u.byPort, port)
	}
}

// find returns the socket that takes datagrams to `to`, or nil.
func (u *udpSockets) find(to netip.AddrPort) *PacketConn {
	u.mu.RLock()
	defer u.mu.RUnlock()
	for _, c := range u.byPort[to.Port()] {
		if c.dual || c.at.Addr() == to.Addr() {
			return c
		}
	}
	return nil
}
