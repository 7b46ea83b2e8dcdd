package server

import (
	"net/netip"
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
	old   bool         // sweep's: the client had a newer session at the last sweep already

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

// place is what the whole cluster may know of where a client is. Unlike a path
// it is not bound to this process.
type place struct {
	key   sessionKey
	to    netip.AddrPort // the client's outer endpoint
	local netip.AddrPort // the service address that it sends to
}

// peer is one client.
type peer struct {
	number uint32
	told   atomic.Int64         // UnixNano of the last word of another server that it was heard
	heard  atomic.Int64         // and of its last authentic packet here
	asked  atomic.Int64         // and of its last request for ports that was taken
	path   atomic.Pointer[path] // nil while none is known, or none has been needed

	mu        sync.Mutex
	top       uint64         // highest counter of any of its sessions, wherever it was heard
	placed    uint64         // that of the message which showed at, or said goodbye: it orders what is told of at
	initiated uint64         // timestamp of its last initiation
	at        place          // the zero value while the client isn't there
	by        uint16         // number of the server that heard it there
	words     session.Bucket // what this server may tell the others of it
	late      bool           // something is still to be told
}

// table is the cache of sessions and what was learned of clients. Sessions
// enter it only with an authentic packet; clients only when enrolled, or when
// another server tells of them, and they stay: their timestamps guard against
// replays. Every packet looks here, so whoever goes through all of it, which
// takes a tenth of a second with a million clients, holds up nobody.
type table struct {
	shards [sessionShards]sessionShard
	// Client numbers are dense, from 1, so they lead to their client without a
	// lock, by the upper bits and the lower.
	pages [(session.MaxClient + 1) / peersPerPage]atomic.Pointer[peerPage]
}

// peersPerPage makes the memory for a single client 4 KiB.
const peersPerPage = 512

type peerPage [peersPerPage]atomic.Pointer[peer]

const sessionShards = 64

// sessionShard is a part of the sessions. Their ids are as good as random.
type sessionShard struct {
	mu       sync.RWMutex
	sessions map[sessionKey]*association
}

func newTable() *table {
	t := new(table)
	for i := range t.shards {
		t.shards[i].sessions = map[sessionKey]*association{}
	}
	return t
}

func (t *table) shard(k sessionKey) *sessionShard { return &t.shards[k.id%sessionShards] }

func (t *table) size() (sessions, online int) {
	for i := range t.shards {
		h := &t.shards[i]
		h.mu.RLock()
		sessions += len(h.sessions)
		h.mu.RUnlock()
	}
	for p := range t.all {
		if p.there() {
			online++
		}
	}
	return sessions, online
}

func (t *table) session(k sessionKey) *association {
	h := t.shard(k)
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.sessions[k]
}

// lookup returns the entry of a client, or nil. client may be any number.
func (t *table) lookup(client uint32) *peer {
	if client > session.MaxClient {
		return nil
	}
	g := t.pages[client/peersPerPage].Load()
	if g == nil {
		return nil
	}
	return g[client%peersPerPage].Load()
}

// peer returns the entry of a client, made if need be.
func (t *table) peer(client uint32) *peer {
	if p := t.lookup(client); p != nil {
		return p
	}
	page := &t.pages[client/peersPerPage]
	if page.Load() == nil {
		page.CompareAndSwap(nil, new(peerPage))
	}
	at := &page.Load()[client%peersPerPage]
	at.CompareAndSwap(nil, &peer{number: client})
	return at.Load()
}

// add enters a session that an authentic packet has proved. Another reader may
// have been faster: then that one's entry counts, which has its replay window.
func (t *table) add(a *association) *association {
	h := t.shard(a.key)
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.sessions[a.key]; old != nil {
		return old
	}
	h.sessions[a.key] = a
	return a
}

// all goes through the clients, in the order of their numbers. No lock is held.
func (t *table) all(yield func(*peer) bool) {
	for i := range t.pages {
		g := t.pages[i].Load()
		if g == nil {
			continue
		}
		for k := range g {
			if p := g[k].Load(); p != nil && !yield(p) {
				return
			}
		}
	}
}

// sweep forgets sessions that drop says so of, and returns them. A part of them
// is locked at a time.
func (t *table) sweep(drop func(*association) bool) (gone []*association) {
	for i := range t.shards {
		h := &t.shards[i]
		h.mu.Lock()
		for k, a := range h.sessions {
			if drop(a) {
				delete(h.sessions, k)
				gone = append(gone, a)
			}
		}
		h.mu.Unlock()
	}
	return gone
}

// leave forgets where the client is, if that is still through this session: its
// goodbye has the given counter.
func (a *association) leave(counter uint64, self uint16) bool {
	p := a.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at.key != a.key || counter < p.placed {
		return false
	}
	p.top, p.placed, p.by = max(p.top, counter), counter, self
	p.forgetLocked()
	return true
}

// forgetLocked forgets where the client is.
func (p *peer) forgetLocked() {
	p.at = place{}
	p.path.Store(nil)
}

// superseded says whether the client is known to have a newer session.
func (a *association) superseded() bool {
	p := a.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at != (place{}) && p.at.key != a.key
}

// forgetPath makes the next packet to the client look for its session again.
func (a *association) forgetPath() {
	if w := a.peer.path.Load(); w != nil && w.association == a {
		a.peer.path.CompareAndSwap(w, nil)
	}
}

// there says whether it is known where the client is.
func (p *peer) there() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at != (place{})
}

// silence forgets where the client is if neither this server nor, by their word,
// another one has heard it since then (UnixNano).
func (p *peer) silence(since int64) bool {
	if p.heard.Load() >= since || p.told.Load() >= since {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at == (place{}) {
		return false
	}
	p.forgetLocked()
	return true
}

// move is what moved has found.
type move struct {
	changed bool // the path is another one
	roamed  bool // and leads to another endpoint
	news    bool // which the other servers don't know
}

// moved notes that a packet with this counter came from an endpoint to the server
// of the number self. Only a
// packet newer than all before moves the client, so a late or replayed one
// can't drag it back (PROTOCOL.md 5.5).
func (a *association) moved(counter uint64, from udp.Endpoint, conn udp.Conn, self uint16) (m move) {
	p := a.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	if counter <= p.top {
		return m
	}
	p.top, p.placed = counter, counter
	w := p.path.Load()
	if w != nil && w.association == a && w.to == from && w.conn == conn {
		return m
	}
	p.path.Store(&path{association: a, to: from, conn: conn})
	at := place{key: a.key, to: from.Addr, local: netip.AddrPortFrom(from.Local, conn.LocalAddr().Port())}
	m = move{
		changed: true,
		roamed:  p.at.to.IsValid() && (p.at.to != at.to || p.at.local != at.local),
		news:    p.at != at,
	}
	if m.news {
		p.at, p.by = at, self
	}
	return m
}

// learn takes another server's word on where the client is, with the counter of
// the packet that showed it. The client's own counter orders what servers say,
// so neither their clocks nor the order of their messages matter. What was heard
// of it since without its place doesn't count: servers tell that apart.
func (p *peer) learn(at place, counter uint64, by uint16) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if counter < p.placed || counter == p.placed && p.at != (place{}) {
		return false
	}
	p.top, p.placed = max(p.top, counter), counter
	if p.at == at {
		return false
	}
	p.at, p.by = at, by
	p.path.Store(nil) // made again when there is a packet to send
	return true
}

// raise notes that another server has heard the client up to this counter. It
// returns the session that the client has now.
func (p *peer) raise(counter uint64) sessionKey {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.top = max(p.top, counter)
	return p.at.key
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
	if a = s.derive(k, now); a == nil {
		return nil, false, DropEpoch
	}
	return a, false, 0
}

// derive computes a session. What the cluster has heard of its client already is
// too old to be heard again: counters rise from one session to the next, so
// that holds for all of an older one.
func (s *Server) derive(k sessionKey, now time.Time) *association {
	sess, err := s.cfg.Cluster.Session(wire.DataHeader{SessionID: k.id, Epoch: k.epoch}, s.cfg.Number, now)
	if err != nil {
		return nil
	}
	if p := s.table.lookup(sess.Client); p != nil {
		sess.Raise(p.watermark(now))
	}
	return &association{key: k, Session: sess}
}

// watermark is a counter a replay window behind which everything of the client is
// too old. Of one that wasn't heard lately nothing can be on its way any more, so
// that is all that was heard of it.
func (p *peer) watermark(now time.Time) uint64 {
	quiet := max(p.heard.Load(), p.told.Load()) < now.Add(-2*seenInterval).UnixNano()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !quiet {
		return p.top
	}
	return max(p.top, p.top+session.WindowLen) // the latter may overflow
}

// enter puts a session into the table: after its first authentic packet, or
// when another server has told of it and there is a packet for its client.
func (s *Server) enter(a *association, now time.Time) *association {
	a.peer = s.table.peer(a.Client)
	a.heard.Store(now.UnixNano()) // or sweep would take it for long silent
	s.counters.derived.Add(1)
	return s.table.add(a)
}

// pathTo returns the way to a client, or nil if it isn't there.
func (s *Server) pathTo(client uint32) *path {
	p := s.table.lookup(client)
	if p == nil {
		return nil
	}
	if w := p.path.Load(); w != nil {
		return w
	}
	return s.resolve(p, time.Now())
}

// resolve makes a path of what other servers have told: it derives the session
// that the client has now. A million clients may be known by hearsay, and a
// session is a hundred times as large as that, so it is done on demand.
func (s *Server) resolve(p *peer, now time.Time) *path {
	p.mu.Lock()
	at := p.at
	p.mu.Unlock()
	if at == (place{}) || !s.cfg.Clients.Enrolled(p.number) {
		return nil
	}
	conn := s.connAt(at.local)
	if conn == nil {
		return nil
	}
	a := s.table.session(at.key)
	if a == nil {
		if a = s.derive(at.key, now); a == nil || a.Client != p.number {
			return nil
		}
		a = s.enter(a, now)
	}
	w := &path{association: a, to: udp.Endpoint{Addr: at.to, Local: at.local.Addr()}, conn: conn}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at != at {
		return p.path.Load() // it has moved meanwhile; nil costs this packet
	}
	p.path.Store(w)
	return w
}

// connAt returns the socket that listens at a service address.
func (s *Server) connAt(local netip.AddrPort) udp.Conn {
	for _, c := range s.cfg.Conns {
		at := c.LocalAddr()
		if at.Port() == local.Port() && (at.Addr().IsUnspecified() || at.Addr() == local.Addr() || !local.Addr().IsValid()) {
			return c
		}
	}
	return nil
}
