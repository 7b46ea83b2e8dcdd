package nats

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
)

// maxPeers bounds the table; ids are random, so only a cluster that large, or
// one whose servers restart all the time, gets there.
const maxPeers = 4096

// peers knows the other servers by what they say.
type peers struct {
	mu   sync.Mutex
	byID map[uint64]*peer
}

type peer struct {
	number  uint64    // of its last message
	heard   time.Time // when that was
	started time.Time // as far as we know
}

type verdict int

const (
	peerKnown verdict = iota
	peerNew           // not heard before, or not lately
	peerGap           // something is missing before this message
	peerReplay
	peerTooMany
)

func (p *peers) heard(id, number uint64, m *registry.Message, now time.Time) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	q, known := p.byID[id]
	v := peerKnown
	switch {
	case !known && len(p.byID) >= maxPeers:
		return peerTooMany
	case !known:
		q = &peer{started: now}
		p.byID[id] = q
		v = peerNew
	case number <= q.number:
		return peerReplay
	case number > q.number+1:
		v = peerGap
	}
	q.number, q.heard = number, now
	if m.Type == registry.TypeHello {
		q.started = now.Add(-time.Duration(m.Hello.Age) * time.Second)
	}
	return v
}

// expire forgets whom nobody heard since.
func (p *peers) expire(since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, q := range p.byID {
		if q.heard.Before(since) {
			delete(p.byID, id)
		}
	}
}

func (p *peers) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.byID)
}

func (p *peers) has(id uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byID[id] != nil
}

// settled is how long a server runs before it surely knows what others do.
const settled = 30 * time.Second

// best is whom to ask for everything: any that has run for a while, else the
// oldest. Not one of those in except, unless there is no other.
func (p *peers) best(except map[uint64]bool, now time.Time) (id uint64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var oldest time.Time
	candidates := 0
	for other, q := range p.byID {
		if except[other] && len(except) < len(p.byID) {
			continue
		}
		switch {
		case now.Sub(q.started) >= settled:
			candidates++
			if rand.IntN(candidates) == 0 {
				id = other
			}
		case candidates == 0 && (!ok || q.started.Before(oldest)):
			id, oldest = other, q.started
		}
		ok = true
	}
	return id, ok
}

// wanted is what syncLoop has to fetch.
type wanted struct {
	wake chan struct{} // 1

	mu    sync.Mutex
	all   bool            // everything, from anybody
	own   map[uint64]bool // what these servers heard themselves
	fresh int             // of them, the ones that appeared
}

func (w *wanted) everything() {
	w.mu.Lock()
	w.all = true
	w.mu.Unlock()
	poke(w.wake)
}

func (w *wanted) from(id uint64, appeared bool) {
	w.mu.Lock()
	w.own[id] = true
	if appeared {
		w.fresh++
	}
	w.mu.Unlock()
	poke(w.wake)
}

// take empties w. present is how many servers are there, the wanted ones among
// them: when those that appeared aren't a minority, it may be we who were cut
// off.
func (w *wanted) take(present int) (all bool, own map[uint64]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	all = w.all || w.fresh > 0 && 2*w.fresh >= present
	own = w.own
	w.all, w.own, w.fresh = false, make(map[uint64]bool), 0
	return all, own
}

// recentMappings are the newest of those that this server published, for a
// server that asks what it missed.
type recentMappings struct {
	mu   sync.Mutex
	ring []registry.Mapping
	next int
}

const maxRecentMappings = 4096

func (r *recentMappings) add(m registry.Mapping) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ring) < maxRecentMappings {
		r.ring = append(r.ring, m)
		return
	}
	r.ring[r.next] = m
	r.next = (r.next + 1) % maxRecentMappings
}

func (r *recentMappings) each(yield func(registry.Mapping) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.ring {
		if !yield(m) {
			return
		}
	}
}
