package packet

import (
	"encoding/binary"
	"net/netip"
)

// The ICMP types of RFC 792 and RFC 4443 that matter here.
const (
	icmp4EchoReply    = 0
	icmp4Unreachable  = 3
	icmp4SourceQuench = 4
	icmp4Redirect     = 5
	icmp4Echo         = 8
	icmp4TimeExceeded = 11
	icmp4Parameter    = 12
	icmp4Timestamp    = 13
	icmp4TimestampRep = 14

	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6Echo         = 128 // from here on up: no errors
	icmp6EchoReply    = 129
	icmp6Redirect     = 137
)

// isICMPQuery says whether the message asks something under an identifier.
func (v *View) isICMPQuery() bool {
	if v.Version == 4 {
		return v.ICMPType == icmp4Echo || v.ICMPType == icmp4Timestamp
	}
	return v.ICMPType == icmp6Echo
}

// isICMPReply says whether the message answers such a question.
func (v *View) isICMPReply() bool {
	if v.Version == 4 {
		return v.ICMPType == icmp4EchoReply || v.ICMPType == icmp4TimestampRep
	}
	return v.ICMPType == icmp6EchoReply
}

// IsICMPError says whether the packet is an ICMP error message, which quotes
// another packet (see Quoted) and must never be answered with an error.
func (v *View) IsICMPError() bool {
	if !v.isICMP() || v.FragmentOffset > 0 {
		return false
	}
	if v.Version == 6 {
		return v.ICMPType < icmp6Echo
	}
	switch v.ICMPType {
	case icmp4Unreachable, icmp4SourceQuench, icmp4Redirect, icmp4TimeExceeded, icmp4Parameter:
		return true
	}
	return false
}

// Quoted parses the packet that an ICMP error quotes into q, which then refers to
// the same memory: setters of q change the quotation, after which v.FillChecksums
// makes the error itself valid again. v must be an ICMP error.
func (v *View) Quoted(q *View) Reason {
	if !v.IsICMPError() {
		return BadTransport
	}
	return q.ParseQuoted(v.Payload())
}

// SetQuotedSource changes the source address and port of q, the packet that v quotes
// (see Quoted), and adjusts the checksums of both, v's own as well, so that
// a valid error stays valid. It returns false, and changes nothing, if a is of the
// other family or q has no source port.
//
// An error from outside about a packet that a gateway rewrote on its way out is
// turned back by this and v.SetDestination.
func (v *View) SetQuotedSource(q *View, a netip.Addr, port uint16) bool {
	return v.setQuoted(q, a, port, (*View).SetSourcePort, (*View).SetSource)
}

// SetQuotedDestination is SetQuotedSource for the destination, for errors about a
// packet that was rewritten on its way in.
func (v *View) SetQuotedDestination(q *View, a netip.Addr, port uint16) bool {
	return v.setQuoted(q, a, port, (*View).SetDestinationPort, (*View).SetDestination)
}

func (v *View) setQuoted(q *View, a netip.Addr, port uint16, setPort func(*View, uint16) bool,
	setAddr func(*View, netip.Addr) bool,
) bool {
	at := v.checksumAt()
	if !q.quoted || at == 0 || a.Is4() != (q.Version == 4) || !a.IsValid() {
		return false
	}
	// All that changes is within the headers, up to a TCP checksum. A quotation
	// is at an even place of v, and so is the part of odd length at its end.
	head := q.Bytes[:min(len(q.Bytes), q.transport+tcpHeaderLen)]
	before := Sum(head, 0)
	if !setPort(q, port) {
		return false
	}
	setAddr(q, a)
	update(v.Bytes[at:], before, Sum(head, 0))
	return true
}

// MTU is the size in bytes of the largest packet that would have passed, if v is an
// ICMP error that says so: "fragmentation needed" (RFC 1191; 0 from routers
// that don't tell) or "packet too big".
func (v *View) MTU() (mtu int, ok bool) {
	if !v.IsICMPError() {
		return 0, false
	}
	b := v.Upper()
	switch {
	case v.Version == 6 && v.ICMPType == icmp6TooBig:
		return int(min(binary.BigEndian.Uint32(b[4:]), 1<<31-1)), true
	case v.Version == 4 && v.ICMPType == icmp4Unreachable && v.ICMPCode == 4:
		return int(binary.BigEndian.Uint16(b[6:])), true
	}
	return 0, false
}

// ErrorKind is an ICMP error that a gateway sends.
type ErrorKind uint8

// The kinds, each with its type and code for IPv4 and IPv6.
const (
	NetUnreachable  ErrorKind = iota // 3/0, 1/0 no route
	HostUnreachable                  // 3/1, 1/3 address unreachable
	PortUnreachable                  // 3/3, 1/4
	AdminProhibited                  // 3/13, 1/1
	TooBig                           // 3/4 fragmentation needed, 2/0; with an MTU
	TimeExceeded                     // 11/0, 3/0
)

var errorTypes = [...]struct{ type4, code4, type6, code6 uint8 }{
	NetUnreachable:  {icmp4Unreachable, 0, icmp6Unreachable, 0},
	HostUnreachable: {icmp4Unreachable, 1, icmp6Unreachable, 3},
	PortUnreachable: {icmp4Unreachable, 3, icmp6Unreachable, 4},
	AdminProhibited: {icmp4Unreachable, 13, icmp6Unreachable, 1},
	TooBig:          {icmp4Unreachable, 4, icmp6TooBig, 0},
	TimeExceeded:    {icmp4TimeExceeded, 0, icmp6TimeExceeded, 0},
}

const (
	// maxError4 is as much as every host accepts (RFC 1812 section 4.3.2.3).
	maxError4 = 576
	// maxError6 is IPv6's minimum MTU (RFC 4443 section 2.4 c).
	maxError6 = 1280

	// MaxErrorLen is the size in bytes of the longest packet that AppendError
	// makes.
	MaxErrorLen = maxError6

	errorTTL = 64
)

// AppendError appends to b an ICMP error from the address from to v's source,
// quoting as much of v as such a message may. mtu is for TooBig, in bytes. With
// MaxErrorLen bytes of capacity left in b, nothing is allocated.
//
// It returns b as it was, and false, where the RFCs forbid an error (RFC 1122
// section 3.2.2, RFC 4443 section 2.4 e): in answer to an ICMP error or redirect,
// to a later fragment, to a packet from no single host (unspecified, multicast,
// broadcast, loopback) or to many; and if from is of the other family.
func (v *View) AppendError(b []byte, from netip.Addr, kind ErrorKind, mtu int) ([]byte, bool) {
	if int(kind) >= len(errorTypes) || from.Is4() != (v.Version == 4) || !from.IsValid() || !v.mayAnswer(kind) {
		return b, false
	}
	if v.Version == 4 {
		return v.appendError4(b, from, kind, mtu), true
	}
	return v.appendError6(b, from, kind, mtu), true
}

func (v *View) mayAnswer(kind ErrorKind) bool {
	if v.IsICMPError() || v.FragmentOffset > 0 || v.quoted {
		return false
	}
	if v.Protocol == ICMPv6 && v.Version == 6 && v.ICMPType == icmp6Redirect {
		return false
	}
	if !single(v.Source) || v.Source.IsLoopback() {
		return false
	}
	// A multicast sender wants to know of a path MTU all the same (RFC 4443
	// section 2.4 e.3).
	return single(v.Destination) || v.Version == 6 && kind == TooBig && v.Destination.IsMulticast()
}

// single says whether an address can be one host's.
func single(a netip.Addr) bool {
	if a.IsUnspecified() || a.IsMulticast() {
		return false
	}
	if !a.Is4() {
		return true
	}
	// 0/8 and 240/4, the broadcast address among the latter.
	first := a.As4()[0]
	return first != 0 && first < 240
}

func (v *View) appendError4(b []byte, from netip.Addr, kind ErrorKind, mtu int) []byte {
	quote := v.Bytes[:min(len(v.Bytes), maxError4-ipv4HeaderLen-icmpHeaderLen)]
	total := ipv4HeaderLen + icmpHeaderLen + len(quote)
	start := len(b)
	src, dst := from.As4(), v.Source.As4()
	// Precedence 6, internetwork control (RFC 1812 section 4.3.2.5); DF, since
	// 576 bytes pass everywhere, so the ID may be anything (RFC 6864).
	b = append(b, 0x45, 0xc0, byte(total>>8), byte(total), 0, 0, 0x40, 0, errorTTL, byte(ICMPv4), 0, 0)
	b = append(b, src[:]...)
	b = append(b, dst[:]...)
	t := errorTypes[kind]
	b = append(b, t.type4, t.code4, 0, 0, 0, 0, 0, 0)
	b = append(b, quote...)
	p := b[start:]
	if kind == TooBig {
		binary.BigEndian.PutUint16(p[ipv4HeaderLen+6:], uint16(min(max(mtu, 0), 0xffff)))
	}
	binary.BigEndian.PutUint16(p[10:], Checksum(p[:ipv4HeaderLen], 0))
	binary.BigEndian.PutUint16(p[ipv4HeaderLen+2:], Checksum(p[ipv4HeaderLen:], 0))
	return b
}

func (v *View) appendError6(b []byte, from netip.Addr, kind ErrorKind, mtu int) []byte {
	quote := v.Bytes[:min(len(v.Bytes), maxError6-ipv6HeaderLen-icmpHeaderLen)]
	length := icmpHeaderLen + len(quote)
	start := len(b)
	src, dst := from.As16(), v.Source.As16()
	b = append(b, 0x60, 0, 0, 0, byte(length>>8), byte(length), byte(ICMPv6), errorTTL)
	b = append(b, src[:]...)
	b = append(b, dst[:]...)
	t := errorTypes[kind]
	b = append(b, t.type6, t.code6, 0, 0, 0, 0, 0, 0)
	b = append(b, quote...)
	upper := b[start+ipv6HeaderLen:]
	if kind == TooBig {
		binary.BigEndian.PutUint32(upper[4:], uint32(max(mtu, 0)))
	}
	binary.BigEndian.PutUint16(upper[2:], Checksum(upper, PseudoSum(from, v.Source, ICMPv6, length)))
	return b
}
