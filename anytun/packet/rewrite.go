package packet

import (
	"encoding/binary"
	"net/netip"
)

// SetSource changes the source address, in the packet and in v, and adjusts the
// checksums that cover it: IPv4's header checksum and the one of TCP, UDP or
// ICMPv6. It returns false, and changes nothing, if a is of the other family.
func (v *View) SetSource(a netip.Addr) bool {
	if !v.setAddr(12, 8, v.Source, a) {
		return false
	}
	v.Source = a
	return true
}

// SetDestination is SetSource for the destination address.
func (v *View) SetDestination(a netip.Addr) bool {
	if !v.setAddr(16, 24, v.Destination, a) {
		return false
	}
	v.Destination = a
	return true
}

// setAddr writes a over old, which is at one of two offsets, by version.
func (v *View) setAddr(at4, at6 int, old, a netip.Addr) bool {
	if a.Is4() != (v.Version == 4) || !a.IsValid() {
		return false
	}
	oldSum, newSum := addrSum(old, 0), addrSum(a, 0)
	if v.Version == 4 {
		b := a.As4()
		copy(v.Bytes[at4:], b[:])
		update(v.Bytes[10:], oldSum, newSum)
	} else {
		b := a.As16()
		copy(v.Bytes[at6:], b[:])
	}
	if v.Protocol != ICMPv4 { // the only one here without a pseudo header
		v.updateTransport(oldSum, newSum)
	}
	return true
}

// SetSourcePort changes the source port, or a query's ICMP identifier, and the
// checksum. It returns false, and changes nothing, if the packet has none:
// a fragment, another protocol, an ICMP reply.
func (v *View) SetSourcePort(port uint16) bool {
	at := v.transport
	switch {
	case !v.HasPorts || v.isICMP() && !v.isICMPQuery():
		return false
	case v.isICMP():
		at += 4
	}
	v.setWord(at, v.SourcePort, port)
	v.SourcePort = port
	return true
}

// SetDestinationPort changes the destination port, or a reply's ICMP identifier,
// and the checksum. It returns false, and changes nothing, if there is none.
func (v *View) SetDestinationPort(port uint16) bool {
	at := v.transport + 2
	switch {
	case !v.HasPorts || v.isICMP() && !v.isICMPReply():
		return false
	case v.isICMP():
		at += 2
	}
	v.setWord(at, v.DestinationPort, port)
	v.DestinationPort = port
	return true
}

func (v *View) setWord(at int, old, new uint16) {
	binary.BigEndian.PutUint16(v.Bytes[at:], new)
	v.updateTransport(old, new)
}

// DecrementTTL counts a hop. It returns false, and changes nothing, if the packet
// has none left: it must not be forwarded, and its sender may be told (TimeExceeded).
func (v *View) DecrementTTL() bool {
	if v.TTL <= 1 {
		return false
	}
	v.TTL--
	if v.Version == 6 {
		v.Bytes[7] = v.TTL
		return true
	}
	// The TTL is the upper half of a word; the other half is the protocol.
	old := binary.BigEndian.Uint16(v.Bytes[8:])
	v.Bytes[8] = v.TTL
	update(v.Bytes[10:], old, binary.BigEndian.Uint16(v.Bytes[8:]))
	return true
}

// update adjusts the checksum at the head of b.
func update(b []byte, old, new uint16) {
	binary.BigEndian.PutUint16(b, UpdateChecksum(binary.BigEndian.Uint16(b), old, new))
}

// checksumAt is where the upper layer's checksum is, as an index of Bytes; 0 if the
// packet has none that this package knows, or not in this fragment.
func (v *View) checksumAt() int {
	offset := 0
	switch {
	case v.FragmentOffset > 0:
		return 0
	case v.Protocol == TCP:
		offset = 16
	case v.Protocol == UDP:
		offset = 6
	case v.isICMP():
		offset = 2
	default:
		return 0
	}
	// A quoted packet may end before.
	if at := v.transport + offset; at+2 <= len(v.Bytes) {
		return at
	}
	return 0
}

// updateTransport adjusts the upper layer's checksum.
func (v *View) updateTransport(old, new uint16) {
	at := v.checksumAt()
	if at == 0 {
		return
	}
	b := v.Bytes[at:]
	if v.Protocol != UDP {
		update(b, old, new)
		return
	}
	// UDP: 0 means that there is no checksum, so 0 is written as 0xffff, which
	// is the same number in ones' complement (RFC 768).
	if binary.BigEndian.Uint16(b) == 0 {
		return
	}
	update(b, old, new)
	if binary.BigEndian.Uint16(b) == 0 {
		b[0], b[1] = 0xff, 0xff
	}
}

// FillChecksums computes IPv4's header checksum and the one of TCP, UDP or ICMP
// anew. In fragments and quoted packets, where the latter can't be computed, it
// does the former and returns false.
func (v *View) FillChecksums() bool {
	if v.Version == 4 {
		header := v.Bytes[:int(v.Bytes[0]&15)*4]
		header[10], header[11] = 0, 0
		binary.BigEndian.PutUint16(header[10:], Checksum(header, 0))
	}
	if v.Fragmented || len(v.Bytes) < v.end {
		return false
	}
	at := v.checksumAt()
	if at == 0 {
		return true
	}
	upper := v.Bytes[v.transport:]
	if v.Protocol == UDP {
		upper = upper[:binary.BigEndian.Uint16(upper[4:])]
	}
	field := v.Bytes[at:]
	field[0], field[1] = 0, 0
	sum := Checksum(upper, v.pseudoSum(len(upper)))
	if v.Protocol == UDP && sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(field, sum)
	return true
}

// PrepareChecksum leaves the checksum of a TCP or UDP packet to the kernel or the
// network card: it writes the pseudo header's sum into the field, and returns
// what virtio-net calls csum_start and csum_offset, in bytes: the sum is to be
// taken from start to the packet's end, and its complement written at start +
// offset. It is false, and nothing is changed, if that would not give the checksum:
// for other protocols, fragments, and UDP datagrams shorter than their packet; then
// there is FillChecksums. IPv4's header checksum is not touched.
func (v *View) PrepareChecksum() (start, offset int, ok bool) {
	at := v.checksumAt()
	if at == 0 || v.Fragmented || v.quoted || v.Protocol != TCP && v.Protocol != UDP {
		return 0, 0, false
	}
	length := len(v.Bytes) - v.transport
	if v.Protocol == UDP && int(binary.BigEndian.Uint16(v.Bytes[v.transport+4:])) != length {
		return 0, 0, false
	}
	binary.BigEndian.PutUint16(v.Bytes[at:], v.pseudoSum(length))
	return v.transport, at - v.transport, true
}

// ChecksumsValid verifies what FillChecksums fills. An absent UDP checksum is
// valid over IPv4 only (RFC 8200 section 8.1). Of a fragment or a quoted packet,
// only IPv4's header can be verified.
func (v *View) ChecksumsValid() bool {
	if v.Version == 4 && Sum(v.Bytes[:int(v.Bytes[0]&15)*4], 0) != 0xffff {
		return false
	}
	at := v.checksumAt()
	if at == 0 || v.Fragmented || len(v.Bytes) < v.end {
		return true
	}
	upper := v.Bytes[v.transport:]
	if v.Protocol == UDP {
		if binary.BigEndian.Uint16(v.Bytes[at:]) == 0 {
			return v.Version == 4
		}
		upper = upper[:binary.BigEndian.Uint16(upper[4:])]
	}
	return Sum(upper, v.pseudoSum(len(upper))) == 0xffff
}

func (v *View) pseudoSum(length int) uint16 {
	if v.Protocol == ICMPv4 {
		return 0
	}
	return PseudoSum(v.Source, v.Destination, v.Protocol, length)
}
