package server

import "sync/atomic"

// Drop is why a packet was dropped.
type Drop int

// Reasons to drop a packet at the server.
const (
	DropMalformed      Drop = iota // not an anytun message
	DropEpoch                      // of an epoch whose secret is gone, or not yet made
	DropUnknownClient              // of a client number that isn't enrolled
	DropForged                     // doesn't authenticate
	DropReplay                     // seen before, or too old
	DropMAC                        // initiation of a stranger
	DropHandshake                  // initiation that doesn't authenticate
	DropHandshakeOld               // initiation seen before: its timestamp isn't newer
	DropHandshakeQueue             // more initiations than can be handled
	DropHandshakeRate              // one address sends too many of them
	DropUnknownKey                 // initiation of a key that isn't enrolled
	DropUnknownControl             // control message of a later version
	DropMalformedInner             // the packet inside isn't IP, or cut
	DropSpoofed                    // its source isn't the client's address
	DropLoop                       // a client's packet to itself
	DropNoRoute                    // inner address that nobody has
	DropOffline                    // to a client that isn't there now
	DropSend                       // the outer socket refused it
	DropNoBlock                    // initiation of a client whose number has no port block
	DropPortQueue                  // request for ports while too many wait
	DropPortRate                   // request for ports too soon after the last one
	dropCount
)

var dropNames = [dropCount]string{
	"malformed", "epoch", "unknown_client", "forged", "replay", "mac",
	"handshake", "handshake_old", "handshake_queue", "handshake_rate",
	"unknown_key", "unknown_control", "malformed_inner", "spoofed", "loop",
	"no_route", "offline", "send", "no_block", "port_queue", "port_rate",
}

func (d Drop) String() string { return dropNames[d] }

type counters struct {
	receivedPackets, receivedBytes atomic.Uint64
	sentPackets, sentBytes         atomic.Uint64
	handshakes, cookies            atomic.Uint64
	derived, roamed, rejected      atomic.Uint64
	learned                        atomic.Uint64
	drops                          [dropCount]atomic.Uint64
}

// Stats are totals since the server was made; bytes are those of inner packets.
// Sessions and Clients are what is there now.
type Stats struct {
	ReceivedPackets, ReceivedBytes uint64
	SentPackets, SentBytes         uint64
	Handshakes                     uint64 // answered
	Cookies                        uint64 // asked for instead, under load
	Derived                        uint64 // sessions derived from a packet
	Roamed                         uint64 // changes of a client's outer endpoint
	Learned                        uint64 // of them, or of sessions, that another server told
	Rejected                       uint64 // ICMP errors sent to clients
	Sessions, Clients              int
	Drops                          map[string]uint64 // by reason
}

// Stats returns the totals.
func (s *Server) Stats() Stats {
	c := &s.counters
	st := Stats{
		ReceivedPackets: c.receivedPackets.Load(), ReceivedBytes: c.receivedBytes.Load(),
		SentPackets: c.sentPackets.Load(), SentBytes: c.sentBytes.Load(),
		Handshakes: c.handshakes.Load(), Cookies: c.cookies.Load(),
		Derived: c.derived.Load(), Roamed: c.roamed.Load(), Learned: c.learned.Load(), Rejected: c.rejected.Load(),
		Drops: make(map[string]uint64, dropCount),
	}
	st.Sessions, st.Clients = s.table.size()
	for i := range c.drops {
		st.Drops[Drop(i).String()] = c.drops[i].Load()
	}
	return st
}
