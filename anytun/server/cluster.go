package server

import (
	"context"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
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
// are how long a client that falls silent counts as there elsewhere.
const seenInterval = 2 * time.Minute

// seenBatch is the number of clients in one message, some 12 bytes each.
const seenBatch = 64

// publish tells where a client is now.
func (s *Server) publish(p *peer) {
	p.mu.Lock()
	l := p.locationLocked()
	p.mu.Unlock()
	if l.Client != 0 {
		s.cfg.Registry.PublishLocation(l)
	}
}

// locationLocked is the zero value if the client isn't there.
func (p *peer) locationLocked() registry.Location {
	if p.at == (place{}) {
		return registry.Location{}
	}
	return registry.Location{
		Client: p.number, Session: p.at.key.id, Epoch: p.at.key.epoch, Counter: p.top,
		Endpoint: p.at.to, Local: p.at.local, Server: p.by,
	}
}

// left ends what is known of a client that says goodbye.
func (s *Server) left(a *association) {
	counter, left := a.leave()
	if !left {
		return
	}
	s.log.Info("client left", "client", a.Client)
	s.cfg.Registry.PublishLocation(registry.Location{
		Client: a.Client, Session: a.key.id, Epoch: a.key.epoch, Counter: counter, Server: s.cfg.Number, Left: true,
	})
}

// gossipLoop tells whom this server hears.
func (s *Server) gossipLoop(ctx context.Context) {
	t := time.NewTicker(seenInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.gossip(now)
		}
	}
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
	s.table.each(func(p *peer) {
		if p.heard.Load() < since {
			return
		}
		p.mu.Lock()
		top := p.top
		p.mu.Unlock()
		if list = append(list, registry.Seen{Client: p.number, Counter: top}); len(list) == seenBatch {
			flush()
		}
	})
	flush()
}

// news is the Server as the registry sees it.
type news Server

func (n *news) server() *Server { return (*Server)(n) }

// Location implements registry.Handler.
func (n *news) Location(l registry.Location) {
	s := n.server()
	if !s.cfg.Clients.Enrolled(l.Client) {
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
	for _, p := range s.table.all() {
		p.mu.Lock()
		l := p.locationLocked()
		p.mu.Unlock()
		if l.Client != 0 && !yield(l) {
			return
		}
	}
}
