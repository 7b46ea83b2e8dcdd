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
// something else of the flow comes. What would change gVisor's mind stays: those
// with SACK blocks that it is to see, duplicates, and whatever isn't plain.
// (RFC 3449 section 5.2.1 has the same idea for links.)

// gatheredFlows is how many flows of a batch are watched at once.
const gatheredFlows = 8

// gatherer is the acknowledgements of a batch that wait for its end.
type gatherer struct {
	acks [gatheredFlows]struct {
		flow   []byte
		number uint32
		p      packet
	}
	n int
}

// take decides about a TCP packet that gVisor is to see. It reports true when the
// packet waits or isn't needed, and false when it is to be delivered now; what
// waited of its flow is delivered then.
func (g *gatherer) take(d *device, p *packet) bool {
	flow, number, plain := plainAck(p)
	if g.n == 0 && !plain {
		return false
	}
	if flow == nil {
		g.flush(d)
		return false
	}
	i := 0
	for i < g.n && !bytes.Equal(g.acks[i].flow, flow) {
		i++
	}
	if i == g.n {
		if !plain {
			return false
		}
		if g.n == len(g.acks) {
			g.flush(d)
			i = 0
		}
		g.n++
	} else {
		a := &g.acks[i]
		switch {
		case !plain:
			last := &g.acks[g.n-1]
			d.deliver(&a.p, nil, len(a.p.b))
			*a = *last
			g.n--
			return false
		case before(number, a.number):
			d.counters.superseded.Add(1)
			return true
		case number == a.number:
			d.deliver(&a.p, nil, len(a.p.b))
		default:
			d.counters.superseded.Add(1)
		}
	}
	a := &g.acks[i]
	a.flow, a.number, a.p = flow, number, *p
	return true
}

// flush delivers what waits.
func (g *gatherer) flush(d *device) {
	for i := range g.n {
		d.deliver(&g.acks[i].p, nil, len(g.acks[i].p.b))
	}
	g.n = 0
}

// plainAck returns what names the flow of a TCP packet, nil if IP options are in
// the way. plain: it acknowledges number and says nothing else that gVisor is to
// hear.
func plainAck(p *packet) (flow []byte, number uint32, plain bool) {
	l4, addrs := header.IPv4MinimumSize, 12
	if !p.v4 {
		l4, addrs = header.IPv6MinimumSize, 8
	}
	if p.l4 != l4 || len(p.b) < l4+header.TCPMinimumSize {
		return nil, 0, false
	}
	flow = p.b[addrs : l4+4]
	tcp := p.b[l4:]
	hl := int(tcp[12]>>4) * 4
	if tcp[13]&^flagPSH != flagACK || hl < header.TCPMinimumSize || hl != len(tcp) {
		return flow, 0, false
	}
	plain = p.strip || len(sackBlocks(tcp[header.TCPMinimumSize:])) == 0
	return flow, binary.BigEndian.Uint32(tcp[8:]), plain
}
