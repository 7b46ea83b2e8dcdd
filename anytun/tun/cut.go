package tun

import "encoding/binary"

// room is what is left free around each packet, bytes.
type room struct{ head, tail int }

// plan says how a packet from the kernel is cut.
type plan struct {
	layout
	head  int // bytes of the headers that each piece gets
	piece int // payload bytes of each piece but the last
	count int
}

// planCut decides how the packet b with header v is cut.
func planCut(b []byte, v vnet) (p plan, why DropReason, ok bool) {
	l, ok := parse(b)
	if !ok || l.size != len(b) {
		return p, DropMalformed, false
	}
	p = plan{layout: l, count: 1}
	if v.gso == gsoNone {
		return p, 0, true
	}
	p.piece = int(v.gsoSize)
	t := b[l.l4:]
	switch kind := v.gso &^ gsoECN; {
	case kind == gsoTCPv4 && l.v4 && l.proto == protoTCP, kind == gsoTCPv6 && !l.v4 && l.proto == protoTCP:
		if len(t) < tcpSize {
			return p, DropMalformed, false
		}
		n := int(t[12]>>4) * 4
		if n < tcpSize || n > len(t) {
			return p, DropMalformed, false
		}
		p.head = l.l4 + n
	case kind == gsoUDP && l.proto == protoUDP:
		if len(t) < udpSize {
			return p, DropMalformed, false
		}
		p.head = l.l4 + udpSize
	default:
		return p, DropOffload, false
	}
	if p.piece == 0 || !l.covered {
		return p, DropMalformed, false
	}
	if payload := l.size - p.head; payload > p.piece {
		p.count = (payload + p.piece - 1) / p.piece
	}
	return p, 0, true
}

// stride is the distance from one piece's buffer to the next one's.
func (p *plan) stride(r room) int { return r.head + p.head + p.piece + r.tail }

// space is the length of all buffers, bytes.
func (p *plan) space(r room) int {
	if p.count == 1 {
		return r.head + p.size + r.tail
	}
	last := p.size - p.head - (p.count-1)*p.piece
	return (p.count-1)*p.stride(r) + r.head + p.head + last + r.tail
}

// cut spreads the packet at b[r.head:] over b, which is p.space(r) long, and
// appends the buffers of its pieces to dst: room, headers, payload, room. The
// pieces' transport checksums mean nothing.
//
// Each piece but the first moves towards the end of b, farther than the one
// before it, so that moving the last one first never covers one that is still
// to be moved.
func cut(dst [][]byte, b []byte, p *plan, r room) [][]byte {
	if p.count == 1 {
		return append(dst, b)
	}
	first := b[r.head:]
	head := first[:p.head]
	fix := newFix(head, p)
	stride := p.stride(r)
	end := len(b)
	base := len(dst)
	for range p.count {
		dst = append(dst, nil)
	}
	for i := p.count - 1; i > 0; i-- {
		at := i * stride
		q := b[at+r.head : end-r.tail]
		copy(q[p.head:], first[p.head+i*p.piece:])
		copy(q, head)
		fix.correct(q, i)
		dst[base+i] = b[at:end:end]
		end = at
	}
	fix.correct(b[r.head:end-r.tail], 0)
	dst[base] = b[0:end:end]
	return dst
}

// fix holds what the headers of pieces are computed from.
type fix struct {
	*plan
	rest  uint32 // sum of the words of the IPv4 header that all pieces share
	id    uint16
	seq   uint32
	flags byte
}

func newFix(head []byte, p *plan) fix {
	f := fix{plan: p}
	if p.v4 {
		f.rest = sum(sum(sum(0, head[:2]), head[6:10]), head[12:p.l4])
		f.id = binary.BigEndian.Uint16(head[4:])
	}
	if p.proto == protoTCP {
		f.seq = binary.BigEndian.Uint32(head[p.l4+4:])
		f.flags = head[p.l4+13]
	}
	return f
}

// correct makes the headers of q those of the piece number i.
func (f *fix) correct(q []byte, i int) {
	if f.v4 {
		// As the kernel numbers them, should anybody fragment them.
		id := f.id + uint16(i)
		binary.BigEndian.PutUint16(q[2:], uint16(len(q)))
		binary.BigEndian.PutUint16(q[4:], id)
		binary.BigEndian.PutUint16(q[10:], ^fold(f.rest+uint32(len(q))+uint32(id)))
	} else {
		binary.BigEndian.PutUint16(q[4:], uint16(len(q)-ipv6Size))
	}
	t := q[f.l4:]
	if f.proto == protoUDP {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
		return
	}
	binary.BigEndian.PutUint32(t[4:], f.seq+uint32(i*f.piece))
	flags := f.flags
	if i > 0 {
		flags &^= flagCWR // RFC 3168 section 6.1.2: said once
	}
	if i < f.count-1 {
		flags &^= flagFIN | flagPSH
	}
	t[13] = flags
}

// finish computes the checksum that the kernel left undone in b, unless it is
// that of the packet's own TCP or UDP, which the tunnel doesn't need.
func finish(b []byte, l *layout, v vnet) bool {
	if v.flags&vnetNeedsChecksum == 0 {
		return true
	}
	start, at := int(v.start), int(v.start)+int(v.offset)
	if start == l.l4 && l.covered && (l.proto == protoTCP || l.proto == protoUDP) {
		return true
	}
	if start < l.l4 || at+2 > len(b) {
		return false
	}
	// The field takes part: it holds the sum of the pseudo header.
	c := ^fold(sum(0, b[start:]))
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b[at:], c)
	return true
}
