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
	size  int // bytes in them
	least int // messages that are asked for at a time, when they are large
	most  int // and when they are small
	ask   int // now
	errno syscall.Errno

	packets [][]byte // slab that groups' Packets are parts of
	groups  []Group
}

// idleReaders are those of the sockets that share.
var idleReaders sync.Pool // of *reader

func (c *kernelConn) takeReader() {
	if r, ok := idleReaders.Get().(*reader); ok && r.least == c.messages {
		c.reader = r
		return
	}
	c.reader = newReader(c.messages, c.messages)
}

func (c *kernelConn) giveReader() {
	idleReaders.Put(c.reader)
	c.reader = nil
}

// newReader returns a ring for least messages that grows to most when it is to
// take small ones.
func newReader(least, most int) *reader {
	r := &reader{
		least: least, most: max(least, most), ask: least,
		packets: make([][]byte, 0, least*maxSegments),
	}
	r.room(least)
	return r
}

// room makes the ring as long as n messages.
func (r *reader) room(n int) {
	r.msgs = make([]mmsghdr, n)
	r.iovs = make([]unix.Iovec, n)
	r.names = make([]sockaddr, n)
	r.control = make([]control, n)
	r.groups = make([]Group, 0, n)
	for len(r.bufs) < n {
		r.bufs = append(r.bufs, make([]byte, messageSize))
	}
	for i := range r.msgs {
		r.iovs[i].Base = &r.bufs[i][0]
		r.iovs[i].SetLen(messageSize)
		h := &r.msgs[i].hdr
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Control = (*byte)(r.control[i].at(0))
	}
}

// adapt chooses how many messages the next read asks for, by what the last one has
// brought. Where nothing has joined the
// datagrams, as many as the few messages of joined ones would hold should come at
// once, since all that follows works on batches. Large messages, on the other hand,
// are better taken few at a time, while they are in the processor's cache.
func (r *reader) adapt() {
	switch {
	case r.n == r.ask && r.ask < r.most && r.size < r.n*smallMessage:
		r.ask = r.most
		if len(r.msgs) < r.most {
			r.room(r.most)
		}
	case r.ask > r.least && r.size >= r.n*smallMessage:
		r.ask = r.least
	}
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
		c.cut(r)
		c.calls.Came(len(r.packets))
		if len(r.groups) > 0 {
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
	r.adapt()
	r.n, r.size, r.errno = 0, 0, 0
	for i := range r.ask {
		h := &r.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSize)
		h.Flags = 0
	}
	for tries := 1; ; tries++ {
		n, errno := c.recvmmsg(fd, r.msgs[:r.ask])
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
		r.size += int(m.len)
		r.add(from, r.bufs[i][:m.len], segment)
	}
	if n := len(r.packets); n > 0 {
		c.counters.received.add(n, r.size, r.n)
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
