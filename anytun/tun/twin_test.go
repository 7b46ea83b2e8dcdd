package tun

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
)

// The twins do slowly and plainly what the package does fast, from the
// packets' formats alone.

// twinSum is the Internet checksum of b, byte by byte.
func twinSum(b []byte) uint16 {
	var s uint64
	for i, c := range b {
		if i%2 == 0 {
			s += uint64(c) << 8
		} else {
			s += uint64(c)
		}
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// twinPseudo is the pseudo header of a plain packet.
func twinPseudo(b []byte, n int) []byte {
	if b[0]>>4 == 4 {
		p := append([]byte(nil), b[12:20]...)
		return append(p, 0, b[9], byte(n>>8), byte(n))
	}
	p := append([]byte(nil), b[8:40]...)
	return append(p, 0, 0, byte(n>>8), byte(n), 0, 0, 0, b[6])
}

// twinCut does what a kernel does with the super-packet b whose headers are
// plain.
func twinCut(b []byte, v vnet) [][]byte {
	if v.gso&^gsoECN == gsoNone {
		return [][]byte{append([]byte(nil), b...)}
	}
	v4 := b[0]>>4 == 4
	l4, proto := 40, b[6]
	if v4 {
		l4, proto = int(b[0]&15)*4, b[9]
	}
	hl := l4 + 8
	if proto == protoTCP {
		hl = l4 + int(b[l4+12]>>4)*4
	}
	var out [][]byte
	for at := hl; at < len(b); {
		n := int(v.gsoSize)
		if at+n > len(b) {
			n = len(b) - at
		}
		p := append([]byte(nil), b[:hl]...)
		p = append(p, b[at:at+n]...)
		if v4 {
			binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
			binary.BigEndian.PutUint16(p[4:], binary.BigEndian.Uint16(b[4:])+uint16(len(out)))
			p[10], p[11] = 0, 0
			binary.BigEndian.PutUint16(p[10:], twinSum(p[:l4]))
		} else {
			binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		}
		if proto == protoTCP {
			binary.BigEndian.PutUint32(p[l4+4:], binary.BigEndian.Uint32(b[l4+4:])+uint32(at-hl))
			if len(out) > 0 {
				p[l4+13] &^= flagCWR
			}
			if at+n < len(b) {
				p[l4+13] &^= flagFIN | flagPSH
			}
		} else {
			binary.BigEndian.PutUint16(p[l4+4:], uint16(len(p)-l4))
		}
		out = append(out, p)
		at += n
	}
	return out
}

// blank zeroes the plain packet's transport checksum.
func blank(b []byte) []byte {
	b = append([]byte(nil), b...)
	_, l, ok := examine(b)
	if at := checksumAt(&l); ok && at > 0 && l.covered {
		b[l.l4+at], b[l.l4+at+1] = 0, 0
	}
	return b
}

// twinFlow names the flow of a packet: protocol, addresses and ports; "" if they
// are not in their usual places, so that it may be any's.
func twinFlow(b []byte) string {
	proto, at, l4 := byte(0), 0, 0
	switch {
	case b[0] == 0x45 && b[6]&0x3f == 0 && b[7] == 0:
		proto, at, l4 = b[9], 12, 20
	case b[0]>>4 == 6:
		proto, at, l4 = b[6], 8, 40
	}
	if proto != protoTCP && proto != protoUDP {
		return ""
	}
	return string(append([]byte{proto}, b[at:l4+4]...))
}

// twinOrder brings packets into the order in which a device may write them: flow by
// flow, though none past a packet that may be of any flow.
func twinOrder(pkts [][]byte) [][]byte {
	var out [][]byte
	for len(pkts) > 0 {
		n := 0
		var flows []string
		parts := make(map[string][][]byte)
		for n < len(pkts) && twinFlow(pkts[n]) != "" {
			name := twinFlow(pkts[n])
			if parts[name] == nil {
				flows = append(flows, name)
			}
			parts[name] = append(parts[name], pkts[n])
			n++
		}
		slices.Sort(flows)
		for _, name := range flows {
			out = append(out, parts[name]...)
		}
		if n < len(pkts) {
			out = append(out, pkts[n])
			n++
		}
		pkts = pkts[n:]
	}
	return out
}

// flow makes packets of one connection.
type flow struct {
	r       *rand.Rand
	v4, udp bool
	df      bool
	port    uint16
	options int // bytes of TCP options
	piece   int // usual payload
	seq     uint32
	id      uint16
	psh     int // one of so many
	odd     int // one of so many has something unusual; 0: none
}

func newFlow(r *rand.Rand, odd int) *flow {
	return &flow{
		r: r, v4: r.IntN(2) == 0, udp: r.IntN(3) == 0, df: r.IntN(2) == 0, port: uint16(r.Uint32()),
		options: r.IntN(11) * 4, piece: 1 + r.IntN(1300), seq: r.Uint32(), id: uint16(r.Uint32()), psh: 20, odd: odd,
	}
}

// packet is the next one, with n bytes of payload.
func (f *flow) packet(n int) []byte {
	r := f.r
	l4, hl := 40, udpSize
	if f.v4 {
		l4 = 20
	}
	if !f.udp {
		hl = tcpSize + f.options
	}
	b := make([]byte, l4+hl+n)
	for i := range b[l4+hl:] {
		b[l4+hl+i] = byte(r.Uint32())
	}
	proto := byte(protoTCP)
	if f.udp {
		proto = protoUDP
	}
	if f.v4 {
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[4:], f.id)
		if f.df {
			b[6] = 0x40
		}
		copy(b[12:], []byte{100, 64, 0, 1, 192, 0, 2, 2})
	} else {
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		b[8], b[23], b[24], b[39] = 0xfd, 1, 0x20, 2
	}
	t := b[l4:]
	binary.BigEndian.PutUint16(t, f.port)
	binary.BigEndian.PutUint16(t[2:], 443)
	if f.udp {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	} else {
		binary.BigEndian.PutUint32(t[4:], f.seq)
		binary.BigEndian.PutUint32(t[8:], 0x01020304)
		t[12] = byte(hl / 4 << 4)
		t[13] = flagACK
		if r.IntN(f.psh) == 0 {
			t[13] |= flagPSH
		}
		binary.BigEndian.PutUint16(t[14:], 501)
		for i := range f.options {
			t[20+i] = 1 // NOP
		}
	}
	f.seq += uint32(n)
	f.id++
	if f.odd > 0 && r.IntN(f.odd) == 0 {
		// Anything of the headers but the lengths.
		i := r.IntN(l4 + hl)
		switch {
		case i == 0, f.v4 && (i == 2 || i == 3 || i == 9), !f.v4 && i >= 4 && i <= 6, f.udp && (i == l4+4 || i == l4+5), !f.udp && i == l4+12:
		default:
			b[i] ^= 1 << r.IntN(8)
		}
	}
	if f.v4 {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], twinSum(b[:20]))
	}
	return b
}

// packets makes n of them, in bursts of equal size with a shorter one at the end.
func (f *flow) packets(n int) [][]byte {
	var out [][]byte
	for range n {
		size := f.piece
		switch f.r.IntN(20) {
		case 0:
			size = f.r.IntN(size + 1)
		case 1:
			size = f.r.IntN(1400)
		}
		if f.odd > 0 && f.r.IntN(4*f.odd) == 0 {
			f.seq++
		}
		out = append(out, f.packet(size))
	}
	return out
}
