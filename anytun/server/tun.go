package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/nat"
	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/wire"
)

// The road of the tun egress. It has no state of connections: source address
// and port of a packet that leaves say whose it is, and destination address and
// port of one that comes say whose it will be.
//
//	out  Input      receiveLoop's goroutine
//	     outward    tun_out.go: is the port the client's? then its public address
//	                becomes the source; ICMP errors and what they quote likewise
//	     WriteBatch the device joins segments; the kernel forwards
//	in   readLoop   the device's super-packets come cut, with room around them
//	     inward     tun_in.go: whose port? then that client's inner address
//	                becomes the destination; acknowledgements that others of
//	                the batch make superfluous are left out (tun_acks.go)
//	     output     send.go
//
// Either way, what was found out about a flow's first packet in a batch holds for
// the others (tun_flow.go).
//
// Three things keep something for a moment: fragments, of which only the first
// has ports, are put together within bounds; clients enrolled as any-port get
// mappings (anytun/nat); and the servers' own addresses, DNS above all, are
// ended by the netstack of a sockets egress that lets nothing else out.

// Device is the tun egress's way to the kernel: anytun/tun's, or a test's.
type Device interface {
	// ReadBatch waits for packets, each with room for the tunnel around it and
	// no larger than the inner MTU. They are valid until the next call. It
	// returns net.ErrClosed after Close.
	ReadBatch() ([][]byte, error)
	// WriteBatch takes packets, whose TCP and UDP checksums it computes. It may
	// change them.
	WriteBatch(pkts [][]byte)
	Close() error
}

// tryReader is a Device that can be asked without waiting. handle gets what
// ReadBatch would return now, unless there is nothing or its last batch is in
// use. The packets are valid until handle returns.
type tryReader interface {
	TryRead(handle func(pkts [][]byte))
}

const (
	// Bounds of reassembly, for each direction.
	fragmentBytes   = 8 << 20
	fragmentTimeout = 5 * time.Second
	// echoRate and echoBurst bound the echo requests from outside that are
	// answered, per second and at once.
	echoRate, echoBurst = 1000, 1000
)

// tunConfig is what the tun egress needs of its server.
type tunConfig struct {
	Device   Device
	Plan     *portblock.Plan
	Leases   *portblock.Leases
	Inner    session.Inner
	AnyPort  func(client uint32) bool
	Service  []netip.AddrPort // egress addresses and ports at which the outer sockets listen
	MTU      int
	Services *sockets
	Policy   egressPolicy
	Output   func([][]byte)
	Reject   func(client uint32, p []byte, kind packet.ErrorKind) // tells a client why its packet went nowhere
	Publish  func(registry.Mapping)
}

// tunEgress lets packets out by a device of the kernel. Its methods are safe for
// concurrent use.
type tunEgress struct {
	tunConfig
	nat     *nat.Table
	scratch sync.Pool // of *outBatch
	count   tunCounters

	tryReader tryReader           // the device, or nil
	in        inBatch             // of who reads from the device
	handle    func(pkts [][]byte) // fromDevice, bound once

	outFragments, inFragments *packet.Reassembler
	fragmentID                atomic.Uint32 // of datagrams that are cut here

	echoMu sync.Mutex // guards echoes
	echoes session.Bucket
}

func newTunEgress(c tunConfig) *tunEgress {
	e := &tunEgress{tunConfig: c}
	e.nat = nat.New(nat.Config{Publish: e.publishMapping})
	limits := packet.ReassemblyLimits{Bytes: fragmentBytes, Timeout: fragmentTimeout}
	e.outFragments, e.inFragments = packet.NewReassembler(limits), packet.NewReassembler(limits)
	e.fragmentID.Store(rand.Uint32()) // so that a server that starts again doesn't repeat itself
	e.tryReader, _ = c.Device.(tryReader)
	e.handle = e.fromDevice
	e.scratch.New = func() any { return new(outBatch) }
	return e
}

// Run implements Egress. It closes the device.
func (e *tunEgress) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := e.Services.Run(ctx); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("services: %w", err))
		}
	})
	wg.Go(func() {
		if err := e.readLoop(); err != nil {
			cancel(fmt.Errorf("tun device: %w", err))
		}
	})
	wg.Go(func() { e.sweepLoop(ctx) })
	<-ctx.Done()
	err := e.Device.Close()
	wg.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	if err != nil {
		return fmt.Errorf("tun device: %w", err)
	}
	return nil
}

// Drain implements Egress: open connections don't live here, so there is
// nothing to refuse. Who drains a server takes its routes away.
func (e *tunEgress) Drain() {}

func (e *tunEgress) sweepLoop(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			e.outFragments.Sweep(now)
			e.inFragments.Sweep(now)
			e.nat.Sweep(now)
		}
	}
}

// closeClient ends what the egress keeps for a client that is gone for good.
func (e *tunEgress) closeClient(client uint32) {
	e.Services.CloseClient(client)
	e.nat.Forget(client, 0, math.MaxUint16)
}

func (e *tunEgress) publishMapping(m nat.Mapping) { e.Publish(mappingOf(m)) }

func mappingOf(m nat.Mapping) registry.Mapping {
	return registry.Mapping{Client: m.Client, Protocol: byte(m.Protocol), Inner: m.Inner, Public: m.Public, Since: m.Since}
}

// Mapping implements registry.Handler.
func (n *news) Mapping(m registry.Mapping) {
	if e, ok := n.egress.(*tunEgress); ok && n.cfg.Clients.AnyPort(m.Client) {
		e.nat.Learn(nat.Mapping{Client: m.Client, Protocol: packet.Protocol(m.Protocol), Inner: m.Inner, Public: m.Public, Since: m.Since})
	}
}

// Mappings implements registry.Handler.
func (n *news) Mappings(yield func(registry.Mapping) bool) {
	e, ok := n.egress.(*tunEgress)
	if !ok {
		return
	}
	e.nat.All(func(m nat.Mapping) bool { return yield(mappingOf(m)) })
}

// readLoop takes packets from the kernel until the device is closed.
func (e *tunEgress) readLoop() error {
	for {
		bufs, err := e.Device.ReadBatch()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		e.fromDevice(bufs)
	}
}

// poll does readLoop's work once, if there is some and readLoop isn't at it.
//
// A receiveLoop that always finds datagrams calls it in between. It would else
// keep readLoop from running where Go code has a single processor: while anything
// runs there, the runtime looks for readable files only every 10 ms, and by then
// the device's queue has overflowed.
func (e *tunEgress) poll() {
	if e.tryReader != nil {
		e.tryReader.TryRead(e.handle)
	}
}

// fromDevice handles one batch, for one caller at a time.
func (e *tunEgress) fromDevice(bufs [][]byte) {
	b := &e.in
	b.out, b.replies = b.out[:0], b.replies[:0]
	b.packets, b.bytes = 0, 0
	b.flows.begin()
	b.acks.begin()
	for _, buf := range bufs {
		e.inward(b, buf)
	}
	e.count.packetsIn.Add(b.packets)
	e.count.bytesIn.Add(b.bytes)
	e.count.superfluous.Add(uint64(b.acks.gone))
	b.out = b.acks.end(b.out)
	if len(b.out) > 0 {
		e.Output(b.out)
	}
	if len(b.replies) > 0 {
		e.Device.WriteBatch(b.replies)
	}
}

// room returns a buffer for a packet of n bytes that goes to a client.
func room(n int) []byte { return make([]byte, wire.Overhead+n) }

// inside is the packet in such a buffer.
func inside(buf []byte) []byte { return buf[wire.DataHeaderLen : len(buf)-wire.TagLen] }

// innerAddress is a client's inner address of a family.
func (e *tunEgress) innerAddress(client uint32, version uint8) netip.Addr {
	if version == 4 {
		return e.Inner.IPv4(client)
	}
	return e.Inner.IPv6(client)
}
