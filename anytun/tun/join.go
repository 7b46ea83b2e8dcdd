package tun

import (
	"bytes"
	"encoding/binary"
)

// maxRun is how many packets become one super-packet at most. 65535 bytes hold
// 47 of 1400 bytes; the limit is for small ones.
const maxRun = 128

// run is a series of packets that can be given to the kernel as one: same flow,
// and headers from which the kernel makes exactly the same packets when it cuts
// the whole again. For TCP the rules are those of the client's joining: equal
// acknowledgement, window, options, TTL and ECN bits; PSH ends a run; SYN, FIN,
// RST, URG, CWR, pure acknowledgements, IP options, extension headers and
// fragments are never joined. Besides, all packets but the last are of one
// size, since the kernel cuts by size.
type run struct {
	first []byte // the first packet
	head  int    // bytes of IP and transport header
	l4    int
	piece int    // payload bytes of the first packet
	next  uint32 // TCP: the sequence number that continues the run
	id    uint16 // IPv4: the identification that continues it
	size  int    // bytes of the joined packet
	count int    // packets
	udp   bool
	open  bool // more can be added
}

// startRun begins a run with the packet b.
func startRun(b []byte, l *layout, uso bool) run {
	r := run{first: b, l4: l.l4, size: len(b), count: 1}
	plain := ipv6Size
	if l.v4 {
		plain = ipv4Size
		r.id = binary.BigEndian.Uint16(b[4:]) + 1
	}
	if l.l4 != plain || !l.covered {
		return r
	}
	t := b[l.l4:]
	switch l.proto {
	case protoTCP:
		r.head = l.l4 + int(t[12]>>4)*4
		if r.head < l.l4+tcpSize || r.head >= len(b) || t[13]&^flagECE != flagACK {
			return r
		}
		r.piece = len(b) - r.head
		r.next = binary.BigEndian.Uint32(t[4:]) + uint32(r.piece)
		r.open = true
	case protoUDP:
		r.head = l.l4 + udpSize
		r.piece = len(b) - r.head
		r.udp = true
		r.open = uso && r.piece > 0 && int(binary.BigEndian.Uint16(t[4:])) == len(t)
	}
	return r
}

// add reports whether b, a packet of any kind, continues the run, and counts
// it in if so.
func (r *run) add(b []byte) bool {
	n := len(b) - r.head
	if !r.open || n <= 0 || n > r.piece || r.size+n > maxPacket || r.count == maxRun {
		return false
	}
	h := r.first[:r.head]
	if h[0]>>4 == 4 {
		if b[0] != h[0] || b[1] != h[1] || int(binary.BigEndian.Uint16(b[2:])) != len(b) ||
			b[6] != h[6] || b[7] != 0 || b[8] != h[8] || b[9] != h[9] || !bytes.Equal(b[12:20], h[12:20]) {
			return false
		}
		// The kernel numbers the packets one by one. Without DF somebody may
		// reassemble by these numbers; with it they mean nothing (RFC 6864).
		if h[6]&0x40 == 0 && binary.BigEndian.Uint16(b[4:]) != r.id {
			return false
		}
	} else if !bytes.Equal(b[:4], h[:4]) || int(binary.BigEndian.Uint16(b[4:])) != len(b)-ipv6Size ||
		!bytes.Equal(b[6:ipv6Size], h[6:ipv6Size]) {
		return false
	}
	t, first := b[r.l4:r.head], h[r.l4:]
	if !bytes.Equal(t[:4], first[:4]) { // ports
		return false
	}
	open := n == r.piece
	if r.udp {
		if int(binary.BigEndian.Uint16(t[4:])) != len(b)-r.l4 {
			return false
		}
	} else {
		if binary.BigEndian.Uint32(t[4:]) != r.next ||
			!bytes.Equal(t[8:13], first[8:13]) || // acknowledgement, data offset
			t[13]&^flagPSH != first[13] ||
			!bytes.Equal(t[14:16], first[14:16]) || // window
			!bytes.Equal(t[18:], first[18:]) { // urgent pointer, options
			return false
		}
		if t[13]&flagPSH != 0 {
			open = false
		}
	}
	r.next += uint32(n)
	r.id++
	r.size += n
	r.count++
	r.open = open
	return true
}

// seal makes the first packet's headers those of the whole run, whose last
// packet is given, and returns the header for the kernel. The transport checksum
// becomes the sum of the pseudo header, the kernel does the rest.
func (r *run) seal(last []byte, l *layout) vnet {
	b := r.first
	var v vnet
	if r.count > 1 {
		if l.v4 {
			binary.BigEndian.PutUint16(b[2:], uint16(r.size))
			setIPv4Checksum(b[:r.l4])
			v.gso = gsoTCPv4
		} else {
			binary.BigEndian.PutUint16(b[4:], uint16(r.size-ipv6Size))
			v.gso = gsoTCPv6
		}
		if r.udp {
			binary.BigEndian.PutUint16(b[r.l4+4:], uint16(r.size-r.l4))
			v.gso = gsoUDP
		} else {
			b[r.l4+13] |= last[r.l4+13] & flagPSH
		}
		v.headLen, v.gsoSize = uint16(r.head), uint16(r.piece)
	}
	if at := checksumAt(l); at > 0 && l.covered && !r.short(l) {
		v.flags = vnetNeedsChecksum
		v.start, v.offset = uint16(l.l4), uint16(at)
		binary.BigEndian.PutUint16(b[l.l4+at:], pseudoSum(b, l, r.size-l.l4))
	}
	return v
}

// short is whether a UDP datagram ends before its packet does (RFC 9868). The
// kernel would sum all of it, so its checksum is computed here.
func (r *run) short(l *layout) bool {
	if l.proto != protoUDP || r.count > 1 {
		return false
	}
	t := r.first[l.l4:]
	n := int(binary.BigEndian.Uint16(t[4:]))
	if n == len(t) {
		return false
	}
	t[6], t[7] = 0, 0
	c := ^fold(sum(uint32(pseudoSum(r.first, l, n)), t[:n]))
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(t[6:], c)
	return true
}

// checksumAt is the offset of the checksum in the transport header, 0 for
// protocols that go as they are.
func checksumAt(l *layout) int {
	switch {
	case l.proto == protoTCP:
		return 16
	case l.proto == protoUDP:
		return 6
	case l.proto == protoICMPv6 && !l.v4:
		return 2
	}
	return 0
}

// flowKey is a number that all packets of a flow share, and rarely those of
// another one; 0 for packets that don't tell their flow in the usual place:
// with options or extension headers, fragments, other protocols.
func flowKey(b []byte) uint64 {
	const k1, k2 = 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f // odd, of many bits
	switch {
	case len(b) >= ipv4Size+udpSize && b[0] == 4<<4|ipv4Size/4:
		if b[9] != protoTCP && b[9] != protoUDP || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
			return 0
		}
		addrs, ports := binary.LittleEndian.Uint64(b[12:]), binary.LittleEndian.Uint32(b[20:])
		return (addrs^uint64(ports)*k2)*k1 + uint64(b[9])
	case len(b) >= ipv6Size+udpSize && b[0]>>4 == 6:
		if b[6] != protoTCP && b[6] != protoUDP {
			return 0
		}
		key := uint64(b[6]) ^ uint64(binary.LittleEndian.Uint32(b[ipv6Size:]))*k2
		for at := 8; at < ipv6Size; at += 8 {
			key = (key ^ binary.LittleEndian.Uint64(b[at:])) * k1
		}
		return key
	}
	return 0
}

// examine parses a packet for the kernel and cuts off what is behind it. It
// refuses those whose transport header is too short or contradicts the IP
// header.
func examine(b []byte) (pkt []byte, l layout, ok bool) {
	l, ok = parse(b)
	if !ok {
		return nil, l, false
	}
	b = b[:l.size]
	if !l.covered {
		return b, l, true
	}
	t := b[l.l4:]
	switch l.proto {
	case protoTCP:
		ok = len(t) >= tcpSize && int(t[12]>>4)*4 >= tcpSize && int(t[12]>>4)*4 <= len(t)
	case protoUDP:
		n := 0
		if len(t) >= udpSize {
			n = int(binary.BigEndian.Uint16(t[4:]))
		}
		ok = n >= udpSize && n <= len(t)
	case protoICMPv6:
		ok = l.v4 || len(t) >= 4
	}
	return b, l, ok
}
