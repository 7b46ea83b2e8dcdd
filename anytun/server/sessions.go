package server

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// sessionKey names a session as its packets' headers do.
type sessionKey struct {
	id    uint64
	epoch byte
}

// association is one session that was heard from.
type association struct {
	key   sessionKey
	peer  *peer
	heard atomic.Int64 // UnixNano of the last authentic packet

	mu sync.Mutex // guards the session's Opener; its Sealer needs no lock
	*session.Session
}

// path is how to reach a client: which session, which outer endpoint, through
// which of our sockets. It is replaced as a whole, never changed.
type path struct {
	*association
	to   udp.Endpoint
	conn udp.Conn
}

// peer is one client.
type peer struct {
	number uint32
	path   atomic.Pointer[path] // nil while the client isn't there

	mu        sync.Mutex
	top       uint64 // highest counter of any of its sessions: the newest word on where it is
	initiated uint64 // timestamp of its last initiation
}

// table is the cache of sessions and what was learned of clients. Sessions
// enter it only with an authentic packet; clients only when enrolled.
type table struct {
	mu       sync.RWMutex
	sessions map[sessionKey]*association
	peers    map[uint32]*peer
}

func newTable() *table {
	return &table{sessions: map[sessionKey]*association{}, peers: map[uint32]*peer{}}
}

func (t *table) size() (sessions, online int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.peers {
		if p.path.Load() != nil {
			online++
		}
	}
	return len(t.sessions), online
}

func (t *table) session(k sessionKey) *association {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.sessions[k]
}

func (t *table) lookup(client uint32) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.peers[client]
}

// online says whether a client is there now.
func (t *table) online(client uint32) bool {
	p := t.lookup(client)
	return p != nil && p.path.Load() != nil
}

// peer returns the entry of an enrolled client, made if need be.
func (t *table) peer(client uint32) *peer {
	if p := t.lookup(client); p != nil {
		return p
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[client]
	if p == nil {
		p = &peer{number: client}
		t.peers[client] = p
	}
	return p
}

// add enters a session that an authentic packet has proved. Another reader may
// have been faster: then that one's entry counts, which has its replay window.
func (t *table) add(a *association) *association {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.sessions[a.key]; old != nil {
		return old
	}
	t.sessions[a.key] = a
	return a
}

// each calls f for every client.
func (t *table) each(f func(*peer)) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.peers {
		f(p)
	}
}

// sweep forgets sessions that drop says so of, and the paths that lead through
// them. Peers stay: their timestamps guard against replays, and there are never
// more than clients enrolled.
func (t *table) sweep(drop func(*association) bool) (gone []*association) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, a := range t.sessions {
		if !drop(a) {
			continue
		}
		delete(t.sessions, k)
		gone = append(gone, a)
	}
	return gone
}

// leave forgets where the client is, if that is still through this session.
func (a *association) leave() {
	if w := a.peer.path.Load(); w != nil && w.association == a {
		a.peer.path.CompareAndSwap(w, nil)
	}
}

// moved notes that a packet with this counter came from an endpoint. Only a
// packet newer than all before moves the client, so a late or replayed one
// can't drag it back (PROTOCOL.md 5.5). It says whether the path changed.
func (a *association) moved(counter uint64, from udp.Endpoint, conn udp.Conn) (changed, roamed bool) {
	p := a.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	if counter <= p.top {
		return false, false
	}
	p.top = counter
	w := p.path.Load()
	if w != nil && w.association == a && w.to == from && w.conn == conn {
		return false, false
	}
	p.path.Store(&path{association: a, to: from, conn: conn})
	return true, w != nil && (w.to != from || w.conn != conn)
}

// fresh notes the timestamp of an initiation and says whether it is newer than
// all before.
func (p *peer) fresh(timestamp uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if timestamp <= p.initiated {
		return false
	}
	p.initiated = timestamp
	return true
}

// sessionIdle is how long a silent session stays in the cache, at the least.
// Nothing is lost with it but the replay window: the next packet derives it
// again. So it must outlast any packet that is still on its way.
const sessionIdle = 10 * time.Minute

// sessionOf finds or derives the session of a data message. A derived one is
// not in the table yet: enter does that once a packet has authenticated.
func (s *Server) sessionOf(h wire.DataHeader, now time.Time) (a *association, known bool, why Drop) {
	k := sessionKey{h.SessionID, h.Epoch}
	if a := s.table.session(k); a != nil {
		return a, true, 0
	}
	client, err := s.cfg.Cluster.Identify(h)
	if err != nil {
		return nil, false, DropEpoch
	}
	if !s.cfg.Clients.Enrolled(client) {
		return nil, false, DropUnknownClient
	}
	sess, err := s.cfg.Cluster.Session(h, s.cfg.Number, now)
	if err != nil {
		return nil, false, DropEpoch
	}
	return &association{key: k, Session: sess}, false, 0
}

// enter puts a session into the table after its first authentic packet.
func (s *Server) enter(a *association, now time.Time) *association {
	a.peer = s.table.peer(a.Client)
	a.heard.Store(now.UnixNano()) // or sweep would take it for long silent
	s.counters.derived.Add(1)
	return s.table.add(a)
}
