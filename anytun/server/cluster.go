package server

import (
	"context"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
)

// What servers tell each other, by the registry. None of it is about a
// connection:
//
//	out  publish        a client is somewhere else than the cluster knew
//	     left           a client has said goodbye
//	     gossipLoop     every seenInterval: who was heard, up to which counter
//	     nat, claims    mappings and leased blocks (tun.go, ports.go)
//	in   news           the registry's goroutines note all that in the table
//
// Nothing here waits for the registry, and without it a server goes on with
// what it knows.

// seenInterval is how often servers tell whom they hear. It bounds what a
// message that was caught can be replayed to (SECURITY.md), and three of them
// are how long a client that falls silent counts as there.
const seenInterval = 2 * time.Minute

// peersGone is how long servers that aren't heard any more count as cut off, and
// then as gone.
const peersGone = 2 * time.Hour

// seenBatch is the number of clients in one message, some 12 bytes each.
const seenBatch = 64

// wordRate and wordBurst bound what is told of one client, per second and at
// once, whatever it makes of its endpoints; the newest of it is told in the end.
const wordRate, wordBurst = 1, 20

// publish tells where a client is now, or that it has left.
func (s *Server) publish(p *peer, now time.Time) {
	p.mu.Lock()
	if !p.words.Take(now, wordRate, wordBurst) {
		again := p.late
		p.late = true
		p.mu.Unlock()
		if !again {
			s.lateMu.Lock()
			s.late = append(s.late, p)
			s.lateMu.Unlock()
		}
		return
	}
	l := p.locationLocked()
	p.mu.Unlock()
	s.cfg.Registry.PublishLocation(l)
}

// publishLate tells what there was too much of before.
func (s *Server) publishLate(now time.Time) {
	s.lateMu.Lock()
	list := s.late
	s.late = nil
	s.lateMu.Unlock()
	for _, p := range list {
		p.mu.Lock()
		p.late = false
		p.mu.Unlock()
		s.publish(p, now)
	}
}

// locationLocked is a goodbye if the client isn't there.
func (p *peer) locationLocked() registry.Location {
	return registry.Location{
		Client: p.number, Session: p.at.key.id, Epoch: p.at.key.epoch, Counter: p.placed,
		Endpoint: p.at.to, Local: p.at.local, Server: p.by, Left: p.at == (place{}),
	}
}

// left ends what is known of a client that says goodbye by the message with this
// counter.
func (s *Server) left(a *association, counter uint64, now time.Time) {
	// One more than that, since the message may have shown a new place as well, of
	// which the others are told, too. The client says nothing after it.
	counter++
	if !a.leave(counter, s.cfg.Number) {
		return
	}
	s.log.Info("client left", "client", a.Client)
	s.publish(a.peer, now)
}

// gossipLoop tells whom this server hears.
func (s *Server) gossipLoop(ctx context.Context) {
	t := time.NewTicker(seenInterval)
	defer t.Stop()
	late := time.NewTicker(time.Second)
	defer late.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.gossip(now)
		case now := <-late.C:
			s.publishLate(now)
		}
	}
}

// silentSince is the time since when a client must have been heard to count as
// there, and false if this server can't tell. Where it is alone that is three
// intervals of keep-alives; else a client that is silent here may be heard by
// another server, which says so every seenInterval, but not while the registry is
// down or some of the others are cut off. It belongs to sweepLoop.
func (s *Server) silentSince(now time.Time) (since time.Time, ok bool) {
	peers := s.cfg.Registry.Stats().Peers
	s.cluster = s.cluster || peers > 0
	if !s.cluster {
		return now.Add(-3 * s.cfg.KeepAlive), true
	}
	if peers >= s.peers || now.Sub(s.complete) > peersGone {
		s.peers, s.complete = peers, now
	}
	if peers < s.peers || s.cfg.Registry.Ready() != nil {
		s.deaf = now
	}
	patience := 3 * max(seenInterval, s.cfg.KeepAlive)
	return now.Add(-patience), now.Sub(s.deaf) > patience
}

func (s *Server) gossip(now time.Time) {
	since := now.Add(-seenInterval).UnixNano()
	var list []registry.Seen
	flush := func() {
		if len(list) > 0 {
			s.cfg.Registry.PublishSeen(list)
			list = list[:0]
		}
	}
	for p := range s.table.all {
		if p.heard.Load() < since {
			continue
		}
		p.mu.Lock()
		top := p.top
		p.mu.Unlock()
		if list = append(list, registry.Seen{Client: p.number, Counter: top}); len(list) == seenBatch {
			flush()
		}
	}
	flush()
}

// news is the Server as the registry sees it.
type news Server

func (n *news) server() *Server { return (*Server)(n) }

// Location implements registry.Handler.
func (n *news) Location(l registry.Location) {
	s := n.server()
	// A client that isn't enrolled here is kept in mind: the other server may
	// only have read its clients file earlier. resolve looks.
	if l.Client == session.Gateway || l.Client > session.MaxClient {
		return
	}
	p := s.table.peer(l.Client)
	at := place{key: sessionKey{l.Session, l.Epoch}, to: l.Endpoint, local: l.Local}
	if l.Left {
		at = place{}
	}
	if p.learn(at, l.Counter, l.Server) {
		s.counters.learned.Add(1)
	}
	p.told.Store(time.Now().UnixNano())
}

// Seen implements registry.Handler.
func (n *news) Seen(list []registry.Seen) {
	s, now := n.server(), time.Now().UnixNano()
	for _, v := range list {
		// Clients whose whereabouts are unknown stay unknown: the next server
		// that they move to tells.
		p := s.table.lookup(v.Client)
		if p == nil {
			continue
		}
		p.told.Store(now)
		if a := s.table.session(p.raise(v.Counter)); a != nil {
			a.mu.Lock()
			a.Raise(v.Counter)
			a.mu.Unlock()
		}
	}
}

// Snapshot implements registry.Handler.
func (n *news) Snapshot(yield func(registry.Location) bool) {
	s := n.server()
	for p := range s.table.all {
		p.mu.Lock()
		l := p.locationLocked()
		p.mu.Unlock()
		if !l.Left && !yield(l) {
			return
		}
	}
}
