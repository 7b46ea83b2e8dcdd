package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The road in, all of it in Input's goroutine:
//
//	Input          puts the batch in order (order.go), walks it
//	parseIP        malformed packets and unknown protocols are dropped
//	admit          UDP goes to its socket (packetconn.go); Forward only: UDP for
//	               others goes to ForwardUDP's handler, ICMP for others is dropped
//	startRun, run  counts the TCP segments that follow each other
//	flows.in       notes what the peer has got; a duplicate acknowledgement may
//	               have to wait (hold.go)
//	acks.take      of a flow's acknowledgements only the highest goes on (acks.go)
//	deliver        one copy to a gVisor buffer, one packet to gVisor
//
// gVisor's own goroutines take over where a packet reaches a TCP endpoint.

// Protocol numbers of IANA.
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoICMPv6   = 58
	protoDestOpts = 60
)

// packet is what the stack wants to know of an IP packet.
type packet struct {
	b    []byte // from the IP header to the end by the header's length
	v4   bool
	frag bool // part of a datagram
	// proto is the protocol of the payload, IPv6's extension headers skipped.
	proto byte
	// l4 is the offset of the payload; meaningless in a fragment other than
	// the first.
	l4    int
	first bool // not a fragment, or the first one
	strip bool // gVisor is not to see the SACK blocks (hold.go)
}

// parseIP looks at the IP header of b and cuts off what follows the packet.
func parseIP(b []byte) (p packet, ok bool) {
	if len(b) < header.IPv4MinimumSize {
		return p, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return p, false
}

func parseIPv4(b []byte) (p packet, ok bool) {
	n, hl := int(binary.BigEndian.Uint16(b[2:])), int(b[0]&15)*4
	if hl < header.IPv4MinimumSize || n < hl || n > len(b) {
		return p, false
	}
	offset := binary.BigEndian.Uint16(b[6:]) & 0x3fff // with the more-fragments bit
	return packet{b: b[:n], v4: true, frag: offset != 0, first: offset&0x1fff == 0, proto: b[9], l4: hl}, true
}

func parseIPv6(b []byte) (p packet, ok bool) {
	if len(b) < header.IPv6MinimumSize {
		return p, false
	}
	n := header.IPv6MinimumSize + int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b) {
		return p, false
	}
	p = packet{b: b[:n], first: true, proto: b[6], l4: header.IPv6MinimumSize}
	// RFC 8200 section 4.1 knows each extension header once, destination
	// options twice.
	for range 8 {
		rest := p.b[p.l4:]
		switch p.proto {
		case protoHopByHop, protoRouting, protoDestOpts:
			if len(rest) < 8 || len(rest) < 8+8*int(rest[1]) {
				return p, false
			}
			p.proto = rest[0]
			p.l4 += 8 + 8*int(rest[1])
		case protoFragment:
			if len(rest) < 8 || p.frag {
				return p, false
			}
			offset := binary.BigEndian.Uint16(rest[2:])
			p.frag = offset&0xfff9 != 0 // RFC 6946: an atomic fragment is none
			p.first = offset&0xfff8 == 0
			p.proto = rest[0]
			p.l4 += 8
			if !p.first {
				return p, true
			}
		default:
			return p, true
		}
	}
	return p, false
}

// payload returns what follows the IP headers.
func (p *packet) payload() []byte { return p.b[p.l4:] }

func (p *packet) source() netip.Addr {
	if p.v4 {
		return netip.AddrFrom4([4]byte(p.b[12:]))
	}
	return netip.AddrFrom16([16]byte(p.b[8:]))
}

func (p *packet) destination() netip.Addr {
	if p.v4 {
		return netip.AddrFrom4([4]byte(p.b[16:]))
	}
	return netip.AddrFrom16([16]byte(p.b[24:]))
}

// Input takes IP packets from the tunnel in their order of arrival. Neither
// pkts nor the packets are kept or changed. Consecutive TCP segments of one
// flow are joined before the stack sees them, so long batches are cheaper than
// many short ones.
func (s *Stack) Input(pkts [][]byte) {
	d := s.dev
	c := &d.counters
	if d.inClosed.Load() {
		c.dropClosed.Add(uint64(len(pkts)))
		return
	}
	s.afterTimeouts()
	bytes := 0
	for _, b := range pkts {
		bytes += len(b)
	}
	c.packetsIn.Add(uint64(len(pkts)))
	c.bytesIn.Add(uint64(bytes))
	o := sorters.Get().(*sorter)
	defer o.done()
	pkts = o.sorted(pkts)
	now := d.flows.now()
	for i := 0; i < len(pkts); {
		p, ok := parseIP(pkts[i])
		if !ok {
			c.dropMalformed.Add(1)
			i++
			continue
		}
		if !s.admit(&p) {
			i++
			continue
		}
		n, size := 1, len(p.b)
		if r, ok := startRun(&p); ok {
			for i+n < len(pkts) && r.add(pkts[i+n]) {
				n++
			}
			size = r.size
		}
		switch {
		case p.frag:
			o.acks.flush(d)
		case p.proto == protoTCP:
			v, strip := d.flows.in(&p, size-len(p.b), now)
			p.strip = strip
			switch v {
			case held:
				i++ // an acknowledgement, which is never joined
				continue
			case passRestart:
				s.afterSpurious(inKey(p.b, p.payload()))
			case pass:
				if o.acks.take(d, &p) {
					i++
					continue
				}
			}
		}
		d.deliver(&p, pkts[i+1:i+n], size)
		i += n
	}
	o.acks.flush(d)
	d.small.flush()
}

// admit decides whether gVisor gets the packet, and does what is to be done
// with it otherwise.
func (s *Stack) admit(p *packet) bool {
	c := &s.dev.counters
	switch {
	case p.proto == protoTCP:
		if s.forward && p.first && len(p.payload()) >= header.TCPMinimumSize &&
			p.payload()[13]&(flagSYN|flagACK|flagRST) == flagSYN {
			s.endTimeWait(p)
		}
		return true
	case p.proto == protoUDP:
		return p.frag || !s.takeUDP(p)
	case p.v4 && p.proto == protoICMP, !p.v4 && p.proto == protoICMPv6:
		if !p.frag && isICMPError(p) {
			s.noteUnreachable(p)
			return true
		}
		// In Forward mode gVisor would take an echo request to any address
		// for its own and answer it.
		if s.forward && !s.isOwn(p.destination()) {
			c.dropForeignICMP.Add(1)
			return false
		}
		return true
	default:
		c.dropProtocol.Add(1)
		return false
	}
}

// headers returns the size of what gVisor is to look at of p: the headers of a TCP
// packet with data, or else all of it. While gVisor looks at the IP header it holds
// a reference to the buffer that has it, and so copies all of that buffer when it
// looks again. The data is to be elsewhere.
func (p *packet) headers() int {
	if p.proto != protoTCP || p.frag || len(p.payload()) < header.TCPMinimumSize {
		return len(p.b)
	}
	hl := int(p.payload()[12]>>4) * 4
	if hl < header.TCPMinimumSize || hl > len(p.payload()) {
		return len(p.b)
	}
	return p.l4 + hl
}

// deliver hands p, and the payloads of the segments that follow it, size bytes
// in all, to gVisor as one packet.
func (d *device) deliver(p *packet, more [][]byte, size int) {
	dispatcher := d.dispatcher.Load()
	if dispatcher == nil {
		d.counters.dropClosed.Add(uint64(1 + len(more)))
		return
	}
	proto := header.IPv4ProtocolNumber
	if !p.v4 {
		proto = header.IPv6ProtocolNumber
	}
	hl := p.headers()
	head := buffer.NewViewSize(hl)
	h := head.AsSlice()
	copy(h, p.b)
	if len(more) > 0 {
		join(h, p, more, size)
	}
	if p.strip {
		stripSACK(h[p.l4:])
	}
	if !p.v4 && p.proto == protoICMPv6 && !p.frag {
		simplifyUnreachable(h[p.l4:])
	}
	var payload buffer.Buffer
	if hl < size {
		v := buffer.NewViewSize(size - hl)
		b := v.AsSlice()
		b = b[copy(b, p.b[hl:]):]
		for _, m := range more {
			b = b[copy(b, m[hl:]):]
		}
		payload = buffer.MakeWithView(v)
	}
	_ = payload.Prepend(head) // it can fail only where it copies
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	d.counters.delivered.Add(1)
	(*dispatcher).DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}
