package netstack

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// ICMP in three parts: building unreachable messages (RejectUDP, Reject),
// recognising them on their way in, and remembering why a dial failed where
// gVisor doesn't tell.

// Unreachable says why a packet could not be delivered.
type Unreachable uint8

const (
	// UnreachablePort means that nobody listens at the port.
	UnreachablePort Unreachable = iota
	// UnreachableHost means that the host could not be reached.
	UnreachableHost
	// UnreachableNet means that there is no route.
	UnreachableNet
	// UnreachableProhibited means that a rule forbids it.
	UnreachableProhibited
)

const (
	icmpUnreachable   = 3 // RFC 792
	icmpv6Unreachable = 1 // RFC 4443 section 3.1

	icmpHeader = 8

	// maxICMP bounds an IPv4 error message: RFC 1812 section 4.3.2.3.
	maxICMP = 576
)

// The codes of an unreachable message.
const (
	icmpNet        = 0
	icmpHost       = 1
	icmpPort       = 3
	icmpNetAdmin   = 9
	icmpHostAdmin  = 10
	icmpProhibited = 13 // RFC 1812 section 5.2.7.1

	icmpv6Net        = 0
	icmpv6Prohibited = 1
	icmpv6Address    = 3
	icmpv6Port       = 4
	icmpv6Policy     = 5
	icmpv6Reject     = 6
)

// codeOf returns the ICMP or ICMPv6 code for u.
func (u Unreachable) codeOf(v4 bool) byte {
	if v4 {
		return [...]byte{icmpPort, icmpHost, icmpNet, icmpProhibited}[u]
	}
	return [...]byte{icmpv6Port, icmpv6Address, icmpv6Net, icmpv6Prohibited}[u]
}

// unreachable sends the error message u about a packet that went from `from`
// to `to`, in the name of `to`. The packet, from its IP header on, is head and
// then tail; as much of it is quoted as the message may have.
func (d *device) unreachable(u Unreachable, from, to netip.Addr, head, tail []byte) {
	v4 := from.Is4()
	ipLen, limit := header.IPv6MinimumSize, minMTU
	if v4 {
		ipLen, limit = header.IPv4MinimumSize, maxICMP
	}
	n := min(ipLen+icmpHeader+len(head)+len(tail), limit)
	b := d.batch()
	p := b.next(n)
	m := p[ipLen:]
	clear(m[:icmpHeader])
	m[1] = u.codeOf(v4)
	q := m[icmpHeader:]
	copy(q[copy(q, head):], tail)
	if v4 {
		m[0] = icmpUnreachable
		putIPv4(p, protoICMP, to, from, 0, 0)
		binary.BigEndian.PutUint16(m[2:], ^fold(sum(0, m)))
	} else {
		m[0] = icmpv6Unreachable
		putIPv6(p, protoICMPv6, to, from)
		binary.BigEndian.PutUint16(m[2:], ^fold(sum(pseudoSum(to, from, protoICMPv6, len(m)), m)))
	}
	b.done()
}

// pseudoSum is the sum over the pseudo header of RFC 8200 section 8.1.
func pseudoSum(from, to netip.Addr, proto byte, n int) uint64 {
	f, t := from.As16(), to.As16()
	return sum(sum(uint64(proto)+uint64(n), f[:]), t[:])
}

// putIPv4 writes the 20 bytes of an IPv4 header for the packet p. fragment is
// the field of flags and offset.
func putIPv4(p []byte, proto byte, from, to netip.Addr, id, fragment uint16) {
	p[0], p[1] = 0x45, 0
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[4:], id)
	binary.BigEndian.PutUint16(p[6:], fragment)
	p[8], p[9] = 64, proto
	f, t := from.As4(), to.As4()
	copy(p[12:], f[:])
	copy(p[16:], t[:])
	setIPv4Checksum(p[:header.IPv4MinimumSize])
}

// putIPv6 writes the 40 bytes of an IPv6 header for the packet p.
func putIPv6(p []byte, proto byte, from, to netip.Addr) {
	binary.BigEndian.PutUint32(p, 6<<28)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-header.IPv6MinimumSize))
	p[6], p[7] = proto, 64
	f, t := from.As16(), to.As16()
	copy(p[8:], f[:])
	copy(p[24:], t[:])
}

// isICMPError reports whether p, an ICMP or ICMPv6 packet, is an error message.
func isICMPError(p *packet) bool {
	m := p.payload()
	if len(m) < icmpHeader {
		return false
	}
	if !p.v4 {
		return m[0] < 128 // RFC 4443 section 2.1
	}
	switch m[0] {
	case icmpUnreachable, 4, 5, 11, 12: // RFC 792
		return true
	}
	return false
}

// simplifyUnreachable makes "no route" of every ICMPv6 unreachable message
// about the path: gVisor ignores the others, and a dial would wait for its
// timeout. noteUnreachable has kept what it said.
func simplifyUnreachable(m []byte) {
	if len(m) < icmpHeader || m[0] != icmpv6Unreachable || m[1] == icmpv6Port || m[1] == icmpv6Net {
		return
	}
	// The code is the lower half of a word, so the checksum grows by what the
	// word loses (RFC 1624, without its special case for zero, since a sum
	// over addresses is never zero).
	old := uint64(m[1])
	m[1] = icmpv6Net
	check := uint64(^binary.BigEndian.Uint16(m[2:]))
	binary.BigEndian.PutUint16(m[2:], ^fold(check+(0xffff-old)))
}

// flow is a TCP connection seen from here.
type flow struct{ local, remote netip.AddrPort }

// note says why a connection attempt failed.
type note struct {
	flow flow
	why  syscall.Errno
}

// unreachableNotes remembers the last unreachable messages about TCP. gVisor
// reports "prohibited" as an unreachable host, and knows only one kind of
// ICMPv6 message; DialTCP looks here for the exact reason. When many dials
// fail at once, the oldest notes are overwritten, and such a dial reports what
// gVisor told it.
type unreachableNotes struct {
	mu   sync.Mutex
	ring [256]note
	at   int
}

func (u *unreachableNotes) add(n note) {
	u.mu.Lock()
	u.ring[u.at%len(u.ring)] = n
	u.at++
	u.mu.Unlock()
}

// take removes and returns the note about f, or 0.
func (u *unreachableNotes) take(f flow) syscall.Errno {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range u.ring {
		if u.ring[i].flow == f {
			why := u.ring[i].why
			u.ring[i] = note{}
			return why
		}
	}
	return 0
}

// noteUnreachable keeps what p, an ICMP error message, says about a TCP
// connection of this stack, and acts if it is about the path. It must run before gVisor sees the message.
func (s *Stack) noteUnreachable(p *packet) {
	m := p.payload()
	var why syscall.Errno
	var path bool // RFC 6069 section 3
	switch {
	case p.v4 && m[0] == icmpUnreachable:
		why, path = errnoOfICMP(m[1]), m[1] == icmpNet || m[1] == icmpHost
	case !p.v4 && m[0] == icmpv6Unreachable:
		why, path = errnoOfICMPv6(m[1]), m[1] == icmpv6Net || m[1] == icmpv6Address
	}
	if why == 0 && !path {
		return
	}
	// The quote is cut off, so its length field says nothing.
	q := packet{b: m[icmpHeader:], v4: p.v4, l4: header.IPv6MinimumSize}
	if q.v4 && len(q.b) >= header.IPv4MinimumSize {
		q.l4, q.proto = int(q.b[0]&15)*4, q.b[9]
	} else if !q.v4 && len(q.b) >= header.IPv6MinimumSize {
		q.proto = q.b[6]
	}
	if q.proto != protoTCP || q.l4 < header.IPv4MinimumSize || len(q.b) < q.l4+4 {
		return
	}
	ports := q.payload()
	if path && len(ports) >= 8 {
		s.unreachableFor(&q)
	}
	if why == 0 {
		return
	}
	s.notes.add(note{flow{
		local:  netip.AddrPortFrom(q.source(), binary.BigEndian.Uint16(ports)),
		remote: netip.AddrPortFrom(q.destination(), binary.BigEndian.Uint16(ports[2:])),
	}, why})
}

// errnoOfICMP is 0 for codes of which gVisor makes the right error itself.
func errnoOfICMP(code byte) syscall.Errno {
	switch code {
	case icmpNetAdmin, icmpHostAdmin, icmpProhibited:
		return syscall.EACCES
	}
	return 0
}

func errnoOfICMPv6(code byte) syscall.Errno {
	switch code {
	case icmpv6Prohibited, icmpv6Policy, icmpv6Reject: // RFC 4443 section 3.1
		return syscall.EACCES
	case icmpv6Address:
		return syscall.EHOSTUNREACH
	}
	return 0
}
