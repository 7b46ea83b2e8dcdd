package server

import (
	"encoding/binary"
	"net/netip"

	"github.com/anytun-go/anytun/anytun/packet"
)

// IP protocol numbers that the egress tells apart.
const (
	protoICMP     = 1
	protoUDP      = 17
	protoFragment = 44
	protoICMPv6   = 58
)

const (
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40
	udpHeaderLen  = 8
	icmpEchoLen   = 8 // type, code, checksum, identifier, sequence number

	icmpEchoReply      = 0
	icmpRedirect       = 5
	icmpEchoRequest    = 8
	icmpTimestampReply = 14
	icmpv6EchoRequest  = 128
	icmpv6EchoReply    = 129

	egressTTL = 64
)

// egressPacket is the view of an inner packet that Input decides by. payload
// aliases the packet and begins at the transport header.
type egressPacket struct {
	src, dst netip.Addr
	proto    uint8
	fragment bool // a fragment, also the first
	options  bool // IPv4 options or IPv6 extension headers
	payload  []byte
}

// parse reports whether b is an IP packet whose lengths agree. Bytes after the
// packet's own length are cut off.
func (p *egressPacket) parse(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		return p.parse4(b)
	case 6:
		return p.parse6(b)
	}
	return false
}

func (p *egressPacket) parse4(b []byte) bool {
	if len(b) < ipv4HeaderLen {
		return false
	}
	hl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if hl < ipv4HeaderLen || total < hl || total > len(b) {
		return false
	}
	p.src = netip.AddrFrom4([4]byte(b[12:16]))
	p.dst = netip.AddrFrom4([4]byte(b[16:20]))
	p.proto = b[9]
	p.fragment = binary.BigEndian.Uint16(b[6:])&0x3fff != 0 // more fragments, or an offset
	p.options = hl > ipv4HeaderLen
	p.payload = b[hl:total]
	return true
}

func (p *egressPacket) parse6(b []byte) bool {
	if len(b) < ipv6HeaderLen {
		return false
	}
	total := ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return false
	}
	p.src = netip.AddrFrom16([16]byte(b[8:24]))
	p.dst = netip.AddrFrom16([16]byte(b[24:40]))
	p.fragment, p.options = false, false
	next, rest := b[6], b[ipv6HeaderLen:total]
	// RFC 8200 section 4: the extension headers before the transport's.
	for {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(rest) < 8 {
				return false
			}
			n := (int(rest[1]) + 1) * 8
			if n > len(rest) {
				return false
			}
			next, rest = rest[0], rest[n:]
			p.options = true
		case protoFragment:
			if len(rest) < 8 {
				return false
			}
			p.fragment, p.options = true, true
			if binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
				// What follows is the middle of something.
				p.proto, p.payload = rest[0], rest[8:]
				return true
			}
			next, rest = rest[0], rest[8:]
		default:
			p.proto, p.payload = next, rest
			return true
		}
	}
}

// udp returns the ports and the payload of a datagram that is no fragment.
func (p *egressPacket) udp() (from, to netip.AddrPort, payload []byte, ok bool) {
	b := p.payload
	if len(b) < udpHeaderLen {
		return from, to, nil, false
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if n < udpHeaderLen || n > len(b) {
		return from, to, nil, false
	}
	from = netip.AddrPortFrom(p.src, binary.BigEndian.Uint16(b))
	to = netip.AddrPortFrom(p.dst, binary.BigEndian.Uint16(b[2:]))
	return from, to, b[udpHeaderLen:n], true
}

// echoRequest reports whether the packet is, or is a part of, an echo request.
// Parts after the first don't show their type, so every ICMP fragment counts.
func (p *egressPacket) echoRequest() bool {
	switch p.proto {
	case protoICMP:
		return p.dst.Is4() && (p.fragment || len(p.payload) > 0 && p.payload[0] == icmpEchoRequest)
	case protoICMPv6:
		return p.dst.Is6() && (p.fragment || len(p.payload) > 0 && p.payload[0] == icmpv6EchoRequest)
	}
	return false
}

// ipHeaderLen is the size of the header that putIPHeader writes for addr.
func ipHeaderLen(addr netip.Addr) int {
	if addr.Is4() {
		return ipv4HeaderLen
	}
	return ipv6HeaderLen
}

// putIPHeader writes the header of an unfragmented packet at the start of b,
// which is the whole packet. src and dst are of one family.
func putIPHeader(b []byte, src, dst netip.Addr, proto uint8) {
	if dst.Is4() {
		b[0], b[1] = 0x45, 0
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		// Don't fragment, so the identification may be zero (RFC 6864).
		binary.BigEndian.PutUint32(b[4:], 0x4000)
		b[8], b[9] = egressTTL, proto
		b[10], b[11] = 0, 0
		s, d := src.As4(), dst.As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:ipv4HeaderLen], 0))
		return
	}
	binary.BigEndian.PutUint32(b, 6<<28)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6HeaderLen))
	b[6], b[7] = proto, egressTTL
	s, d := src.As16(), dst.As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
}

// putUDPHeader writes the UDP header behind the IP header that b begins with.
// The inner checksum is of no use inside the tunnel, but a client that hands
// its packets on to a kernel is spared to compute it.
func putUDPHeader(b []byte, from, to netip.AddrPort) {
	hl := ipHeaderLen(to.Addr())
	u := b[hl:]
	binary.BigEndian.PutUint16(u, from.Port())
	binary.BigEndian.PutUint16(u[2:], to.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	u[6], u[7] = 0, 0
	sum := packet.Checksum(u, packet.PseudoSum(from.Addr(), to.Addr(), protoUDP, len(u)))
	if sum == 0 {
		sum = 0xffff // RFC 768: zero means none
	}
	binary.BigEndian.PutUint16(u[6:], sum)
}
