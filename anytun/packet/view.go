package packet

import (
	"encoding/binary"
	"net/netip"
)

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols that this package knows.
const (
	HopByHop       Protocol = 0 // IPv6 extension header
	ICMPv4         Protocol = 1
	TCP            Protocol = 6
	UDP            Protocol = 17
	Routing        Protocol = 43 // IPv6 extension header
	FragmentHeader Protocol = 44 // IPv6 extension header
	ESP            Protocol = 50
	AH             Protocol = 51 // IPv6 extension header, and IPv4's payload
	ICMPv6         Protocol = 58
	NoNext         Protocol = 59
	DestOptions    Protocol = 60  // IPv6 extension header
	MobilityHeader Protocol = 135 // IPv6 extension header
)

// Lengths of headers without options, bytes.
const (
	ipv4HeaderLen     = 20
	ipv6HeaderLen     = 40
	fragmentHeaderLen = 8
	tcpHeaderLen      = 20
	udpHeaderLen      = 8
	icmpHeaderLen     = 8

	// quotedLen is what RFC 792 promises of a quoted packet's transport.
	quotedLen = 8
	// maxExtensions is more than any honest packet has.
	maxExtensions = 8
)

// TCP flags, as in View.TCPFlags.
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

// Reason says why a packet could not be parsed.
type Reason uint8

// The reasons.
const (
	// OK is no reason: the View is valid.
	OK Reason = iota
	// Truncated: the packet ends before its headers do, or before its own
	// length says.
	Truncated
	// BadVersion: neither IPv4 nor IPv6.
	BadVersion
	// BadHeader: the IP header contradicts itself.
	BadHeader
	// BadTransport: the TCP, UDP or ICMP header contradicts itself or is cut
	// off, by a first fragment too short to tell ports (RFC 7112, RFC 1858) or
	// otherwise.
	BadTransport
	// TooManyExtensions: more than eight IPv6 extension headers.
	TooManyExtensions
	// SourceRouted: by an IPv4 option or an IPv6 routing header that still has a
	// way to go. Such a packet's true destination is not in its header, which
	// is how they get around filters (RFC 5095, RFC 6274 section 3.13.2.3).
	SourceRouted

	// NumReasons is the number of values above.
	NumReasons = iota
)

var reasonNames = [NumReasons]string{
	OK:                "ok",
	Truncated:         "truncated",
	BadVersion:        "bad_version",
	BadHeader:         "bad_header",
	BadTransport:      "bad_transport",
	TooManyExtensions: "too_many_extensions",
	SourceRouted:      "source_routed",
}

// String is the reason's name as a metrics label.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return "unknown"
}

// View is what Parse found in a packet. It refers to the packet's memory, is meant
// to be reused, and is not safe for concurrent use.
type View struct {
	// Bytes is the packet, without what follows its end. Valid if Parse
	// returned OK, as is everything below unless it says otherwise. In the view
	// of a quoted packet the end may be missing.
	Bytes []byte
	// Version is 4 or 6.
	Version uint8
	// TTL is IPv6's hop limit, too.
	TTL uint8
	// Protocol is the upper layer's, after all extension headers. In a fragment
	// other than the first it is what the fragment header says.
	Protocol Protocol
	// TCPFlags is valid if HasPorts and Protocol is TCP.
	TCPFlags uint8
	// ICMPType and ICMPCode are valid if Protocol is ICMPv4 or ICMPv6 and
	// FragmentOffset is 0.
	ICMPType, ICMPCode uint8

	// HasPorts says that SourcePort and DestinationPort are valid: the packet is
	// TCP, UDP, or an ICMP query with an identifier, and not a fragment other
	// than the first. An ICMP query's identifier is the SourcePort, an ICMP
	// reply's the DestinationPort; the other one is 0.
	HasPorts        bool
	SourcePort      uint16
	DestinationPort uint16

	// Fragmented says that this is a part of a datagram: there are More parts
	// behind it, or FragmentOffset bytes before it, or both.
	Fragmented, More bool
	FragmentOffset   int
	// FragmentID is valid if Fragmented.
	FragmentID uint32

	Source, Destination netip.Addr

	quoted    bool
	transport int // where the upper layer begins, as an index of Bytes
	payload   int // where its payload begins
	end       int // where it ends; beyond len(Bytes) in a quoted packet
	// fragment is where the fragment header of an IPv6 fragment is, and next where
	// the byte is that announces it.
	fragment, next int
}

// Parse reads the headers of the IP packet at the head of b. If it returns anything
// but OK, v is not valid. b is not copied.
func (v *View) Parse(b []byte) Reason { return v.parse(b, false) }

// ParseQuoted is Parse for a packet that an ICMP error quotes: it may be cut off
// behind the first eight bytes of its transport header.
func (v *View) ParseQuoted(b []byte) Reason { return v.parse(b, true) }

func (v *View) parse(b []byte, quoted bool) Reason {
	*v = View{quoted: quoted}
	if len(b) == 0 {
		return Truncated
	}
	var r Reason
	switch b[0] >> 4 {
	case 4:
		r = v.parseIPv4(b)
	case 6:
		r = v.parseIPv6(b)
	default:
		return BadVersion
	}
	if r != OK || v.FragmentOffset > 0 {
		return r
	}
	return v.parseTransport()
}

// parseIPv4 reads the header of RFC 791.
func (v *View) parseIPv4(b []byte) Reason {
	if len(b) < ipv4HeaderLen {
		return Truncated
	}
	headerLen := int(b[0]&15) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if headerLen < ipv4HeaderLen || total < headerLen {
		return BadHeader
	}
	if r := v.trim(b, total, headerLen); r != OK {
		return r
	}
	v.Version = 4
	v.TTL = b[8]
	v.Protocol = Protocol(b[9])
	v.Source = netip.AddrFrom4([4]byte(b[12:]))
	v.Destination = netip.AddrFrom4([4]byte(b[16:]))
	v.transport = headerLen
	flags := binary.BigEndian.Uint16(b[6:])
	v.FragmentOffset = int(flags&0x1fff) * 8
	v.More = flags&0x2000 != 0
	if v.Fragmented = v.More || v.FragmentOffset > 0; v.Fragmented {
		v.FragmentID = uint32(binary.BigEndian.Uint16(b[4:]))
		if v.FragmentOffset+total-headerLen > 0xffff {
			return BadHeader // the ping of death
		}
	}
	if headerLen > ipv4HeaderLen {
		return checkOptions(b[ipv4HeaderLen:headerLen])
	}
	return OK
}

// checkOptions looks for source routes among IPv4 options.
func checkOptions(b []byte) Reason {
	const endOfList, noOperation, looseRoute, strictRoute = 0, 1, 131, 137
	for len(b) > 0 {
		switch b[0] {
		case endOfList:
			return OK
		case noOperation:
			b = b[1:]
			continue
		case looseRoute, strictRoute:
			return SourceRouted
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return BadHeader
		}
		b = b[b[1]:]
	}
	return OK
}

// parseIPv6 reads the header of RFC 8200 and its extensions.
func (v *View) parseIPv6(b []byte) Reason {
	if len(b) < ipv6HeaderLen {
		return Truncated
	}
	total := ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:]))
	if r := v.trim(b, total, ipv6HeaderLen); r != OK {
		return r
	}
	v.Version = 6
	v.TTL = b[7]
	v.Source = netip.AddrFrom16([16]byte(b[8:]))
	v.Destination = netip.AddrFrom16([16]byte(b[24:]))
	v.Protocol = Protocol(b[6])
	v.next = 6
	v.transport = ipv6HeaderLen
	for n := 0; n < maxExtensions; {
		was := v.Fragmented
		more, r := v.skipExtension()
		if r != OK || !more {
			return r
		}
		if v.Fragmented == was { // a fragment of a good packet is one, too
			n++
		}
	}
	if more, _ := v.skipExtension(); more {
		return TooManyExtensions
	}
	return OK
}

// skipExtension goes over an extension header, if there is one that can be gone
// over.
func (v *View) skipExtension() (more bool, r Reason) {
	size := 0
	b := v.Bytes[v.transport:]
	switch v.Protocol {
	case HopByHop, Routing, DestOptions, MobilityHeader:
		if len(b) < 8 {
			return false, Truncated
		}
		size = 8 + int(b[1])*8
		if v.Protocol == Routing && b[3] != 0 { // segments left
			return false, SourceRouted
		}
	case AH:
		if len(b) < 8 {
			return false, Truncated
		}
		size = 8 + int(b[1])*4
	case FragmentHeader:
		if len(b) < fragmentHeaderLen {
			return false, Truncated
		}
		if v.Fragmented {
			return false, BadHeader // a fragment of a fragment
		}
		size = fragmentHeaderLen
		offset := binary.BigEndian.Uint16(b[2:])
		v.FragmentOffset = int(offset &^ 7)
		v.More = offset&1 != 0
		// An "atomic fragment" (RFC 6946) is whole.
		if v.Fragmented = v.More || v.FragmentOffset > 0; v.Fragmented {
			v.fragment = v.transport
			v.FragmentID = binary.BigEndian.Uint32(b[4:])
			if v.FragmentOffset+v.end-v.transport-size > 0xffff {
				return false, BadHeader
			}
		}
	default:
		return false, OK
	}
	if len(b) < size {
		return false, Truncated
	}
	v.Protocol = Protocol(b[0])
	if !v.Fragmented {
		v.next = v.transport
	}
	v.transport += size
	return v.FragmentOffset == 0, OK
}

// trim sets Bytes to the first total bytes of b, of which headerLen must be there
// even if the packet is quoted.
func (v *View) trim(b []byte, total, headerLen int) Reason {
	v.end = total
	if len(b) >= total {
		v.Bytes = b[:total:total]
		return OK
	}
	if !v.quoted || len(b) < headerLen {
		return Truncated
	}
	v.Bytes = b[:len(b):len(b)]
	return OK
}

// parseTransport reads the upper layer's header, unless this is a later fragment.
func (v *View) parseTransport() Reason {
	b := v.Bytes[v.transport:]
	need := 0
	switch {
	case v.quoted && (v.Protocol == TCP || v.Protocol == UDP || v.isICMP()):
		need = quotedLen
	case v.Protocol == TCP:
		need = tcpHeaderLen
	case v.Protocol == UDP:
		need = udpHeaderLen
	case v.isICMP():
		need = icmpHeaderLen
	}
	if len(b) < need {
		return BadTransport
	}
	v.payload = v.transport + need
	switch {
	case v.Protocol == TCP:
		return v.parseTCP(b)
	case v.Protocol == UDP:
		return v.parseUDP(b)
	case v.isICMP():
		v.parseICMP(b)
	}
	return OK
}

func (v *View) isICMP() bool {
	return v.Protocol == ICMPv4 && v.Version == 4 || v.Protocol == ICMPv6 && v.Version == 6
}

func (v *View) parsePorts(b []byte) {
	v.HasPorts = true
	v.SourcePort = binary.BigEndian.Uint16(b)
	v.DestinationPort = binary.BigEndian.Uint16(b[2:])
}

// parseTCP reads the header of RFC 9293 section 3.1.
func (v *View) parseTCP(b []byte) Reason {
	if len(b) >= tcpHeaderLen {
		headerLen := int(b[12]>>4) * 4
		if headerLen < tcpHeaderLen || headerLen > len(b) && !v.quoted {
			return BadTransport
		}
		v.TCPFlags = b[13]
		v.payload = v.transport + min(headerLen, len(b))
	}
	v.parsePorts(b)
	return OK
}

// parseUDP reads the header of RFC 768.
func (v *View) parseUDP(b []byte) Reason {
	length := int(binary.BigEndian.Uint16(b[4:]))
	if length < udpHeaderLen || length > v.end-v.transport && !v.Fragmented {
		return BadTransport
	}
	v.parsePorts(b)
	return OK
}

// parseICMP reads the header of RFC 792 and RFC 4443.
func (v *View) parseICMP(b []byte) {
	v.ICMPType, v.ICMPCode = b[0], b[1]
	id := binary.BigEndian.Uint16(b[4:])
	switch {
	case v.isICMPQuery():
		v.HasPorts, v.SourcePort = true, id
	case v.isICMPReply():
		v.HasPorts, v.DestinationPort = true, id
	}
}

// Upper is everything behind the IP headers, in a fragment the part that is there.
func (v *View) Upper() []byte { return v.Bytes[v.transport:] }

// Payload is what TCP or UDP carries, or what follows the eight bytes of an ICMP
// header. For other protocols and for later fragments it is Upper.
func (v *View) Payload() []byte {
	b := v.Bytes[max(v.payload, v.transport):]
	if v.Protocol == UDP && v.HasPorts && !v.Fragmented {
		length := int(binary.BigEndian.Uint16(v.Bytes[v.transport+4:])) - udpHeaderLen
		b = b[:min(length, len(b))]
	}
	return b
}
