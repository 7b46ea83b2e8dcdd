package registry

import "sync"

// Bounds of an Outbox: with 1,024 ports a client, 65,536 clients are a thousand
// egress addresses, so only a cluster that large can lose something while it is
// cut off, and a snapshot heals that too. About 12 MB when full.
const (
	maxLocations = 1 << 16
	maxSeen      = 1 << 16
	maxMappings  = 1 << 16
)

// Outbox holds what waits to be published: of each client the newest Location
// and the highest Seen, and Mappings in order. Publishers put, never waiting for
// more than a map's insertion; one sender takes everything at once. Full means
// that what is new is dropped and counted. Safe for concurrent use.
type Outbox struct {
	counters *Counters
	wake     chan struct{} // 1: something is there

	mu        sync.Mutex
	locations map[uint32]Location
	seen      map[uint32]uint64
	mappings  []Mapping
}

// NewOutbox returns an empty Outbox that counts its drops in c.
func NewOutbox(c *Counters) *Outbox {
	return &Outbox{
		counters: c, wake: make(chan struct{}, 1),
		locations: make(map[uint32]Location), seen: make(map[uint32]uint64),
	}
}

// Wake yields once after something was put into the empty box, and maybe more.
func (o *Outbox) Wake() <-chan struct{} { return o.wake }

func (o *Outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// Location puts l, unless a newer one of its client waits already.
func (o *Outbox) Location(l Location) {
	o.mu.Lock()
	old, waits := o.locations[l.Client]
	full := !waits && len(o.locations) >= maxLocations
	if !full && (!waits || l.Newer(old)) {
		o.locations[l.Client] = l
	}
	o.mu.Unlock()
	if full {
		o.counters.Drop(DropLocations, 1)
		return
	}
	o.signal()
}

// Seen puts what is higher than what waits.
func (o *Outbox) Seen(seen []Seen) {
	dropped := 0
	o.mu.Lock()
	for _, s := range seen {
		old, waits := o.seen[s.Client]
		switch {
		case !waits && len(o.seen) >= maxSeen:
			dropped++
		case s.Counter > old || !waits:
			o.seen[s.Client] = s.Counter
		}
	}
	o.mu.Unlock()
	if dropped > 0 {
		o.counters.Drop(DropSeen, dropped)
	}
	o.signal()
}

// Mapping puts m.
func (o *Outbox) Mapping(m Mapping) {
	o.mu.Lock()
	full := len(o.mappings) >= maxMappings
	if !full {
		o.mappings = append(o.mappings, m)
	}
	o.mu.Unlock()
	if full {
		o.counters.Drop(DropMappings, 1)
		return
	}
	o.signal()
}

// Len is the number of records that wait.
func (o *Outbox) Len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.locations) + len(o.seen) + len(o.mappings)
}

// Take empties the box into slices that are appended to; locations and seen come
// in no order.
func (o *Outbox) Take(locations []Location, seen []Seen, mappings []Mapping) ([]Location, []Seen, []Mapping) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, l := range o.locations {
		locations = append(locations, l)
	}
	for client, counter := range o.seen {
		seen = append(seen, Seen{Client: client, Counter: counter})
	}
	mappings = append(mappings, o.mappings...)
	clear(o.locations)
	clear(o.seen)
	o.mappings = o.mappings[:0]
	return locations, seen, mappings
}
