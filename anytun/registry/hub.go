package registry

import (
	"context"
	"sync"
	"time"
)

// A Hub carries messages between members of one process, for tests and
// simulations:
//
//	Publish* (any goroutine) → the other members' inboxes, due after Delay → deliverLoop, which is Run → Handler
//
// A member that is cut off (Partition) keeps what it publishes in its Outbox;
// when it is back that goes out, and both sides fetch a snapshot of the other.
// Messages aren't encoded, but counted as if they were.

// inboxSize bounds what waits for one member. When it is full the newest is
// dropped, and the member fetches a snapshot once it has caught up.
const inboxSize = 1 << 14

// Hub connects registries within a process. Safe for concurrent use.
type Hub struct {
	mu      sync.Mutex // before any member's
	delay   time.Duration
	members map[*member]struct{}
	claims  claims
}

// NewHub returns a hub without members.
func NewHub() *Hub { return &Hub{members: make(map[*member]struct{}), claims: make(claims)} }

// Join adds a server. Names are for Partition, and may repeat after Close.
func (h *Hub) Join(name string) Registry {
	m := &member{hub: h, name: name, wake: make(chan struct{}, 1), closed: onceClosed{c: make(chan struct{})}}
	m.outbox = NewOutbox(&m.counters)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.members[m] = struct{}{}
	return m
}

// Delay sets how long each message takes from now on; order is kept.
func (h *Hub) Delay(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.delay = d
}

// Partition cuts the servers of that name off from all others, or ends that.
func (h *Hub) Partition(name string, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.members {
		if m.name != name || m.cut == cut {
			continue
		}
		m.cut = cut
		if !cut {
			m.counters.Reconnected()
			m.flushLocked()
			for other := range h.members { // whoever comes back knows something, and so do the others
				other.resyncLocked()
			}
		}
	}
}

// member is one server's end. What the hub's mutex guards is marked.
type member struct {
	hub      *Hub
	name     string
	counters Counters
	outbox   *Outbox
	closed   onceClosed
	wake     chan struct{} // 1: inbox or resync changed

	handler Handler // hub.mu; nil unless Run runs
	cut     bool    // hub.mu
	resync  bool    // hub.mu: fetch a snapshot when the inbox is empty

	mu    sync.Mutex
	inbox []parcel
}

type parcel struct {
	due     time.Time
	message Message
}

func (m *member) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *member) resyncLocked() {
	m.resync = true
	m.signal()
}

// broadcastLocked puts a message, which nobody changes any more, into the inbox
// of every other member that can be reached.
func (m *member) broadcastLocked(msg Message) {
	if len(m.hub.members) == 1 {
		return // nobody to tell, so nothing was sent
	}
	due := time.Now().Add(m.hub.delay)
	bytes := 1 + msg.Records()*msg.Type.recordSize() + SealOverhead
	m.counters.Sent(msg.Type, msg.Records(), bytes)
	for other := range m.hub.members {
		if other != m && !other.cut && other.handler != nil {
			other.put(parcel{due, msg}, bytes)
		}
	}
}

// put is called with the hub's mutex held.
func (m *member) put(p parcel, bytes int) {
	m.mu.Lock()
	full := len(m.inbox) >= inboxSize
	if !full {
		m.inbox = append(m.inbox, p)
	}
	m.mu.Unlock()
	if full {
		m.counters.Drop(DropInbox, p.message.Records())
		m.resync = true
	} else {
		m.counters.Received(p.message.Type, p.message.Records(), bytes)
	}
	m.signal()
}

// flushLocked publishes what waits, if it can.
func (m *member) flushLocked() {
	if m.cut || m.isClosed() {
		return
	}
	locations, seen, mappings := m.outbox.Take(nil, nil, nil)
	if len(locations) > 0 {
		m.broadcastLocked(Message{Type: TypeLocation, Locations: locations})
	}
	if len(seen) > 0 {
		m.broadcastLocked(Message{Type: TypeSeen, Seen: seen})
	}
	if len(mappings) > 0 {
		m.broadcastLocked(Message{Type: TypeMapping, Mappings: mappings})
	}
}

func (m *member) isClosed() bool {
	select {
	case <-m.closed.c:
		return true
	default:
		return false
	}
}

func (m *member) flush() {
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	m.flushLocked()
}

func (m *member) PublishLocation(l Location) { m.outbox.Location(l); m.flush() }
func (m *member) PublishSeen(s []Seen)       { m.outbox.Seen(s); m.flush() }
func (m *member) PublishMapping(p Mapping)   { m.outbox.Mapping(p); m.flush() }

// Run is the member's deliverLoop.
func (m *member) Run(ctx context.Context, h Handler) error {
	m.hub.mu.Lock()
	m.handler = h
	m.resyncLocked()
	m.hub.mu.Unlock()
	defer func() {
		m.hub.mu.Lock()
		m.handler = nil
		m.hub.mu.Unlock()
	}()
	for ctx.Err() == nil && !m.isClosed() {
		p, wait := m.next()
		switch {
		case wait == 0:
			p.message.Deliver(h)
		case wait < 0 && m.needsSnapshot():
			m.fetch(h)
		default:
			m.sleep(ctx, wait)
		}
	}
	return ended(ctx)
}

// next takes the oldest parcel if it is due (0), or says how long until it is; -1
// means that the inbox is empty.
func (m *member) next() (parcel, time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.inbox) == 0 {
		m.inbox = nil // what the queue grew to is given back
		return parcel{}, -1
	}
	p := m.inbox[0]
	if wait := time.Until(p.due); wait > 0 {
		return parcel{}, wait
	}
	m.inbox[0] = parcel{}
	m.inbox = m.inbox[1:]
	return p, 0
}

func (m *member) sleep(ctx context.Context, wait time.Duration) {
	var due <-chan time.Time
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		due = t.C
	}
	select {
	case <-due:
	case <-m.wake:
	case <-m.closed.c:
	case <-ctx.Done():
	}
}

func (m *member) needsSnapshot() bool {
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	return m.resync && !m.cut
}

// fetch gets what the others know, and all claims. The others' handlers are
// asked without any lock, and ours is told afterwards, so that two members can
// ask each other at once.
func (m *member) fetch(h Handler) {
	m.hub.mu.Lock()
	m.resync = false
	var others []Handler
	for other := range m.hub.members {
		if other != m && !other.cut && other.handler != nil {
			others = append(others, other.handler)
		}
	}
	live := m.hub.claims.live(time.Now())
	m.hub.mu.Unlock()

	var locations []Location
	var mappings []Mapping
	for _, other := range others {
		other.Snapshot(func(l Location) bool { locations = append(locations, l); return true })
		other.Mappings(func(p Mapping) bool { mappings = append(mappings, p); return true })
	}
	(&Message{Type: TypeLocation, Locations: locations}).Deliver(h)
	(&Message{Type: TypeMapping, Mappings: mappings}).Deliver(h)
	(&Message{Type: TypeClaim, Claims: live}).Deliver(h)
	if len(others) > 0 {
		m.counters.Snapshot()
	}
}

func (m *member) Claim(ctx context.Context, c Claim) (Claim, error) {
	if err := ctx.Err(); err != nil {
		return Claim{}, err
	}
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	if err := m.readyLocked(); err != nil {
		return Claim{}, err
	}
	got, err := m.hub.claims.claim(c, time.Now())
	if err == nil {
		m.tellLocked(Message{Type: TypeClaim, Claims: []Claim{got}})
	}
	return got, err
}

func (m *member) Release(ctx context.Context, c Claim) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	if err := m.readyLocked(); err != nil {
		return err
	}
	there, err := m.hub.claims.release(c, time.Now())
	if there {
		m.tellLocked(Message{Type: TypeRelease, Claims: []Claim{c}})
	}
	return err
}

// tellLocked is broadcastLocked to this member too.
func (m *member) tellLocked(msg Message) {
	m.broadcastLocked(msg)
	if m.handler != nil {
		m.put(parcel{time.Now(), msg}, 0)
	}
}

func (m *member) readyLocked() error {
	switch {
	case m.isClosed():
		return ErrClosed
	case m.cut:
		return ErrUnavailable
	}
	return nil
}

func (m *member) Ready() error {
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	return m.readyLocked()
}

func (m *member) Stats() Stats {
	s := m.counters.Stats()
	s.Pending = m.outbox.Len()
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	for other := range m.hub.members {
		if other != m && !m.cut && !other.cut && other.handler != nil {
			s.Peers++
		}
	}
	return s
}

func (m *member) Close() error {
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	delete(m.hub.members, m)
	m.closed.close()
	return nil
}
