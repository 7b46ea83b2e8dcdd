package udp

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The road of a received datagram:
//
//	ReadBatch   waits in the runtime's poller until the socket is readable
//	receive     recvmmsg into the ring; errors that ICMP left behind are
//	            counted and skipped
//	cut         per message: drop if truncated, find the local address and the
//	            segment size, cut, append to the group of its endpoint
//
// All of it runs on the caller's goroutine and allocates nothing in the long run.

// maxReadErrors in a row mean that the socket is broken. Each ICMP message makes
// one at most, and datagrams come in between.
const maxReadErrors = 1000

// reader is the ring of receive buffers. It belongs to the one goroutine that
// calls ReadBatch.
type reader struct {
	msgs    []mmsghdr
	iovs    []unix.Iovec
	names   []sockaddr
	control []control
	bufs    [][]byte

	n     int // messages received
	errno syscall.Errno

	packets [][]byte // slab that groups' Packets are parts of
	groups  []Group
}

// idleReaders are those of the sockets that share.
var idleReaders sync.Pool // of *reader

func (c *kernelConn) takeReader() {
	if r, ok := idleReaders.Get().(*reader); ok && len(r.msgs) == c.messages {
		c.reader = r
		return
	}
	c.reader = newReader(c.messages)
}

func (c *kernelConn) giveReader() {
	idleReaders.Put(c.reader)
	c.reader = nil
}

func newReader(messages int) *reader {
	r := &reader{
		msgs:    make([]mmsghdr, messages),
		iovs:    make([]unix.Iovec, messages),
		names:   make([]sockaddr, messages),
		control: make([]control, messages),
		bufs:    make([][]byte, messages),
		packets: make([][]byte, 0, messages*maxSegments),
		groups:  make([]Group, 0, messages),
	}
	for i := range r.msgs {
		r.bufs[i] = make([]byte, messageSize)
		r.iovs[i].Base = &r.bufs[i][0]
		r.iovs[i].SetLen(messageSize)
		h := &r.msgs[i].hdr
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Control = (*byte)(r.control[i].at(0))
	}
	return r
}

// ReadBatch implements Conn.
func (c *kernelConn) ReadBatch() ([]Group, error) {
	for {
		err := c.rc.Read(c.receive)
		r := c.reader
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil, net.ErrClosed
		case err != nil:
			return nil, fmt.Errorf("read udp: %w", err)
		case r.errno != 0:
			return nil, fmt.Errorf("read udp: %w", r.errno)
		}
		if c.cut(r); len(r.groups) > 0 {
			return r.groups, nil
		}
	}
}

// receiveMessages is given to RawConn.Read: false means wait until readable.
func (c *kernelConn) receiveMessages(fd uintptr) bool {
	if c.reader == nil {
		c.takeReader()
	}
	if c.reader.receive(c, fd) {
		return true
	}
	if c.share {
		c.giveReader()
	}
	return false
}

// receive fills the ring, or returns false if there is nothing.
func (r *reader) receive(c *kernelConn, fd uintptr) bool {
	r.n, r.errno = 0, 0
	for i := range r.msgs {
		h := &r.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSize)
		h.Flags = 0
	}
	for tries := 1; ; tries++ {
		n, errno := c.recvmmsg(fd, r.msgs)
		switch errno {
		case 0:
			r.n = n
			return true
		case syscall.EAGAIN:
			return false
		case syscall.EINTR:
			continue
		}
		reason, lost := dropReason(errno)
		if !lost || reason == DropBadAddress || tries == maxReadErrors {
			r.errno = errno
			return true
		}
		c.counters.drop(reason, 1)
	}
}

// cut makes groups of the received messages.
func (c *kernelConn) cut(r *reader) {
	r.packets, r.groups = r.packets[:0], r.groups[:0]
	size := 0
	for i := range r.n {
		m := &r.msgs[i]
		if m.hdr.Flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			// Without all control data the segment size may be missing.
			c.counters.drop(DropTruncated, 1)
			continue
		}
		local, segment := r.control[i].parse(int(m.hdr.Controllen), &c.zones)
		if !c.wildcard {
			local = c.local.Addr()
		}
		from := Endpoint{Addr: c.zones.addrPort(&r.names[i]), Local: local}
		size += int(m.len)
		r.add(from, r.bufs[i][:m.len], segment)
	}
	if n := len(r.packets); n > 0 {
		c.counters.received.add(n, size, r.n)
	}
}

// add cuts b into datagrams of segment bytes, the last one possibly shorter.
func (r *reader) add(from Endpoint, b []byte, segment int) {
	first := len(r.packets)
	if segment <= 0 || segment > len(b) {
		segment = len(b)
	}
	for {
		n := min(segment, len(b))
		r.packets = append(r.packets, b[:n:n])
		if b = b[n:]; len(b) == 0 {
			break
		}
	}
	// Messages of one endpoint in a row become one group: on kernels without
	// UDP_GRO this is the batch.
	if k := len(r.groups) - 1; k >= 0 && r.groups[k].From == from {
		g := &r.groups[k]
		first -= len(g.Packets)
		g.Packets = r.packets[first:len(r.packets):len(r.packets)]
		return
	}
	r.groups = append(r.groups, Group{From: from, Packets: r.packets[first:len(r.packets):len(r.packets)]})
}
