package udp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The road of a sent datagram, on the caller's goroutine:
//
//	WriteBatch  takes a scratch from the free list
//	build       datagrams become runs of one size, runs become messages
//	flush       sendmmsg; if the kernel won't segment a run, it and what
//	            follows are built again, one datagram per message; datagrams
//	            that the kernel refuses are counted and skipped

const (
	// maxSegments is UDP_MAX_SEGMENTS where it is smallest.
	maxSegments = 64
	// maxRunBytes keeps a run with its headers below 64 KiB.
	maxRunBytes = 65000
	// maxMessages and maxIovecs are what one sendmmsg carries.
	maxMessages = 64
	maxIovecs   = 512
)

// run is the part of a batch that leaves as one message.
type run struct {
	first, count int // datagrams, as an index into the batch
	segment      int // size of all of them but perhaps the last, bytes
	bytes        int
	closed       bool // ended by a shorter datagram; one of length 0 needs no end, nothing is shorter
}

// sendBatch is the scratch of one WriteBatch. It holds pointers into the
// caller's packets only between build and the end of flush.
type sendBatch struct {
	c       *kernelConn
	msgs    [maxMessages]mmsghdr
	runs    [maxMessages]run
	control [maxMessages]control
	iovs    [maxIovecs]unix.Iovec
	name    sockaddr
	nameLen uint32
	source  netip.Addr // address to leave from; invalid: the kernel chooses
	zone    uint32     // interface index of source, if it is link-local

	lost        int // datagrams of this WriteBatch that the kernel refused
	built, niov int // messages and iovecs in use
	sent        int // messages dealt with
	errno       syscall.Errno
	again       bool

	try  func(fd uintptr)      // sendNow, bound once
	wait func(fd uintptr) bool // sendWhenWritable, bound once
}

func newSendBatch() *sendBatch {
	b := new(sendBatch)
	for i := range b.msgs {
		b.msgs[i].hdr.Name = (*byte)(unsafe.Pointer(&b.name))
	}
	b.try, b.wait = b.sendNow, b.sendWhenWritable
	return b
}

// sharedBatches are those of the sockets that share.
var sharedBatches = sync.Pool{New: func() any { return newSendBatch() }}

func (c *kernelConn) takeBatch() *sendBatch {
	var b *sendBatch
	if c.share {
		b = sharedBatches.Get().(*sendBatch)
	} else {
		select {
		case b = <-c.free:
		default:
			b = newSendBatch()
		}
	}
	b.c = c
	return b
}

func (c *kernelConn) giveBatch(b *sendBatch) {
	b.c = nil
	if c.share {
		sharedBatches.Put(b)
		return
	}
	select {
	case c.free <- b:
	default: // the collector's
	}
}

// WriteBatch implements Conn.
func (c *kernelConn) WriteBatch(pkts [][]byte, to Endpoint) error {
	_, err := c.write(pkts, to)
	return err
}

// write is WriteBatch and tells how many datagrams were sent.
func (c *kernelConn) write(pkts [][]byte, to Endpoint) (sent int, err error) {
	total := len(pkts)
	if total == 0 {
		return 0, nil
	}
	b := c.takeBatch()
	defer c.giveBatch(b)
	if !b.address(to) {
		c.counters.drop(DropBadAddress, total)
		return 0, nil
	}
	b.lost = 0
	offload := c.sendOffload.Load()
	for len(pkts) > 0 {
		n := b.build(pkts, offload)
		rest, err := b.flush(n)
		clear(b.iovs[:b.niov])
		// Merged iovecs hide all but the first packet from the collector.
		runtime.KeepAlive(pkts)
		if err != nil {
			return total - len(pkts) - b.lost, err
		}
		if rest < n {
			offload = false
		}
		pkts = pkts[rest:]
	}
	return total - b.lost, nil
}

// address prepares the destination and the source of all messages.
func (b *sendBatch) address(to Endpoint) bool {
	z := &b.c.zones
	b.nameLen = z.putAddrPort(&b.name, to.Addr, b.c.is6)
	if b.nameLen == 0 {
		return false
	}
	b.source = netip.Addr{}
	local := to.Local.Unmap()
	if b.c.wildcard && local.IsValid() && !local.IsUnspecified() && local.Is4() == to.Addr.Addr().Unmap().Is4() {
		b.source, b.zone = local, z.index(local.Zone())
	}
	return true
}

// build fills messages from the head of pkts and returns how many datagrams
// they hold, at least one.
func (b *sendBatch) build(pkts [][]byte, offload bool) int {
	b.built, b.niov, b.sent = 0, 0, 0
	taken := 0
	for _, p := range pkts {
		if b.niov == maxIovecs {
			break
		}
		if !offload || !b.extend(p) {
			if b.built == maxMessages {
				break
			}
			b.begin(p, taken)
		}
		taken++
	}
	for i := range b.built {
		b.finish(i)
	}
	return taken
}

// begin opens a message with p, the datagram at the given index.
func (b *sendBatch) begin(p []byte, index int) {
	b.runs[b.built] = run{first: index, count: 1, segment: len(p), bytes: len(p)}
	h := &b.msgs[b.built].hdr
	h.Iov = &b.iovs[b.niov]
	h.SetIovlen(0)
	b.built++
	if len(p) > 0 {
		b.gather(h, p)
	}
}

// extend adds p to the last message if the kernel can cut it off again.
func (b *sendBatch) extend(p []byte) bool {
	if b.built == 0 {
		return false
	}
	r := &b.runs[b.built-1]
	if r.closed || len(p) == 0 || len(p) > r.segment || r.count == maxSegments || r.bytes+len(p) > maxRunBytes {
		return false
	}
	r.count++
	r.bytes += len(p)
	r.closed = len(p) < r.segment
	b.gather(&b.msgs[b.built-1].hdr, p)
	return true
}

// gather appends p to the message's iovecs, or to the last of them if p begins
// where that one ends in memory.
func (b *sendBatch) gather(h *unix.Msghdr, p []byte) {
	if h.Iovlen > 0 {
		last := &b.iovs[b.niov-1]
		if uintptr(unsafe.Pointer(last.Base))+uintptr(last.Len) == uintptr(unsafe.Pointer(&p[0])) {
			last.SetLen(int(last.Len) + len(p))
			return
		}
	}
	b.iovs[b.niov].Base = &p[0]
	b.iovs[b.niov].SetLen(len(p))
	b.niov++
	h.SetIovlen(int(h.Iovlen) + 1)
}

// finish writes the rest of message i's header.
func (b *sendBatch) finish(i int) {
	h, r := &b.msgs[i].hdr, &b.runs[i]
	h.Namelen = b.nameLen
	begin, end := segmentSpace, segmentSpace
	if b.source.IsValid() {
		end += b.control[i].putSource(b.source, b.c.is6, b.zone)
	}
	if r.count > 1 {
		b.control[i].putSegment(r.segment)
		begin = 0
	}
	h.Control = nil
	if begin < end {
		h.Control = (*byte)(b.control[i].at(begin))
	}
	h.SetControllen(end - begin)
}

// flush sends what build made of n datagrams and returns how many of them are
// dealt with: fewer than n if the kernel refused to segment the next one's run.
func (b *sendBatch) flush(n int) (int, error) {
	c := b.c
	for b.sent < b.built {
		from := b.sent
		b.errno, b.again = 0, false
		// First past the descriptor's write lock, so that several goroutines
		// can be in the kernel; the lock only for waiting.
		err := c.rc.Control(b.try)
		if err == nil && b.again {
			err = c.rc.Write(b.wait)
		}
		b.count(from)
		switch {
		case errors.Is(err, net.ErrClosed):
			return 0, net.ErrClosed
		case err != nil:
			return 0, fmt.Errorf("write udp: %w", err)
		case b.errno == 0:
			continue
		}
		r := &b.runs[b.sent]
		if r.count > 1 && b.refusesSegments() {
			c.counters.resent.Add(1)
			return r.first, nil
		}
		reason, lost := dropReason(b.errno)
		if !lost {
			return 0, fmt.Errorf("write udp: %w", b.errno)
		}
		c.counters.drop(reason, r.count)
		b.lost += r.count
		b.sent++
	}
	return n, nil
}

// refusesSegments says whether the error may be about segmentation, so that
// single datagrams have a better chance.
func (b *sendBatch) refusesSegments() bool {
	switch b.errno {
	case syscall.EIO:
		// The device or the route (IPsec) can't do it, and won't tomorrow.
		b.c.sendOffload.Store(false)
		return true
	case syscall.EINVAL, syscall.EMSGSIZE, syscall.EOPNOTSUPP:
		// Segments above the path MTU can't be cut; single datagrams can be
		// fragmented. Depends on the route, so the next batch tries again.
		return true
	}
	return false
}

// count adds what was sent since the message from.
func (b *sendBatch) count(from int) {
	if from == b.sent {
		return
	}
	datagrams, bytes := 0, 0
	for _, r := range b.runs[from:b.sent] {
		datagrams += r.count
		bytes += r.bytes
	}
	b.c.counters.sent.add(datagrams, bytes, b.sent-from)
}

func (b *sendBatch) sendNow(fd uintptr) { b.again = !b.send(fd) }

// sendWhenWritable is given to RawConn.Write: false means wait until writable.
func (b *sendBatch) sendWhenWritable(fd uintptr) bool { return b.send(fd) }

// send sends messages until all are gone, one fails, or the socket's buffer is
// full (false).
func (b *sendBatch) send(fd uintptr) bool {
	for b.sent < b.built {
		n, errno := b.c.sendmmsg(fd, b.msgs[b.sent:b.built])
		switch errno {
		case 0:
			b.sent += n
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			b.errno = errno
			return true
		}
	}
	return true
}
