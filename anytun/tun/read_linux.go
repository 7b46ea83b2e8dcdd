package tun

import (
	"fmt"
	"net"
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

// reader is the slab that packets are read into and cut in. It belongs to the
// one goroutine that calls ReadBatch.
//
//	| room | vnet header | packet      | ...   as read: the header is where room or the packet before ends
//	| room | headers, payload | room | room | headers, payload | room |   as cut
type reader struct {
	d       *Device
	room    room
	slab    []byte
	used    int
	packets [][]byte

	read  func(fd uintptr) bool // the method readAll, bound once
	errno syscall.Errno
}

func newReader(d *Device, cfg Config) *reader {
	r := &reader{
		d:       d,
		room:    room{cfg.Headroom, cfg.Tailroom},
		slab:    make([]byte, slabSize),
		packets: make([][]byte, 0, maxBatch),
	}
	r.read = r.readAll
	return r
}

// ReadBatch waits for packets from the kernel and returns all that have come,
// up to a few hundred, each with the device's headroom before and tailroom
// behind it. They are valid until the next call. TCP and UDP checksums may be
// undone. The error is net.ErrClosed after Close; any other means that the device is
// gone.
func (d *Device) ReadBatch() ([][]byte, error) {
	r := d.reader
	r.used, r.packets, r.errno = 0, r.packets[:0], 0
	err := d.rc.Read(r.read)
	switch {
	case len(r.packets) > 0: // an error comes again
		return r.packets, nil
	case d.closed.Load():
		return nil, net.ErrClosed
	case err != nil:
		return nil, fmt.Errorf("read tun %q: %w", d.name, err)
	}
	return nil, fmt.Errorf("read tun %q: %w", d.name, r.errno)
}

// readAll is given to RawConn.Read: false means wait until readable.
func (r *reader) readAll(fd uintptr) bool {
	// The header needs room before the packet, more than the caller may want.
	front := max(r.room.head, vnetSize)
	for len(r.packets) < maxBatch && len(r.slab)-r.used >= slabRoom {
		b := r.slab[r.used+front-vnetSize:]
		b = b[:vnetSize+maxPacket]
		n, _, errno := syscall.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch errno {
		case 0:
			r.take(r.used+front-r.room.head, int(n)-vnetSize, b)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return len(r.packets) > 0
		default:
			r.errno = errno
			return true
		}
	}
	return true
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
