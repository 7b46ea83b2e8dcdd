package netstack

import (
	"encoding/binary"
	"runtime"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Most packets of short connections are small and come one at a time, from a
// goroutine that served one connection: a SYN, a bare acknowledgement, a request,
// a FIN. Sent one by one each costs a system call, a road through the kernel and a
// wake-up at the other end. So they are gathered for as long as other goroutines
// are ready to run, and they leave together:
//
//	WritePackets  a single small packet is put into the outbox
//	put           copies it to its final place; the one that makes the batch full
//	              sends it
//	run           else sends what there is, after those that were ready to run
//	Input         likewise, at the end of a batch
//
// Nobody waits for more packets to come: where nothing else is ready to run, run is
// next. A connection's packets stay in order: only one batch of small packets is
// being sent at a time, and larger ones wait until those of their connection have
// left.

const (
	// smallPacket is the size in bytes up to which a packet is gathered. Packets
	// that are larger, and not super-segments, need an MTU above it.
	smallPacket = 2 << 10

	// fullOutbox is how many packets are sent without waiting for others: enough to
	// share the costs, while the other end already works on those before.
	fullOutbox = 16
)

// outbox gathers small packets. While one batch is being sent the next one may
// grow beyond fullOutbox, up to its buffer's size; then who has more waits.
type outbox struct {
	dev  *device
	wake chan struct{} // run has something to do; room for one
	quit chan struct{}
	done chan struct{} // run has ended

	mu      sync.Mutex
	idle    sync.Cond // sending has become false
	pending *batch    // nil: nothing
	sending bool
	// Sets of connections, see flowBit: those with packets in pending, and in what
	// is being sent.
	pendingFlows, sendingFlows uint64

	flows atomic.Uint64 // both
}

func (o *outbox) init(d *device) {
	o.dev = d
	o.wake, o.quit, o.done = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	o.idle.L = &o.mu
}

// flowBit is the set of the connection that p belongs to, and of one in 64 others.
func flowBit(p *stack.PacketBuffer) uint64 {
	ports := p.TransportHeader().Slice()
	if len(ports) < 4 {
		return 1
	}
	return 1 << ((binary.BigEndian.Uint16(ports) ^ binary.BigEndian.Uint16(ports[2:])) & 63)
}

// put takes a packet of at most smallPacket bytes.
func (o *outbox) put(p *stack.PacketBuffer, strip bool) {
	d := o.dev
	o.mu.Lock()
	for o.pending != nil && !o.pending.fits(p.Size()) {
		o.proceed()
	}
	b := o.pending
	if b == nil {
		b = d.batch()
		o.pending = b
	}
	first := len(b.pkts) == 0
	b.put(p, strip)
	o.pendingFlows |= flowBit(p)
	o.flows.Store(o.pendingFlows | o.sendingFlows)
	switch {
	case o.sending: // who sends will see to it
		o.mu.Unlock()
	case len(b.pkts) >= fullOutbox:
		o.sendPending()
	default:
		o.mu.Unlock()
		if first {
			o.notify()
		}
	}
}

// flush sends what there is, if nobody is at it. It is cheap if there is nothing.
func (o *outbox) flush() {
	if o.flows.Load() == 0 {
		return
	}
	o.mu.Lock()
	if o.sending || o.pending == nil {
		o.mu.Unlock()
		return
	}
	o.sendPending()
}

// await returns when no packet of p's connection is in the outbox any more.
func (o *outbox) await(p *stack.PacketBuffer) {
	if flow := flowBit(p); o.flows.Load()&flow != 0 {
		o.drain(flow)
	}
}

// drain sends until no packet of a set of connections is in the outbox any more.
func (o *outbox) drain(flows uint64) {
	o.mu.Lock()
	for (o.pendingFlows|o.sendingFlows)&flows != 0 {
		o.proceed()
	}
	o.mu.Unlock()
}

// proceed waits for what is being sent, or else sends what is pending. It is called
// with mu held, and gives it up meanwhile.
func (o *outbox) proceed() {
	if o.sending {
		o.idle.Wait()
		return
	}
	o.sendPending()
	o.mu.Lock()
}

// sendPending sends what is pending. It is called with mu held, and returns
// without.
func (o *outbox) sendPending() {
	b := o.pending
	o.pending, o.sending = nil, true
	o.pendingFlows, o.sendingFlows = 0, o.pendingFlows
	o.mu.Unlock()
	b.done()
	o.mu.Lock()
	o.sending, o.sendingFlows = false, 0
	o.flows.Store(o.pendingFlows)
	more := o.pending != nil
	o.idle.Broadcast()
	o.mu.Unlock()
	if more {
		o.notify()
	}
}

func (o *outbox) notify() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// run sends what others leave in the outbox, until close.
func (o *outbox) run() {
	defer close(o.done)
	for {
		select {
		case <-o.wake:
			// After those that are ready to run, and may have something to add.
			runtime.Gosched()
			o.flush()
		case <-o.quit:
			return
		}
	}
}

// close sends what is left and ends run. It returns after the last batch has gone.
func (o *outbox) close() {
	close(o.quit)
	<-o.done
	o.drain(^uint64(0))
}
