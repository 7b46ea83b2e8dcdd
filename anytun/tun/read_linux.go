package tun

import (
	"fmt"
	"net"
	"sync"
	"syscall"
	"unsafe"
)

const (
	// slabSize holds one batch. It shouldn't be larger than a core's cache.
	slabSize = 384 << 10

	// slabRoom is what has to be left of it for the next read: the longest
	// packet with room around each of its pieces, if they aren't tiny.
	slabRoom = 128 << 10

	// maxBatch is how many packets make a batch full.
	maxBatch = 512
)

// reader is the slab that packets are read into and cut in. It belongs to who has
// the turn.
//
//	| room | vnet header | packet      | ...   as read: the header is where room or the packet before ends
//	| room | headers, payload | room | room | headers, payload | room |   as cut
type reader struct {
	d       *Device
	room    room
	slab    []byte
	used    int
	packets [][]byte
	errno   syscall.Errno

	// turn is held from a read until its packets are done with, so that batches
	// leave in the order in which they came.
	turn sync.Mutex
	held bool // by the caller of ReadBatch, who alone looks at this

	wait func(fd uintptr) bool // the methods readWaiting and readNow, bound once
	now  func(fd uintptr)
}

func newReader(d *Device, cfg Config) *reader {
	r := &reader{
		d:       d,
		room:    room{cfg.Headroom, cfg.Tailroom},
		slab:    make([]byte, slabSize),
		packets: make([][]byte, 0, maxBatch),
	}
	r.wait, r.now = r.readWaiting, r.readNow
	return r
}

// ReadBatch waits for packets from the kernel and returns all that have come,
// up to a few hundred, each with the device's headroom before and tailroom
// behind it. They are valid until the next call. TCP and UDP checksums may be
// undone. The error is net.ErrClosed after Close; any other means that the device is
// gone.
func (d *Device) ReadBatch() ([][]byte, error) {
	r := d.reader
	r.release()
	err := d.rc.Read(r.wait)
	if r.held {
		if len(r.packets) > 0 { // an error comes again
			return r.packets, nil
		}
		errno := r.errno
		r.release()
		if err == nil && !d.closed.Load() {
			return nil, fmt.Errorf("read tun %q: %w", d.name, errno)
		}
	}
	if d.closed.Load() {
		return nil, net.ErrClosed
	}
	return nil, fmt.Errorf("read tun %q: %w", d.name, err)
}

// TryRead hands over the packets that have come, as ReadBatch returns them, if
// there are any and the caller of ReadBatch has no batch in hand. They are valid
// until handle returns, which must not call ReadBatch or TryRead.
//
// It is for who is busy and may keep the one that waits in ReadBatch from running.
func (d *Device) TryRead(handle func(pkts [][]byte)) {
	r := d.reader
	if !r.turn.TryLock() {
		return
	}
	defer r.turn.Unlock()
	r.packets = r.packets[:0]
	_ = d.rc.Control(r.now) // errors are ReadBatch's to report
	if len(r.packets) > 0 {
		handle(r.packets)
	}
}

// release ends the turn of ReadBatch's caller.
func (r *reader) release() {
	if r.held {
		r.held = false
		r.turn.Unlock()
	}
}

// readWaiting is given to RawConn.Read: false means wait until readable.
func (r *reader) readWaiting(fd uintptr) bool {
	r.turn.Lock()
	r.held = true
	if r.read(fd); len(r.packets) > 0 || r.errno != 0 {
		return true
	}
	r.release()
	return false
}

// readNow is given to RawConn.Control.
func (r *reader) readNow(fd uintptr) { r.read(fd) }

// read reads what there is, as far as there is room.
func (r *reader) read(fd uintptr) {
	r.readAll(fd)
	r.d.calls.Came(len(r.packets))
}

func (r *reader) readAll(fd uintptr) {
	r.used, r.packets, r.errno = 0, r.packets[:0], 0
	// The header needs room before the packet, more than the caller may want.
	front := max(r.room.head, vnetSize)
	for len(r.packets) < maxBatch && len(r.slab)-r.used >= slabRoom {
		b := r.slab[r.used+front-vnetSize:]
		b = b[:vnetSize+maxPacket]
		n, errno := r.d.calls.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
		switch errno {
		case 0:
			r.take(r.used+front-r.room.head, int(n)-vnetSize, b)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return
		default:
			r.errno = errno
			return
		}
	}
}

// take cuts the packet of n bytes that was read into b, behind its vnet header;
// its buffer begins at slab[at].
func (r *reader) take(at, n int, b []byte) {
	c := &r.d.counters
	if n <= 0 {
		c.drop(DropMalformed, 1)
		return
	}
	v := getVnet(b)
	pkt := b[vnetSize : vnetSize+n]
	p, why, ok := planCut(pkt, v)
	if !ok {
		c.drop(why, 1)
		return
	}
	if p.count == 1 && !finish(pkt, &p.layout, v) {
		c.drop(DropMalformed, 1)
		return
	}
	space := p.space(r.room)
	buf := r.slab[at:]
	if len(buf) >= space {
		r.used = at + space
	} else {
		// A super-packet of tiny pieces. Rare enough to be left to the collector.
		buf = make([]byte, space)
		copy(buf[r.room.head:], pkt)
	}
	r.packets = cut(r.packets, buf[:space:space], &p, r.room)
	c.read.add(p.count, p.size+(p.count-1)*p.head, 1)
}
