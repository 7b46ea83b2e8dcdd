package netstack

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	maxUDPv4 = 65535 - header.IPv4MinimumSize - header.UDPMinimumSize
	maxUDPv6 = 65535 - header.UDPMinimumSize

	fragmentHeader = 8 // of IPv6
	moreFragments  = 0x2000
)

// fragmentID numbers fragmented datagrams, all of a process, so that two
// stacks that share a tunnel's address one after the other don't repeat each
// other.
var fragmentID atomic.Uint32

// takeUDP takes the short way for a whole datagram: to the socket it is for, or
// to ForwardUDP's handler. It reports whether there was one; everything unusual
// is gVisor's.
func (s *Stack) takeUDP(p *packet) bool {
	to := p.destination()
	if !s.isOwn(to) {
		return s.udp != nil && s.forwardUDP(p)
	}
	u := p.payload()
	if len(u) < header.UDPMinimumSize || p.v4 && p.l4 != header.IPv4MinimumSize || !p.v4 && p.l4 != header.IPv6MinimumSize {
		return false
	}
	n := int(binary.BigEndian.Uint16(u[4:]))
	from := p.source()
	if n < header.UDPMinimumSize || n > len(u) || from.IsMulticast() || from.IsUnspecified() || from == broadcast {
		return false
	}
	c := s.ports.udp.find(netip.AddrPortFrom(to, binary.BigEndian.Uint16(u[2:])))
	if c == nil {
		return false
	}
	s.dev.counters.delivered.Add(1)
	c.arrived(netip.AddrPortFrom(from, binary.BigEndian.Uint16(u)), u[header.UDPMinimumSize:n])
	return true
}

// WriteUDP sends a datagram that bears any source address, in fragments when
// it exceeds the MTU. Both addresses are of one family. Errors wrap EMSGSIZE
// or EAFNOSUPPORT, or are net.ErrClosed.
func (s *Stack) WriteUDP(from, to netip.AddrPort, payload []byte) error {
	if s.dev.outClosed.Load() {
		s.dev.counters.dropClosed.Add(1)
		return net.ErrClosed
	}
	from, to = unmap(from), unmap(to)
	limit := maxUDPv6
	if from.Addr().Is4() {
		limit = maxUDPv4
	}
	var err error
	switch {
	case !from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4():
		err = syscall.EAFNOSUPPORT
	case len(payload) > limit:
		err = syscall.EMSGSIZE
	default:
		b := s.dev.batch()
		b.putUDP(from, to, payload)
		b.done()
		return nil
	}
	return &net.OpError{Op: "write", Net: "udp", Source: net.UDPAddrFromAddrPort(from), Addr: net.UDPAddrFromAddrPort(to), Err: os.NewSyscallError("sendto", err)}
}

// putUDP appends the packets of a datagram.
func (b *batch) putUDP(from, to netip.AddrPort, payload []byte) {
	var udp [header.UDPMinimumSize]byte
	putUDPHeader(udp[:], from, to, len(payload))
	v4 := from.Addr().Is4()
	ipLen := header.IPv6MinimumSize
	if v4 {
		ipLen = header.IPv4MinimumSize
	}
	total := len(udp) + len(payload)
	if ipLen+total <= int(b.dev.mtu) {
		p := b.next(ipLen + total)
		copy(p[ipLen:], udp[:])
		copy(p[ipLen+len(udp):], payload)
		if v4 {
			// RFC 6864 section 4.1: without fragments the id means nothing.
			putIPv4(p, protoUDP, from.Addr(), to.Addr(), 0, 0)
		} else {
			putIPv6(p, protoUDP, from.Addr(), to.Addr())
		}
		return
	}
	id := fragmentID.Add(1)
	if !v4 {
		ipLen += fragmentHeader
	}
	piece := (int(b.dev.mtu) - ipLen) &^ 7 // offsets count 8 bytes
	for at := 0; at < total; at += piece {
		n := min(piece, total-at)
		p := b.next(ipLen + n)
		d := p[ipLen:]
		if at == 0 {
			d = d[copy(d, udp[:]):]
			copy(d, payload)
		} else {
			copy(d, payload[at-len(udp):])
		}
		more := at+n < total
		if v4 {
			field := uint16(at / 8)
			if more {
				field |= moreFragments
			}
			putIPv4(p, protoUDP, from.Addr(), to.Addr(), uint16(id), field)
			continue
		}
		putIPv6(p, protoFragment, from.Addr(), to.Addr())
		f := p[header.IPv6MinimumSize:]
		f[0], f[1] = protoUDP, 0
		field := uint16(at)
		if more {
			field |= 1
		}
		binary.BigEndian.PutUint16(f[2:], field)
		binary.BigEndian.PutUint32(f[4:], id)
	}
}

// putUDPHeader writes a UDP header for n bytes of payload, without checksum.
func putUDPHeader(h []byte, from, to netip.AddrPort, n int) {
	binary.BigEndian.PutUint16(h, from.Port())
	binary.BigEndian.PutUint16(h[2:], to.Port())
	binary.BigEndian.PutUint16(h[4:], uint16(header.UDPMinimumSize+n))
	h[6], h[7] = 0, 0
}

// RejectUDP answers a datagram that ForwardUDP delivered with the ICMP (or
// ICMPv6) unreachable message for code, sent from to.Addr() to from and
// quoting the datagram.
func (s *Stack) RejectUDP(from, to netip.AddrPort, payload []byte, code Unreachable) {
	from, to = unmap(from), unmap(to)
	if s.dev.outClosed.Load() || code > UnreachableProhibited ||
		!from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4() {
		return
	}
	var quote [header.IPv6MinimumSize + header.UDPMinimumSize]byte
	n := header.UDPMinimumSize + len(payload)
	q := quote[:header.IPv6MinimumSize+header.UDPMinimumSize]
	if from.Addr().Is4() {
		q = quote[:header.IPv4MinimumSize+header.UDPMinimumSize]
		putIPv4(q, protoUDP, from.Addr(), to.Addr(), 0, 0)
		binary.BigEndian.PutUint16(q[2:], uint16(header.IPv4MinimumSize+n))
		setIPv4Checksum(q[:header.IPv4MinimumSize])
	} else {
		putIPv6(q, protoUDP, from.Addr(), to.Addr())
		binary.BigEndian.PutUint16(q[4:], uint16(n))
	}
	putUDPHeader(q[len(q)-header.UDPMinimumSize:], from, to, len(payload))
	s.dev.unreachable(code, from.Addr(), to.Addr(), q, payload)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
