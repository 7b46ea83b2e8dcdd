package netstack

import (
	"io"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"
)

// gate is where one direction of a socket waits. Whoever changes something
// that a waiter must look at again calls wake: gVisor when the endpoint became
// ready, a deadline that passed, Close. One goroutine waits at a time, which
// is the one that holds the direction's lock.
type gate struct {
	ch chan struct{} // capacity 1: a wake before the wait isn't lost

	mu      sync.Mutex
	timer   *time.Timer // nil without a deadline in the future
	expired bool
}

func (g *gate) init() { g.ch = make(chan struct{}, 1) }

func (g *gate) wake() {
	select {
	case g.ch <- struct{}{}:
	default:
	}
}

// setDeadline sets the time from which on expired reports true; the zero time
// means never.
func (g *gate) setDeadline(t time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
	g.expired = false
	if t.IsZero() {
		return
	}
	d := time.Until(t)
	if d <= 0 {
		g.expired = true
		g.wake()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.timer == timer { // not replaced meanwhile
			g.timer = nil
			g.expired = true
			g.wake()
		}
	})
	g.timer = timer
}

// stop releases the deadline's timer.
func (g *gate) stop() { g.setDeadline(time.Time{}) }

func (g *gate) isExpired() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.expired
}

const (
	readEvents  = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr | waiter.EventRdHUp
	writeEvents = waiter.WritableEvents | waiter.EventHUp | waiter.EventErr
)

// gates are the two directions of an endpoint, as gVisor's listener.
type gates struct {
	read, write gate
	entry       waiter.Entry
}

func (g *gates) init(wq *waiter.Queue) {
	g.read.init()
	g.write.init()
	g.entry.Init(g, readEvents|writeEvents)
	wq.EventRegister(&g.entry)
}

// NotifyEvent implements waiter.EventListener. It may run under gVisor's locks
// and so only wakes.
func (g *gates) NotifyEvent(mask waiter.EventMask) {
	if mask&readEvents != 0 {
		g.read.wake()
	}
	if mask&writeEvents != 0 {
		g.write.wake()
	}
}

// close wakes everybody for good; the socket's closed flag is set before.
func (g *gates) close() {
	g.read.stop()
	g.write.stop()
	g.read.wake()
	g.write.wake()
}

// sliceWriter lets gVisor write into a slice.
type sliceWriter struct {
	b []byte
	n int
}

func (w *sliceWriter) Write(p []byte) (int, error) {
	n := copy(w.b[w.n:], p)
	w.n += n
	if n < len(p) {
		return n, errFull
	}
	return n, nil
}

// sliceReader lets gVisor read from a slice; it is a tcpip.Payloader.
type sliceReader struct{ b []byte }

func (r *sliceReader) Len() int { return len(r.b) }

func (r *sliceReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, errEmpty
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

// outgoing is what a connection writes, from a slice or, if it isn't nil, from
// another source, at most a chunk at a time; it is a tcpip.Payloader.
type outgoing struct {
	sliceReader
	from tcpip.Payloader
	most int
}

func (o *outgoing) Len() int {
	if o.from != nil {
		return min(o.from.Len(), o.most)
	}
	return min(len(o.b), o.most)
}

func (o *outgoing) Read(p []byte) (int, error) {
	if o.from == nil {
		return o.sliceReader.Read(p)
	}
	n, err := o.from.Read(p)
	if n == 0 && err == nil && len(p) > 0 || err == io.EOF { //nolint:errorlint // gVisor would ask again for ever
		return n, io.ErrUnexpectedEOF
	}
	return n, err
}

// chunk is how many bytes a connection to addr gives gVisor at a time: full
// segments, as many as gVisor sends as one super-segment. gVisor keeps writes
// apart, so chunks of another size would end in short segments, which nothing on
// the road can join or send together with their neighbours.
func chunk(mtu uint32, addr netip.Addr) int {
	const timestamps = 12 // RFC 7323, with padding; nearly every peer has them
	mss := int(mtu) - header.TCPMinimumSize - timestamps - header.IPv4MinimumSize
	if !addr.Is4() {
		mss -= header.IPv6MinimumSize - header.IPv4MinimumSize
	}
	most := gsoMaxSize - header.TCPTotalHeaderMaximumSize - 1 // gVisor's limit
	return max(most/mss, 1) * mss
}
