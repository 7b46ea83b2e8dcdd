package netstack

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// run is a series of TCP segments that can be delivered as one: same flow, one
// behind another in the sequence space, and headers that differ in nothing but
// lengths, IPv4's identification, sequence number, checksums and PSH. So
// nothing that the endpoint would see is lost: a change of the acknowledgement,
// the window, the options with their timestamps, the TTL, or the ECN bits of
// IP or TCP ends a run, as does PSH, after the segment that has it. SYN, FIN,
// RST, URG and CWR, pure acknowledgements, IP options and fragments are never
// joined.
type run struct {
	head  []byte // IP and TCP header of the first segment
	l4    int    // offset of the TCP header
	next  uint32 // the sequence number that continues the run
	size  int    // bytes of the joined packet
	ended bool
}

// startRun begins a run with p; ok is false if nothing can be joined to it.
func startRun(p *packet) (r run, ok bool) {
	l4 := header.IPv4MinimumSize
	if !p.v4 {
		l4 = header.IPv6MinimumSize
	}
	if p.proto != protoTCP || p.l4 != l4 || p.frag || len(p.b) < l4+header.TCPMinimumSize {
		return r, false
	}
	hl := l4 + int(p.b[l4+12]>>4)*4
	if hl < l4+header.TCPMinimumSize || hl >= len(p.b) || p.b[l4+13]&^flagECE != flagACK {
		return r, false
	}
	n := len(p.b) - hl
	return run{
		head: p.b[:hl],
		l4:   l4,
		next: binary.BigEndian.Uint32(p.b[l4+4:]) + uint32(n),
		size: len(p.b),
	}, true
}

// add reports whether the IP packet b continues the run, and counts it in if
// so.
func (r *run) add(b []byte) bool {
	h, l4, hl := r.head, r.l4, len(r.head)
	n := len(b) - hl
	if r.ended || n <= 0 || r.size+n > maxMTU {
		return false
	}
	if h[0]>>4 == 4 {
		if b[0] != h[0] || b[1] != h[1] || int(binary.BigEndian.Uint16(b[2:])) != len(b) ||
			b[6] != h[6] || b[7] != 0 || b[8] != h[8] || b[9] != protoTCP || !bytes.Equal(b[12:20], h[12:20]) {
			return false
		}
	} else {
		// RFC 8200 section 4.5 limits the payload, not the packet; one limit for
		// both families is simpler and costs 40 bytes.
		if !bytes.Equal(b[:4], h[:4]) || int(binary.BigEndian.Uint16(b[4:])) != len(b)-header.IPv6MinimumSize ||
			!bytes.Equal(b[6:40], h[6:40]) {
			return false
		}
	}
	t, first := b[l4:hl], h[l4:hl]
	if !bytes.Equal(t[:4], first[:4]) || // ports
		binary.BigEndian.Uint32(t[4:]) != r.next ||
		!bytes.Equal(t[8:13], first[8:13]) || // acknowledgement, data offset
		t[13]&^flagPSH != first[13] ||
		!bytes.Equal(t[14:16], first[14:16]) || // window
		!bytes.Equal(t[20:], first[20:]) { // options
		return false
	}
	r.next += uint32(n)
	r.size += n
	r.ended = t[13]&flagPSH != 0
	return true
}

// join corrects h, the IP and TCP header of p, for the packet of size bytes that p
// makes together with more, the segments that a run has counted in. The TCP
// checksum stays invalid.
func join(h []byte, p *packet, more [][]byte, size int) {
	h[p.l4+13] |= more[len(more)-1][p.l4+13] & flagPSH
	if p.v4 {
		binary.BigEndian.PutUint16(h[2:], uint16(size))
		setIPv4Checksum(h[:p.l4])
		return
	}
	binary.BigEndian.PutUint16(h[4:], uint16(size-header.IPv6MinimumSize))
}
