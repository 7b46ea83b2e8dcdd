package server

import (
	"sync/atomic"

	"github.com/anytun-go/anytun/anytun/nat"
	"github.com/anytun-go/anytun/anytun/packet"
)

// TunDrop is why the tun egress dropped a packet.
type TunDrop int

// tunPass is no reason: the packet goes on.
const tunPass TunDrop = -1

// Reasons of the tun egress.
const (
	TunDropMalformed TunDrop = iota // not a packet of a kind that can be sent on
	TunDropForbidden                // to where clients may not go
	TunDropProtocol                 // without ports to tell clients by
	TunDropPort                     // from a port that isn't the client's
	TunDropNobody                   // to a port, or an echo request, that is nobody's
	TunDropQuote                    // ICMP error about a packet that isn't the client's
	TunDropFragment                 // part of a datagram that didn't become whole
	TunDropNAT                      // an any-port client has no mapping left, or sends nonsense
	tunDropCount
)

var tunDropNames = [tunDropCount]string{
	"malformed", "forbidden", "protocol", "port", "nobody", "quote", "fragment", "nat",
}

func (d TunDrop) String() string { return tunDropNames[d] }

type tunCounters struct {
	packetsOut, bytesOut, packetsIn, bytesIn atomic.Uint64
	errorsOut, errorsIn, hairpinned, echoes  atomic.Uint64
	reassembled, superfluous                 atomic.Uint64
	drops                                    [tunDropCount]atomic.Uint64
}

func (c *tunCounters) drop(d TunDrop) { c.drops[d].Add(1) }

// fragment counts a fragment that didn't make its datagram whole, unless others
// are still to come.
func (c *tunCounters) fragment(why packet.Reassembly) {
	if why != packet.Waiting && why != packet.DuplicateFragment {
		c.drop(TunDropFragment)
	}
}

// TunStats are totals of the tun egress; Mappings is what there is now.
type TunStats struct {
	PacketsOut, BytesOut, PacketsIn, BytesIn uint64
	ErrorsOut, ErrorsIn                      uint64    // ICMP errors translated
	Hairpinned                               uint64    // packets between clients' public ports
	Echoes                                   uint64    // pings to egress addresses answered
	Reassembled                              uint64    // datagrams put together
	Superfluous                              uint64    // acknowledgements left out, of PacketsIn
	NAT                                      nat.Stats // mappings of any-port clients
	OutFragments, InFragments                packet.ReassemblyStats
	Drops                                    map[string]uint64
}

func (e *tunEgress) stats() TunStats {
	c := &e.count
	s := TunStats{
		PacketsOut: c.packetsOut.Load(), BytesOut: c.bytesOut.Load(),
		PacketsIn: c.packetsIn.Load(), BytesIn: c.bytesIn.Load(),
		ErrorsOut: c.errorsOut.Load(), ErrorsIn: c.errorsIn.Load(),
		Hairpinned: c.hairpinned.Load(), Echoes: c.echoes.Load(), Reassembled: c.reassembled.Load(), Superfluous: c.superfluous.Load(),
		NAT: e.nat.Stats(), OutFragments: e.outFragments.Stats(), InFragments: e.inFragments.Stats(),
		Drops: make(map[string]uint64, tunDropCount),
	}
	for i := range c.drops {
		s.Drops[TunDrop(i).String()] = c.drops[i].Load()
	}
	return s
}
