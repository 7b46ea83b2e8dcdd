package netstack

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The road out, all of it in the goroutine that made gVisor send:
//
//	gVisor TCP    super-segment, up to gsoMaxSize bytes of one flow
//	WritePackets  takes a batch from the pool; small packets go another way
//	              (outbox.go)
//	flows.out     notes what the connection has sent
//	batch.cut     copies headers and payload, segment by segment, to their
//	              final place, with room for the tunnel's header and tag
//	batch.flush   hands all of it to Config.Output
//
// A packet is dropped only when it exceeds the MTU or when the stack is closed.

const (
	// gsoMaxSize bounds a super-segment, in bytes: 60 KiB make a batch that
	// still fits one UDP_SEGMENT message after the tunnel's overhead.
	gsoMaxSize = 60 << 10

	// batchSize is the size in bytes of a batch's buffer: a super-segment cut
	// at the smallest MTU, and 96 bytes per packet for the headers of TCP/IP
	// and the tunnel.
	batchSize = gsoMaxSize + gsoMaxSize/1200*96 + 4096

	// maxHeaders is the most that IP and TCP headers take: 40 bytes of IPv6
	// and 60 of TCP, or 60 and 60 for IPv4.
	maxHeaders = 120
)

// Flags of TCP, RFC 9293 section 3.1.
const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagPSH = 0x08
	flagACK = 0x10
	flagECE = 0x40
	flagCWR = 0x80
)

// device is the stack's network interface. It implements stack.LinkEndpoint.
type device struct {
	mtu                uint32
	headroom, tailroom int
	output             func([][]byte)
	batches            sync.Pool // of *batch

	dispatcher atomic.Pointer[stack.NetworkDispatcher]

	inClosed, outClosed atomic.Bool

	counters counters
	flows    flowTable
	small    outbox
}

func newDevice(c *Config) *device {
	d := &device{mtu: uint32(c.MTU), headroom: c.Headroom, tailroom: c.Tailroom, output: c.Output}
	clock := c.Clock
	if clock == nil {
		clock = tcpip.NewStdClock()
	}
	d.flows.init(clock, c.Forward, &d.counters)
	d.small.init(d)
	size := max(batchSize, c.MTU+c.Headroom+c.Tailroom)
	d.batches.New = func() any { return &batch{dev: d, buf: make([]byte, size)} }
	return d
}

func (d *device) MTU() uint32                           { return d.mtu }
func (*device) SetMTU(uint32)                           {}
func (*device) MaxHeaderLength() uint16                 { return 0 }
func (*device) LinkAddress() tcpip.LinkAddress          { return "" }
func (*device) SetLinkAddress(tcpip.LinkAddress)        {}
func (*device) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (*device) AddHeader(*stack.PacketBuffer)           {}
func (*device) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (*device) Wait()                                   {}
func (*device) Close()                                  {}
func (*device) SetOnCloseAction(func())                 {}
func (*device) GSOMaxSize() uint32                      { return gsoMaxSize }
func (*device) SupportedGSO() stack.SupportedGSO        { return stack.HostGSOSupported }

// Capabilities says that transport checksums are neither to be computed nor
// verified: the AEAD of the tunnel stands for them.
func (*device) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityTXChecksumOffload | stack.CapabilityRXChecksumOffload
}

func (d *device) Attach(n stack.NetworkDispatcher) {
	if n == nil {
		d.dispatcher.Store(nil)
		return
	}
	d.dispatcher.Store(&n)
}

func (d *device) IsAttached() bool { return d.dispatcher.Load() != nil }

// WritePackets implements stack.LinkWriter.
func (d *device) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	list := pkts.AsSlice()
	if d.outClosed.Load() {
		d.counters.dropClosed.Add(uint64(len(list)))
		return len(list), nil
	}
	now := d.flows.now()
	if len(list) == 1 && list[0].Size() <= smallPacket && pieces(list[0]) == 0 {
		if held, strip := d.flows.out(list[0], now); !held {
			d.small.put(list[0], strip)
		}
		return 1, nil
	}
	b := d.batch()
	for _, p := range list {
		d.small.await(p)
		held, strip := d.flows.out(p, now)
		if !held {
			b.put(p, strip)
		}
	}
	b.done()
	return len(list), nil
}

// batch returns an empty batch; done gives it back.
func (d *device) batch() *batch { return d.batches.Get().(*batch) }

// batch is a buffer in which packets are built one behind another, each with
// room for the tunnel. It has one owner at a time.
type batch struct {
	dev  *device
	buf  []byte
	used int
	pkts [][]byte
}

// next appends a packet of n bytes and returns it for filling; what it holds
// before is undefined. When the buffer has no room left, the batch is sent
// first. n is at most the MTU.
func (b *batch) next(n int) []byte {
	d := b.dev
	if !b.fits(n) {
		b.flush()
	}
	size := d.headroom + n + d.tailroom
	p := b.buf[b.used : b.used+size : b.used+size]
	b.used += size
	b.pkts = append(b.pkts, p)
	return p[d.headroom : d.headroom+n]
}

// fits reports whether the buffer has room for a packet of n bytes.
func (b *batch) fits(n int) bool {
	return b.used+b.dev.headroom+n+b.dev.tailroom <= len(b.buf)
}

// flush sends what is in the batch and empties it.
func (b *batch) flush() {
	if len(b.pkts) == 0 {
		return
	}
	c := &b.dev.counters
	c.packetsOut.Add(uint64(len(b.pkts)))
	c.bytesOut.Add(uint64(b.used - len(b.pkts)*(b.dev.headroom+b.dev.tailroom)))
	c.batches.Add(1)
	b.dev.output(b.pkts)
	b.pkts, b.used = b.pkts[:0], 0
}

// done sends the batch and gives it back to the pool.
func (b *batch) done() {
	b.flush()
	b.dev.batches.Put(b)
}

// put appends a packet of gVisor's, cut into segments if it is a super-segment.
// strip blanks the SACK blocks of a TCP packet (mute.go).
func (b *batch) put(p *stack.PacketBuffer, strip bool) {
	c := cursorOf(p)
	if mss := pieces(p); mss > 0 {
		b.cut(&c, len(p.NetworkHeader().Slice()), p.Size()-p.Data().Size(), p.Data().Size(), mss, strip)
		return
	}
	if n := p.Size(); n <= int(b.dev.mtu) {
		to := b.next(n)
		c.read(to)
		if strip {
			stripSACK(to[len(p.NetworkHeader().Slice()):])
		}
	} else {
		b.dev.counters.dropOversize.Add(1)
	}
}

// pieces returns the payload of the segments that a super-segment is to be cut
// into, in bytes, or 0 for other packets.
func pieces(p *stack.PacketBuffer) (mss int) {
	mss = int(p.GSOOptions.MSS)
	if p.GSOOptions.Type == stack.GSONone || p.Data().Size() <= mss {
		return 0
	}
	return mss
}

// cut appends the segments of a super-segment: IP header of ipLen bytes, IP
// and TCP header of hdrLen bytes, then dataLen bytes of payload, of which each
// segment takes mss.
func (b *batch) cut(c *cursor, ipLen, hdrLen, dataLen, mss int, strip bool) {
	var hdr [maxHeaders]byte
	if hdrLen > len(hdr) || hdrLen+mss > int(b.dev.mtu) {
		b.dev.counters.dropOversize.Add(1)
		return
	}
	h := hdr[:hdrLen]
	c.read(h)
	tcp := h[ipLen:]
	if strip {
		stripSACK(tcp)
	}
	id := binary.BigEndian.Uint16(h[4:])
	seq := binary.BigEndian.Uint32(tcp[4:])
	flags := tcp[13]
	for done := 0; done < dataLen; {
		n := min(mss, dataLen-done)
		f := flags
		if done > 0 {
			f &^= flagCWR // RFC 3168 section 6.1.2: once per reduction
		}
		if done+n < dataLen {
			f &^= flagFIN | flagPSH
		}
		tcp[13] = f
		b.segment(c, h, ipLen, seq, id, n)
		id++
		done += n
		seq += uint32(n)
	}
}

// segment appends a segment with n bytes of payload from c. In its IP and TCP
// header, h, it sets what differs from one segment to the next; id is IPv4's.
func (b *batch) segment(c *cursor, h []byte, ipLen int, seq uint32, id uint16, n int) {
	binary.BigEndian.PutUint32(h[ipLen+4:], seq)
	if h[0]>>4 == 4 {
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+n))
		binary.BigEndian.PutUint16(h[4:], id)
		setIPv4Checksum(h[:ipLen])
	} else {
		binary.BigEndian.PutUint16(h[4:], uint16(len(h)+n-header.IPv6MinimumSize))
	}
	p := b.next(len(h) + n)
	copy(p, h)
	c.read(p[len(h):])
}

// setIPv4Checksum computes the checksum of an IPv4 header in place.
func setIPv4Checksum(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^fold(sum(0, h)))
}

// sum adds b to a one's complement sum that is not yet folded. An odd last
// byte counts as the upper half of a word (RFC 1071).
func sum(acc uint64, b []byte) uint64 {
	for ; len(b) >= 4; b = b[4:] {
		acc += uint64(binary.BigEndian.Uint32(b))
	}
	if len(b) >= 2 {
		acc += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		acc += uint64(b[0]) << 8
	}
	return acc
}

// fold reduces a sum to 16 bits.
func fold(acc uint64) uint16 {
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// cursor reads the bytes of a packet buffer once, front to back.
type cursor struct {
	view *buffer.View
	rest []byte
}

func cursorOf(p *stack.PacketBuffer) cursor {
	views, skip := p.AsViewList()
	c := cursor{view: views.Front()}
	for c.view != nil && skip >= c.view.Size() {
		skip -= c.view.Size()
		c.view = c.view.Next()
	}
	if c.view != nil {
		c.rest = c.view.AsSlice()[skip:]
	}
	return c
}

// read fills b, or as much of it as there are bytes left.
func (c *cursor) read(b []byte) {
	for len(b) > 0 && c.view != nil {
		n := copy(b, c.rest)
		b, c.rest = b[n:], c.rest[n:]
		if len(c.rest) == 0 {
			if c.view = c.view.Next(); c.view != nil {
				c.rest = c.view.AsSlice()
			}
		}
	}
}
