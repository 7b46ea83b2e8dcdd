package registry

import "sync/atomic"

// Drop is why something wasn't published or delivered.
type Drop uint8

// The reasons. The first group is about what this server publishes, the second
// about what it received.
const (
	DropLocations Drop = iota // too many clients' Locations wait
	DropSeen                  // too many clients' Seen wait
	DropMappings              // too many Mappings wait
	DropSend                  // the engine refused the message

	DropInbox     // the handler was behind; what it missed is fetched afterwards
	DropForged    // doesn't authenticate: not of this cluster, or damaged
	DropStale     // recorded and played again, or a clock that is minutes off
	DropMalformed // authentic, but not understood

	NumDrops = iota
)

var dropNames = [NumDrops]string{
	"locations_full", "seen_full", "mappings_full", "send",
	"inbox_full", "forged", "stale", "malformed",
}

// String is the reason's name as a metrics label.
func (d Drop) String() string {
	if int(d) < len(dropNames) {
		return dropNames[d]
	}
	return "unknown"
}

// Traffic counts one type of message in one direction.
type Traffic struct {
	Messages uint64 // as the engine carries them
	Records  uint64 // in them: Locations, Seen, ...
	Bytes    uint64 // of the messages with all that we add, without the engine's own framing
}

// Stats is a snapshot of a registry's counters. What is sent counts once, to
// however many servers the engine carries it.
type Stats struct {
	In, Out    [NumTypes]Traffic // by Type
	Drops      [NumDrops]uint64  // by Drop
	Reconnects uint64            // to the engine, after the first time
	Snapshots  uint64            // fetched from another server
	Peers      int               // other servers heard lately
	Pending    int               // records that wait to be published
}

// Counters are Stats in the making; the zero value is ready.
type Counters struct {
	in, out    [NumTypes]traffic
	drops      [NumDrops]atomic.Uint64
	reconnects atomic.Uint64
	snapshots  atomic.Uint64
}

type traffic struct{ messages, records, bytes atomic.Uint64 }

func (t *traffic) add(records, bytes int) {
	t.messages.Add(1)
	t.records.Add(uint64(records))
	t.bytes.Add(uint64(bytes))
}

func (t *traffic) load() Traffic {
	return Traffic{Messages: t.messages.Load(), Records: t.records.Load(), Bytes: t.bytes.Load()}
}

// Received counts a message that was delivered.
func (c *Counters) Received(t Type, records, bytes int) { c.in[t].add(records, bytes) }

// Sent counts a message that the engine took.
func (c *Counters) Sent(t Type, records, bytes int) { c.out[t].add(records, bytes) }

// Drop counts n lost records, or messages where nobody knows what was in them.
func (c *Counters) Drop(why Drop, n int) { c.drops[why].Add(uint64(n)) }

// Reconnected counts a connection to the engine that came back.
func (c *Counters) Reconnected() { c.reconnects.Add(1) }

// Snapshot counts a snapshot that came in whole.
func (c *Counters) Snapshot() { c.snapshots.Add(1) }

// Stats returns the totals, Peers and Pending zero.
func (c *Counters) Stats() Stats {
	s := Stats{Reconnects: c.reconnects.Load(), Snapshots: c.snapshots.Load()}
	for i := range s.In {
		s.In[i], s.Out[i] = c.in[i].load(), c.out[i].load()
	}
	for i := range s.Drops {
		s.Drops[i] = c.drops[i].Load()
	}
	return s
}
