package netstack

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Acknowledgements that arrive together. gVisor sends what each of them makes
// room for before it looks at the next, so a batch of a dozen, as a busy path or
// several servers make it, turns one large send into a dozen small ones. Input
// keeps the highest acknowledgement of a flow until the batch is over, or
// something else of the flow comes. What would change gVisor's mind stays:
// duplicates, whatever isn't plain, and SACK blocks that the highest doesn't
// cover. While gVisor recovers, and sees blocks, it looks at every segment in
// flight for every acknowledgement, so there it matters most.
// (RFC 3449 section 5.2.1 has the same idea for links.)

// gatheredFlows is how many flows of a batch are watched at once.
const gatheredFlows = 8

// plainAck is a packet that acknowledges number, and blocks where gVisor is to see
// them, and says nothing else.
type plainAck struct {
	flow   []byte // what names it
	number uint32
	blocks []byte
	p      packet
}

// gatherer is the acknowledgements of a batch that wait for its end.
type gatherer struct {
	acks [gatheredFlows]plainAck
	n    int
}

// take decides about a TCP packet that gVisor is to see. It reports true when the
// packet waits or isn't needed, and false when it is to be delivered now; what
// waited of its flow is delivered then.
func (g *gatherer) take(d *device, p *packet) bool {
	var b plainAck
	plain := b.parse(p)
	if g.n == 0 && !plain {
		return false
	}
	if b.flow == nil {
		g.flush(d)
		return false
	}
	i := 0
	for i < g.n && !bytes.Equal(g.acks[i].flow, b.flow) {
		i++
	}
	switch a := &g.acks[i%gatheredFlows]; {
	case i == g.n && !plain:
		return false
	case i == gatheredFlows:
		g.flush(d)
		i = 0
		g.n++
	case i == g.n:
		g.n++
	case !plain:
		d.deliver(&a.p, nil, len(a.p.b))
		g.n--
		*a = g.acks[g.n]
		return false
	case b.supersedes(a):
		d.counters.superseded.Add(1)
	case a.supersedes(&b) && a.number != b.number:
		d.counters.superseded.Add(1)
		return true
	default:
		d.deliver(&a.p, nil, len(a.p.b))
	}
	g.acks[i] = b
	return true
}

// supersedes reports whether b tells nothing that a doesn't. Of duplicates each
// counts, unless they tell of blocks.
func (a *plainAck) supersedes(b *plainAck) bool {
	if before(a.number, b.number) || a.number == b.number && (len(a.blocks) == 0 || len(b.blocks) == 0) {
		return false
	}
	for x := b.blocks; len(x) >= 8; x = x[8:] {
		said := blockOf(x)
		if before(said.start, a.number) {
			said.start = a.number
		}
		known := !before(a.number, said.end)
		for y := a.blocks; len(y) >= 8 && !known; y = y[8:] {
			known = blockOf(y).has(said)
		}
		if !known {
			return false
		}
	}
	return true
}

// flush delivers what waits.
func (g *gatherer) flush(d *device) {
	for i := range g.n {
		d.deliver(&g.acks[i].p, nil, len(g.acks[i].p.b))
	}
	g.n = 0
}

// parse reads p. It leaves flow nil if IP options are in the way, and reports false
// if p is more than an acknowledgement.
func (a *plainAck) parse(p *packet) bool {
	l4, addrs := header.IPv4MinimumSize, 12
	if !p.v4 {
		l4, addrs = header.IPv6MinimumSize, 8
	}
	if p.l4 != l4 || len(p.b) < l4+header.TCPMinimumSize {
		return false
	}
	a.flow = p.b[addrs : l4+4]
	tcp := p.b[l4:]
	hl := int(tcp[12]>>4) * 4
	if tcp[13]&^flagPSH != flagACK || hl < header.TCPMinimumSize || hl != len(tcp) {
		return false
	}
	a.p, a.number = *p, binary.BigEndian.Uint32(tcp[8:])
	if !p.strip {
		a.blocks = sackBlocks(tcp[header.TCPMinimumSize:])
	}
	return true
}
