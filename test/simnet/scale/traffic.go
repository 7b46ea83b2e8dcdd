package main

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
)

// Bytes between the servers, by the codec: what registry.Stats counts, which is
// everything but NATS's own framing.

// Numbers of anytun/server and anytun/registry/nats.
const (
	seenBatch    = 64   // records of one PublishSeen; each may be a message of its own
	chunkRecords = 4000 // of a snapshot's messages
	busNumber    = 8    // before each message on the bus
)

// bucket is the time over which bursts are measured.
const bucket = 10 * time.Second

type sort uint8

const (
	sortLocation sort = iota
	sortSeen
	sortHello
	sortStart // snapshots when a server starts
	sortHeal  // and after a partition
	sorts
)

var sortNames = [sorts]string{"locations", "seen", "hello", "snapshots, servers that start", "snapshots, after the partition"}

// traffic counts.
type traffic struct {
	sorts    [sorts]flowOfBytes
	buckets  map[time.Duration]uint64 // published locations, by time
	buf      []byte
	message  registry.Message
	snapshot map[int]int // bytes by records
}

type flowOfBytes struct{ messages, records, bytes, received uint64 }

func (b *traffic) init() {
	b.buckets, b.snapshot = map[time.Duration]uint64{}, map[int]int{}
	b.buf = make([]byte, 0, 64*1024)
	b.message.Locations = make([]registry.Location, 1)
}

// size is the bytes of b.message on the bus.
func (b *traffic) size() int {
	b.buf = b.message.Append(b.buf[:0])
	return len(b.buf) + busNumber + registry.SealOverhead
}

// publish counts b.message, which all other servers get.
func (b *traffic) publish(w *world, s sort, times uint64) {
	f := &b.sorts[s]
	n := uint64(b.size()) * times
	f.messages += times
	f.records += uint64(b.message.Records()) * times
	f.bytes += n
	f.received += n * uint64(max(w.up-1, 0))
}

// endpointOf is an address and port for an endpoint's number.
func endpointOf(c *client) netip.AddrPort {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], 10<<24|c.number&(1<<24-1))
	return netip.AddrPortFrom(netip.AddrFrom4(a), uint16(1024+c.endpoint%60000))
}

var service = netip.MustParseAddrPort("203.0.113.1:4444")

// location publishes where a client is, or that it has left.
func (b *traffic) location(w *world, c *client, at time.Duration, left bool) {
	l := &b.message.Locations[:1][0]
	*l = registry.Location{
		Client: c.number, Session: uint64(c.session), Counter: uint64(at), Server: c.site, Left: left,
	}
	if !left {
		l.Endpoint, l.Local = endpointOf(c), service
	}
	b.message.Type = registry.TypeLocation
	b.message.Locations = b.message.Locations[:1]
	b.publish(w, sortLocation, 1)
	b.buckets[at/bucket] += uint64(len(b.buf) + busNumber + registry.SealOverhead)
}

// seen publishes watermarks of so many clients.
func (b *traffic) seen(w *world, clients int) {
	b.message.Type = registry.TypeSeen
	for ; clients > 0; clients -= seenBatch {
		n := min(clients, seenBatch)
		for len(b.message.Seen) < n {
			b.message.Seen = append(b.message.Seen, registry.Seen{})
		}
		b.message.Seen = b.message.Seen[:n]
		b.publish(w, sortSeen, 1)
	}
}

// hellos counts those of the whole day.
func (b *traffic) hellos(w *world) {
	b.message.Type = registry.TypeHello
	mean := helloInterval - helloInterval/8
	b.publish(w, sortHello, uint64(w.Day/mean)*uint64(w.up))
}

// chunks is the number of messages of a snapshot, the last one included.
func chunks(records int) int { return (records+chunkRecords-1)/chunkRecords + 1 }

// answer is the bytes of a snapshot and of asking for it. They don't go over the
// bus, so they aren't numbered.
func (b *traffic) answer(records int) int {
	if n, ok := b.snapshot[records]; ok {
		return n
	}
	const alone = registry.SealOverhead
	n := len((&registry.Message{Type: registry.TypeAskOwn}).Append(nil)) + alone
	n += len((&registry.Message{Type: registry.TypeDone}).Append(nil)) + alone
	for left := records; left > 0; left -= chunkRecords {
		m := registry.Message{Type: registry.TypeLocation, Locations: make([]registry.Location, min(left, chunkRecords))}
		n += len(m.Append(nil)) + alone
	}
	if len(b.snapshot) > 1000 {
		clear(b.snapshot)
	}
	b.snapshot[records] = n
	return n
}

// fetch counts snapshots, each from one server to another.
func (b *traffic) fetch(s sort, records int, times uint64) {
	n := uint64(b.answer(records)) * times
	f := &b.sorts[s]
	f.messages += uint64(chunks(records)+1) * times
	f.records += uint64(records) * times
	f.bytes += n
	f.received += n
}

// own is how much a server says that is asked for what it heard itself.
func (b *traffic) own(w *world) int {
	if w.Own {
		return w.online / max(w.up, 1)
	}
	return w.online
}

// started counts what a server that starts causes: it asks one server for
// everything and each other one for its own, and all ask it for its own, which
// is what it has got from them, or nothing.
func (b *traffic) started(w *world) {
	others := uint64(w.up)
	b.fetch(sortStart, w.online, 1)
	b.fetch(sortStart, b.own(w), others-1)
	mine := w.online
	if w.Own {
		mine = 0
	}
	b.fetch(sortStart, mine, others)
}

// healed counts the same for all servers that find those of the other groups
// again.
func (b *traffic) healed(w *world) {
	sizes := map[int]int{} // of groups
	for i := range w.servers {
		if w.servers[i].up {
			sizes[w.servers[i].group]++
		}
	}
	for _, n := range sizes {
		appeared := w.up - n
		asks := uint64(appeared)
		if 2*appeared >= w.up {
			b.fetch(sortHeal, w.online, uint64(n))
			asks--
		}
		b.fetch(sortHeal, b.own(w), asks*uint64(n))
	}
}
