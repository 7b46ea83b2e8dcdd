package tun

import "encoding/binary"

const (
	protoHopByHop    = 0
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoAH          = 51
	protoICMPv6      = 58
	protoDestination = 60

	ipv4Size = 20
	ipv6Size = 40
	tcpSize  = 20
	udpSize  = 8

	flagFIN = 0x01
	flagPSH = 0x08
	flagACK = 0x10
	flagECE = 0x40
	flagCWR = 0x80

	// maxExtensions bounds the walk over IPv6 extension headers. RFC 8200
	// section 4.1 orders seven.
	maxExtensions = 8
)

// layout is what one look at an IP packet's headers tells.
type layout struct {
	size  int // bytes of the packet, as its IP header says
	l4    int // offset of the transport header
	proto uint8
	v4    bool
	// covered is whether the transport checksum can be computed from what is
	// here: no fragment, no routing header that hides the destination.
	covered bool
}

// parse looks at the packet at the start of b; ok is false if its lengths
// contradict each other. It doesn't look into the transport header.
func parse(b []byte) (l layout, ok bool) {
	if len(b) < ipv4Size {
		return l, false
	}
	switch b[0] >> 4 {
	case 4:
		l = layout{
			size:    int(binary.BigEndian.Uint16(b[2:])),
			l4:      int(b[0]&15) * 4,
			proto:   b[9],
			v4:      true,
			covered: binary.BigEndian.Uint16(b[6:])&0x3fff == 0, // more fragments, offset
		}
		return l, l.l4 >= ipv4Size && l.l4 <= l.size && l.size <= len(b)
	case 6:
		return parse6(b)
	}
	return l, false
}

func parse6(b []byte) (l layout, ok bool) {
	if len(b) < ipv6Size {
		return l, false
	}
	l = layout{
		size:    ipv6Size + int(binary.BigEndian.Uint16(b[4:])),
		l4:      ipv6Size,
		proto:   b[6],
		covered: true,
	}
	if l.size > len(b) {
		return l, false
	}
	for range maxExtensions {
		var n int
		rest := b[l.l4:l.size]
		switch l.proto {
		default:
			return l, true
		case protoHopByHop, protoRouting, protoDestination, protoFragment, protoAH:
			if len(rest) < 8 {
				return l, false
			}
			n = int(rest[1])*8 + 8
		}
		switch l.proto {
		case protoAH:
			n = int(rest[1])*4 + 8
		case protoRouting:
			if rest[3] != 0 { // segments left: the checksum is for the last of them
				l.covered = false
			}
		case protoFragment:
			n = 8
			at := binary.BigEndian.Uint16(rest[2:])
			if at&^6 != 0 { // offset, more fragments; without either it is a whole packet (RFC 6946)
				l.covered = false
			}
			if at&^7 != 0 { // what follows is no header
				l.l4, l.proto = l.l4+n, rest[0]
				return l, true
			}
		}
		if n > len(rest) {
			return l, false
		}
		l.l4, l.proto = l.l4+n, rest[0]
	}
	return l, false
}

// sum adds the 16-bit words of b to s, the last one filled up with zero. s
// can't overflow: packets are short.
func sum(s uint32, b []byte) uint32 {
	for ; len(b) >= 4; b = b[4:] {
		s += uint32(binary.BigEndian.Uint16(b)) + uint32(binary.BigEndian.Uint16(b[2:]))
	}
	if len(b) >= 2 {
		s += uint32(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

// fold makes a one's complement sum of 16 bits (RFC 1071).
func fold(s uint32) uint16 {
	s = s>>16 + s&0xffff
	s += s >> 16
	return uint16(s)
}

// pseudoSum is the sum over the pseudo header (RFC 9293 section 3.1, RFC 8200
// section 8.1) of a transport of n bytes, not yet complemented.
func pseudoSum(b []byte, l *layout, n int) uint16 {
	s := uint32(l.proto) + uint32(n)
	if l.v4 {
		return fold(sum(s, b[12:20]))
	}
	return fold(sum(s, b[8:40]))
}

// setIPv4Checksum computes the checksum of the IPv4 header h.
func setIPv4Checksum(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^fold(sum(0, h)))
}
