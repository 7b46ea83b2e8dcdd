package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

// Bounds of the DNS service. A question above a bound is dropped and counted,
// and the client's resolver asks again.
const (
	dnsInFlightPerClient = 256 // questions being asked upstream
	dnsInFlight          = 2048
	dnsConnsPerClient    = 16 // TCP connections
	dnsConns             = 512
	dnsPipeline          = 16   // questions of one connection at a time; the next waits
	dnsQueryMax          = 4096 // bytes of a question
)

const (
	dnsIdleTimeout  = 10 * time.Second // of a TCP connection (RFC 7766 section 6.2.3)
	dnsWriteTimeout = 10 * time.Second
)

// dnsConfig configures the DNS service.
type dnsConfig struct {
	Upstreams []netip.AddrPort // none: the host's
	Gateway   []netip.Addr     // where the service listens
	ClientOf  func(netip.Addr) (uint32, bool)
	Host      dnsHostFiles
	Logger    *slog.Logger
	now       func() time.Time
}

// dnsService answers the clients' DNS questions at the gateway addresses, as
// the server's host would resolve them: from the hosts file, from the cache, or
// by asking the upstream resolvers.
type dnsService struct {
	cfg        dnsConfig
	log        *slog.Logger
	now        func() time.Time
	inner6     []netip.Prefix
	cache      *dnsCache
	hosts      dnsFile[dnsHosts]
	resolvConf dnsFile[[]netip.AddrPort]
	system     *net.Resolver // where no upstream is known
	preferred  atomic.Uint32 // index of the upstream that answered last
	count      dnsCounters

	mu       sync.Mutex
	closed   bool
	sockets  map[io.Closer]struct{} // listeners and connections
	inFlight dnsQuota
	conns    dnsQuota
	calls    map[dnsKey]*dnsCall
	wg       sync.WaitGroup // Add only under mu while not closed
}

// dnsQuota counts what clients hold; guarded by dnsService.mu.
type dnsQuota struct {
	perClient, all int
	by             map[uint32]int
	total          int
}

func (q *dnsQuota) take(client uint32) bool {
	if q.by[client] >= q.perClient || q.total >= q.all {
		return false
	}
	q.by[client]++
	q.total++
	return true
}

func (q *dnsQuota) give(client uint32) {
	q.total--
	if q.by[client]--; q.by[client] == 0 {
		delete(q.by, client)
	}
}

// dnsCall is a question being asked upstream, for everybody who asks the same.
type dnsCall struct {
	done chan struct{}
	a    *dnsAnswer
	err  error
}

type dnsCounters struct {
	queries, ignored, local, hits, misses, shared                 atomic.Uint64
	formErr, notImp, refused, badVers, servFail, truncated, full  atomic.Uint64
	conns, connsFull                                              atomic.Uint64
	upstreamQueries, upstreamFailed, upstreamInvalid, upstreamTCP atomic.Uint64
	writeFailed                                                   atomic.Uint64
}

// DNSStats counts what the DNS service has done.
type DNSStats struct {
	CacheEntries, CacheBytes int // gauges
	InFlight                 int // gauge: questions being asked upstream

	Queries     uint64 // messages read
	DropIgnored uint64 // responses, runts and strangers: not answered
	DropFull    uint64 // above the bounds of questions in flight
	DropWrite   uint64 // answers that could not be sent
	Local       uint64 // answered from the hosts file or by rule
	CacheHits   uint64
	CacheMisses uint64
	Shared      uint64 // misses that joined another's question
	FormErr     uint64 // answered so: junk
	NotImp      uint64 // answered so: opcodes and types not served
	Refused     uint64 // answered so: zone transfers, other classes
	BadVers     uint64 // answered so: EDNS versions to come
	ServFail    uint64 // answered so: no upstream helped
	Truncated   uint64 // answered with TC over UDP

	Conns     uint64 // TCP connections accepted
	ConnsFull uint64 // TCP connections refused because of the bounds

	UpstreamQueries uint64
	UpstreamFailed  uint64 // attempts without an answer
	UpstreamInvalid uint64 // answers to something else, or forged, or broken
	UpstreamTCP     uint64 // answers that had to be fetched over TCP
}

func (s *dnsService) stats() DNSStats {
	c := &s.count
	st := DNSStats{
		Queries: c.queries.Load(), DropIgnored: c.ignored.Load(), DropFull: c.full.Load(),
		DropWrite: c.writeFailed.Load(), Local: c.local.Load(), CacheHits: c.hits.Load(),
		CacheMisses: c.misses.Load(), Shared: c.shared.Load(), FormErr: c.formErr.Load(),
		NotImp: c.notImp.Load(), Refused: c.refused.Load(), BadVers: c.badVers.Load(),
		ServFail: c.servFail.Load(), Truncated: c.truncated.Load(),
		Conns: c.conns.Load(), ConnsFull: c.connsFull.Load(),
		UpstreamQueries: c.upstreamQueries.Load(), UpstreamFailed: c.upstreamFailed.Load(),
		UpstreamInvalid: c.upstreamInvalid.Load(), UpstreamTCP: c.upstreamTCP.Load(),
	}
	st.CacheEntries, st.CacheBytes = s.cache.size()
	s.mu.Lock()
	st.InFlight = s.inFlight.total
	s.mu.Unlock()
	return st
}

func newDNSService(c dnsConfig) (*dnsService, error) {
	for _, up := range c.Upstreams {
		if !up.IsValid() || up.Port() == 0 || up.Addr().IsUnspecified() || up.Addr().IsMulticast() {
			return nil, fmt.Errorf("dns: %s can't be an upstream resolver", up)
		}
	}
	c.Host.fill()
	s := &dnsService{
		cfg:      c,
		log:      c.Logger,
		now:      c.now,
		system:   net.DefaultResolver,
		cache:    newDNSCache(dnsCacheEntries, dnsCacheBytes),
		sockets:  make(map[io.Closer]struct{}),
		inFlight: dnsQuota{perClient: dnsInFlightPerClient, all: dnsInFlight, by: make(map[uint32]int)},
		conns:    dnsQuota{perClient: dnsConnsPerClient, all: dnsConns, by: make(map[uint32]int)},
		calls:    make(map[dnsKey]*dnsCall),
	}
	s.inner6 = newEgressPolicy(c.Gateway, false).inner6
	s.hosts.path, s.hosts.parse = c.Host.Hosts, parseHosts
	s.resolvConf.path, s.resolvConf.parse = c.Host.ResolvConf, parseResolvConf
	return s, nil
}

// start listens at the gateway addresses.
func (s *dnsService) start(ctx context.Context, st *netstack.Stack) error {
	for _, g := range s.cfg.Gateway {
		at := netip.AddrPortFrom(g, dnsPort)
		pc, err := st.ListenUDP(at)
		if err != nil {
			return fmt.Errorf("dns: %w", err)
		}
		if s.join(pc) {
			go s.udpLoop(ctx, pc)
		}
		ln, err := st.ListenTCP(at)
		if err != nil {
			return fmt.Errorf("dns: %w", err)
		}
		if s.join(ln) {
			go s.acceptLoop(ctx, ln)
		}
	}
	if ups := s.upstreams(); len(ups) == 0 {
		s.log.Warn("no upstream DNS resolver is known; asking the system instead", "file", s.cfg.Host.ResolvConf)
	} else {
		s.log.Info("dns service started", "upstreams", fmt.Sprint(ups))
	}
	return nil
}

// stop closes what the service listens to and all connections.
func (s *dnsService) stop() {
	s.mu.Lock()
	s.closed = true
	var all []io.Closer
	for c := range s.sockets {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}

// wait returns when the service's goroutines have ended.
func (s *dnsService) wait() { s.wg.Wait() }

// join registers c, which stop closes, and a goroutine that serves it and calls
// leave in the end. It closes c and returns false when the service has stopped.
func (s *dnsService) join(c io.Closer) bool {
	s.mu.Lock()
	ok := !s.closed
	if ok {
		s.sockets[c] = struct{}{}
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if !ok {
		c.Close()
	}
	return ok
}

func (s *dnsService) leave(c io.Closer) {
	c.Close()
	s.mu.Lock()
	delete(s.sockets, c)
	s.mu.Unlock()
	s.wg.Done()
}

// enter takes a client's unit of questions in flight, with a goroutine for it;
// exit gives both back.
func (s *dnsService) enter(client uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.inFlight.take(client) {
		return false
	}
	s.wg.Add(1)
	return true
}

func (s *dnsService) exit(client uint32) {
	s.mu.Lock()
	s.inFlight.give(client)
	s.mu.Unlock()
	s.wg.Done()
}

// begin reads a message. It returns an answer that is to be sent at once, or
// nil and whether q is to be resolved.
func (s *dnsService) begin(msg []byte, limit func(*dnsQuery) int) (q *dnsQuery, now []byte, resolve bool) {
	s.count.queries.Add(1)
	query, rcode, ok := dnsParseQuery(msg)
	if !ok {
		s.count.ignored.Add(1)
		return nil, nil, false
	}
	q = &query
	switch rcode {
	case dnsRcodeOK:
	case dnsRcodeFormErr:
		s.count.formErr.Add(1)
	case dnsRcodeNotImp:
		s.count.notImp.Add(1)
	case dnsRcodeRefused:
		s.count.refused.Add(1)
	case dnsRcodeBadVers:
		s.count.badVers.Add(1)
	}
	if rcode != dnsRcodeOK {
		return q, appendError(nil, q, rcode, dnsFlagRA), false
	}
	if a := s.local(q); a != nil {
		s.count.local.Add(1)
		return q, s.render(q, a, limit(q)), false
	}
	if a := s.cache.get(q.key, s.now()); a != nil {
		s.count.hits.Add(1)
		return q, s.render(q, a, limit(q)), false
	}
	s.count.misses.Add(1)
	return q, nil, true
}

// render makes the message for q.
func (s *dnsService) render(q *dnsQuery, a *dnsAnswer, limit int) []byte {
	b := appendAnswer(make([]byte, 0, len(a.msg)+dnsOPTLen), q, a, s.now(), limit)
	if b[2]&(dnsFlagTC>>8) != 0 {
		s.count.truncated.Add(1)
	}
	return b
}

// resolve asks upstream and returns the message for q.
func (s *dnsService) resolve(ctx context.Context, q *dnsQuery, limit int) []byte {
	a, err := s.shared(ctx, q)
	if err != nil {
		s.count.servFail.Add(1)
		return appendError(nil, q, dnsRcodeServFail, dnsFlagRA)
	}
	return s.render(q, a, limit)
}

// shared asks upstream, or waits for somebody who is asking the same.
func (s *dnsService) shared(ctx context.Context, q *dnsQuery) (*dnsAnswer, error) {
	s.mu.Lock()
	if call := s.calls[q.key]; call != nil {
		s.mu.Unlock()
		s.count.shared.Add(1)
		select {
		case <-call.done:
			return call.a, call.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	// Somebody may have had the answer since begin looked.
	if a := s.cache.get(q.key, s.now()); a != nil {
		s.mu.Unlock()
		s.count.shared.Add(1)
		return a, nil
	}
	call := &dnsCall{done: make(chan struct{})}
	s.calls[q.key] = call
	s.mu.Unlock()

	call.a, call.err = s.ask(ctx, q)
	if call.err == nil {
		s.cache.put(q.key, call.a)
	}
	s.mu.Lock()
	delete(s.calls, q.key)
	s.mu.Unlock()
	close(call.done)
	return call.a, call.err
}

// udpLoop serves datagrams until pc is closed.
func (s *dnsService) udpLoop(ctx context.Context, pc *netstack.PacketConn) {
	defer s.leave(pc)
	buf := make([]byte, dnsQueryMax+1)
	limit := func(q *dnsQuery) int { return q.size }
	for {
		n, from, err := pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		client, ok := s.cfg.ClientOf(from.Addr())
		if !ok || n > dnsQueryMax {
			s.count.queries.Add(1)
			s.count.ignored.Add(1)
			continue
		}
		q, msg, more := s.begin(buf[:n], limit)
		switch {
		case msg != nil:
			s.writeUDP(pc, from, msg)
		case more && s.enter(client):
			go s.answerUDP(ctx, pc, from, client, q)
		case more:
			s.count.full.Add(1)
		}
	}
}

// answerUDP resolves one question and sends the answer.
func (s *dnsService) answerUDP(ctx context.Context, pc *netstack.PacketConn, to netip.AddrPort, client uint32, q *dnsQuery) {
	defer s.exit(client)
	s.writeUDP(pc, to, s.resolve(ctx, q, q.size))
}

func (s *dnsService) writeUDP(pc *netstack.PacketConn, to netip.AddrPort, msg []byte) {
	if _, err := pc.WriteToUDPAddrPort(msg, to); err != nil {
		s.count.writeFailed.Add(1)
	}
}

// acceptLoop accepts connections until ln is closed.
func (s *dnsService) acceptLoop(ctx context.Context, ln *netstack.Listener) {
	defer s.leave(ln)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		client, ok := s.clientOf(c)
		if !ok || !s.takeConn(client) {
			s.count.connsFull.Add(1)
			c.Close()
			continue
		}
		s.count.conns.Add(1)
		if !s.join(c) {
			s.giveConn(client)
			return
		}
		go s.connLoop(ctx, c, client)
	}
}

func (s *dnsService) clientOf(c net.Conn) (uint32, bool) {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return 0, false
	}
	return s.cfg.ClientOf(a.AddrPort().Addr().Unmap())
}

func (s *dnsService) takeConn(client uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns.take(client)
}

func (s *dnsService) giveConn(client uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns.give(client)
}

// dnsConn is a TCP connection whose answers several goroutines write.
type dnsConn struct {
	net.Conn
	write sync.Mutex
}

// send writes one message behind its length (RFC 1035 section 4.2.2), in one
// piece (RFC 7766 section 8).
func (c *dnsConn) send(msg []byte) error {
	b := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg)))
	b = append(b, msg...)
	c.write.Lock()
	defer c.write.Unlock()
	if err := c.SetWriteDeadline(time.Now().Add(dnsWriteTimeout)); err != nil {
		return err
	}
	_, err := c.Write(b)
	return err
}

// connLoop serves one TCP connection. Questions are answered as soon as their
// answers are known, not in their order (RFC 7766 section 6.2.1.1).
func (s *dnsService) connLoop(ctx context.Context, nc net.Conn, client uint32) {
	defer s.leave(nc)
	defer s.giveConn(client)
	c := &dnsConn{Conn: nc}
	slots := make(chan struct{}, dnsPipeline)
	defer func() {
		// The last answers still go out to a client that has sent all it had.
		for range dnsPipeline {
			slots <- struct{}{}
		}
	}()
	limit := func(*dnsQuery) int { return 65535 }
	var length [2]byte
	for {
		if err := c.SetReadDeadline(time.Now().Add(dnsIdleTimeout)); err != nil {
			return
		}
		if _, err := io.ReadFull(c, length[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint16(length[:])
		if n > dnsQueryMax {
			return
		}
		msg := make([]byte, n)
		if _, err := io.ReadFull(c, msg); err != nil {
			return
		}
		q, now, more := s.begin(msg, limit)
		switch {
		case now != nil:
			if err := c.send(now); err != nil {
				s.count.writeFailed.Add(1)
				return
			}
		case !more:
			return // what is no question is no conversation either
		case !s.enter(client):
			s.count.full.Add(1)
			return
		default:
			slots <- struct{}{}
			go s.answerTCP(ctx, c, client, q, slots)
		}
	}
}

// answerTCP resolves one question of a connection and sends the answer.
func (s *dnsService) answerTCP(ctx context.Context, c *dnsConn, client uint32, q *dnsQuery, slots <-chan struct{}) {
	defer s.exit(client)
	defer func() { <-slots }()
	if err := c.send(s.resolve(ctx, q, 65535)); err != nil {
		s.count.writeFailed.Add(1)
	}
}
