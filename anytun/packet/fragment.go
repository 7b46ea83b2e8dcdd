package packet

import "encoding/binary"

// Fragment cuts an IP packet into fragments of at most mtu bytes. Each is written
// into a buffer of its exact length that room(n) returns. The transport checksum,
// which spans the fragments, must be valid before. pkt is not changed.
//
// IPv4 (RFC 791 section 3.2): pkt may be a fragment itself. IPv6 (RFC 8200 section
// 4.5): pkt gets a fragment header with the identification id, which should not be
// one used lately between the same addresses.
//
// It returns false if that is not possible: an IPv4 packet that says "don't
// fragment", an IPv6 packet that is a fragment, one whose headers leave no room
// in mtu, one that is malformed; or if room returns nil. A packet of up to mtu bytes
// is given to room as it is, once.
func Fragment(pkt []byte, mtu int, id uint32, room func(n int) []byte) bool {
	var v View
	if v.Parse(pkt) != OK {
		return false
	}
	if len(v.Bytes) <= mtu {
		return fill(room, v.Bytes, nil, nil) != nil
	}
	if v.Version == 4 {
		return v.fragment4(mtu, room)
	}
	return v.fragment6(mtu, id, room)
}

// fill puts up to three parts together in a buffer from room.
func fill(room func(n int) []byte, parts ...[]byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	b := room(n)
	if len(b) < n {
		return nil
	}
	to := b[:0]
	for _, p := range parts {
		to = append(to, p...)
	}
	return b[:n]
}

func (v *View) fragment4(mtu int, room func(n int) []byte) bool {
	const dontFragment, moreFragments = 0x4000, 0x2000
	flags := binary.BigEndian.Uint16(v.Bytes[6:])
	if flags&dontFragment != 0 {
		return false
	}
	header, data := v.Bytes[:v.transport4()], v.Bytes[v.transport4():]
	if chunk := (mtu - len(header)) &^ 7; chunk <= 0 || v.FragmentOffset == 0 && chunk < v.payload-v.transport {
		return false // the first must hold the transport header (RFC 1858)
	}
	var later [60]byte // the header of all but the first
	for sent := 0; sent < len(data); {
		take, last := len(data)-sent, true
		if take > mtu-len(header) {
			take, last = (mtu-len(header))&^7, false
		}
		b := fill(room, header, data[sent:sent+take])
		if b == nil {
			return false
		}
		word := flags&moreFragments | uint16((v.FragmentOffset+sent)/8)
		if !last {
			word |= moreFragments
		}
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[6:], word)
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], Checksum(b[:len(header)], 0))
		if sent == 0 {
			header = laterHeader(later[:0], header)
		}
		sent += take
	}
	return true
}

// transport4 is where the data of an IPv4 packet begins.
func (v *View) transport4() int { return int(v.Bytes[0]&15) * 4 }

// laterHeader appends to b the IPv4 header of fragments other than the first: only
// options with the copied flag are in there (RFC 791 section 3.1). The options are
// well-formed, since checkOptions has been over them.
func laterHeader(b, first []byte) []byte {
	const endOfList, noOperation, copied = 0, 1, 0x80
	b = append(b, first[:ipv4HeaderLen]...)
	for o := first[ipv4HeaderLen:]; len(o) > 0 && o[0] != endOfList; {
		if o[0] == noOperation {
			o = o[1:]
			continue
		}
		if o[0]&copied != 0 {
			b = append(b, o[:o[1]]...)
		}
		o = o[o[1]:]
	}
	for len(b)%4 != 0 {
		b = append(b, endOfList)
	}
	b[0] = 4<<4 | byte(len(b)/4)
	return b
}

func (v *View) fragment6(mtu int, id uint32, room func(n int) []byte) bool {
	at, next, ok := v.perFragment6()
	if !ok {
		return false
	}
	header, data := v.Bytes[:at], v.Bytes[at:]
	chunk := (mtu - len(header) - fragmentHeaderLen) &^ 7
	// The first fragment must hold all headers (RFC 7112).
	if chunk <= 0 || chunk < v.payload-at {
		return false
	}
	ext := [fragmentHeaderLen]byte{0: v.Bytes[next]}
	binary.BigEndian.PutUint32(ext[4:], id)
	for sent := 0; sent < len(data); {
		take, more := min(chunk, len(data)-sent), uint16(0)
		if sent+take < len(data) {
			more = 1
		}
		b := fill(room, header, ext[:], data[sent:sent+take])
		if b == nil {
			return false
		}
		b[next] = byte(FragmentHeader)
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6HeaderLen))
		binary.BigEndian.PutUint16(b[at+2:], uint16(sent)|more)
		sent += take
	}
	return true
}

// perFragment6 returns where the part of an IPv6 packet ends that every fragment
// repeats (up to a routing header, or else a hop-by-hop header), and the place of
// the byte there that says what follows. It is false if there is a fragment header
// already, be it of a whole packet.
func (v *View) perFragment6() (end, next int, ok bool) {
	end, next = ipv6HeaderLen, 6
	at, from := end, next
	for at < v.transport {
		p := Protocol(v.Bytes[from])
		if p == FragmentHeader {
			return 0, 0, false
		}
		size := 8 + int(v.Bytes[at+1])*8
		if p == AH {
			size = 8 + int(v.Bytes[at+1])*4
		}
		if p == Routing || p == HopByHop && at == ipv6HeaderLen {
			end, next = at+size, at
		}
		from, at = at, at+size
	}
	return end, next, true
}
