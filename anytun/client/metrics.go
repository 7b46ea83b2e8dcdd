package client

import (
	"sync/atomic"
	"time"
)

// Drop is why a packet was dropped.
type Drop int

// Reasons to drop a packet at the client.
const (
	DropNoSession      Drop = iota // to send, before the first session
	DropSend                       // the outer socket refused it
	DropMalformed                  // not an anytun message
	DropUnknownSession             // of no session of ours
	DropForged                     // doesn't authenticate
	DropReplay                     // seen before, or too old
	DropHandshake                  // answers no attempt of ours, or doesn't authenticate
	DropControlQueue               // controlLoop was behind
	DropUnknownControl             // control message of a later version
	dropCount
)

var dropNames = [dropCount]string{
	"no_session", "send", "malformed", "unknown_session", "forged", "replay",
	"handshake", "control_queue", "unknown_control",
}

func (d Drop) String() string { return dropNames[d] }

type counters struct {
	sentPackets, sentBytes         atomic.Uint64
	receivedPackets, receivedBytes atomic.Uint64
	initiations, deadPaths         atomic.Uint64
	keepAlives, probes             atomic.Uint64
	portRequests, portRefusals     atomic.Uint64
	drops                          [dropCount]atomic.Uint64
}

// Stats are totals since the client was made. Bytes are those of inner packets.
type Stats struct {
	SentPackets, SentBytes         uint64
	ReceivedPackets, ReceivedBytes uint64
	Initiations, DeadPaths         uint64
	Handshakes, ServerChanges      uint64
	KeepAlives, Probes             uint64            // sent; a probe is a keep-alive that asks about a silence
	Gaps                           uint64            // times in which nothing got through
	GapTime                        time.Duration     // all of them together
	PortRequests, PortRefusals     uint64            // for further port blocks; answers that gave none
	Drops                          map[string]uint64 // by reason
}

// Stats returns the totals.
func (c *Client) Stats() Stats {
	s := Stats{
		SentPackets: c.counters.sentPackets.Load(), SentBytes: c.counters.sentBytes.Load(),
		ReceivedPackets: c.counters.receivedPackets.Load(), ReceivedBytes: c.counters.receivedBytes.Load(),
		Initiations: c.counters.initiations.Load(), DeadPaths: c.counters.deadPaths.Load(),
		Handshakes: c.handshakes.Load(), ServerChanges: c.changes.Load(),
		KeepAlives: c.counters.keepAlives.Load(), Probes: c.counters.probes.Load(),
		PortRequests: c.counters.portRequests.Load(), PortRefusals: c.counters.portRefusals.Load(),
		Drops: make(map[string]uint64, dropCount),
	}
	if g := c.gaps.Load(); g != nil {
		s.Gaps, s.GapTime = g.count, g.total
	}
	for i := range c.counters.drops {
		s.Drops[Drop(i).String()] = c.counters.drops[i].Load()
	}
	return s
}
