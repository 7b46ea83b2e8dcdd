package server

import (
	"context"
	"net/netip"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// Limits of handshakes. One costs about four X25519 operations.
const (
	// handshakeQueue bounds the initiations that wait; beyond it the newest is
	// dropped and counted: clients try again.
	handshakeQueue = 256
	// busyRate is the number of initiations a second above which a cookie is
	// asked for first; busyBurst may come at once, as after a restart.
	busyRate, busyBurst = 200, 400
	// sourceRate is what one address may send a second while the server is busy.
	sourceRate, sourceBurst = 20, 20
	// maxSources bounds the table of addresses. Only addresses that have proved
	// to receive enter it; when it is full of fresh ones, others wait.
	maxSources = 8192
)

type initiation struct {
	b    [wire.InitiationLen]byte
	from udp.Endpoint
	conn udp.Conn
}

// handshake looks at a datagram that isn't data. Strangers, who don't know the
// cluster's public key, get silence.
func (r *receiver) handshake(b []byte, from udp.Endpoint) {
	m, err := wire.ParseInitiation(b)
	if err != nil {
		if !r.prober.probe(b) {
			r.counters.drops[DropMalformed].Add(1)
		}
		return
	}
	if !r.verifier.MAC1(m) {
		r.counters.drops[DropMAC].Add(1)
		return
	}
	i := &initiation{from: from, conn: r.conn}
	copy(i.b[:], b)
	select {
	case r.initiations <- i:
	default:
		r.counters.drops[DropHandshakeQueue].Add(1)
	}
}

// gate decides whether an initiation may cost anything. It belongs to
// handshakeLoop.
type gate struct {
	all     session.Bucket
	sources map[netip.Addr]*session.Bucket
}

// busy counts an initiation and says whether there are too many.
func (g *gate) busy(now time.Time) bool { return !g.all.Take(now, busyRate, busyBurst) }

// source says whether an address that has proved itself may have another one.
func (g *gate) source(a netip.Addr, now time.Time) bool {
	b := g.sources[a]
	if b == nil {
		if len(g.sources) >= maxSources {
			for k, b := range g.sources {
				if b.Full(now, sourceRate, sourceBurst) {
					delete(g.sources, k)
				}
			}
			if len(g.sources) >= maxSources {
				return false
			}
		}
		b = &session.Bucket{}
		g.sources[a] = b
	}
	return b.Take(now, sourceRate, sourceBurst)
}

// handshakeLoop answers initiations one by one.
func (s *Server) handshakeLoop(ctx context.Context) {
	g := &gate{sources: map[netip.Addr]*session.Bucket{}}
	for {
		select {
		case <-ctx.Done():
			return
		case i := <-s.initiations:
			if b := s.answer(g, i, time.Now()); b != nil {
				if err := i.conn.WriteBatch([][]byte{b}, i.from); err != nil {
					s.counters.drops[DropSend].Add(1)
				}
			}
		}
	}
}

// answer returns the response or the cookie for an initiation, or nil.
func (s *Server) answer(g *gate, i *initiation, now time.Time) []byte {
	drop := func(why Drop) []byte {
		s.counters.drops[why].Add(1)
		return nil
	}
	m, err := wire.ParseInitiation(i.b[:])
	if err != nil {
		return drop(DropMalformed)
	}
	if g.busy(now) {
		if !s.verifier.MAC2(m, i.from.Addr, now) {
			b, err := s.verifier.AppendCookie(nil, m, i.from.Addr, now)
			if err != nil {
				return drop(DropHandshake)
			}
			s.counters.cookies.Add(1)
			return b
		}
		if !g.source(i.from.Addr.Addr(), now) {
			return drop(DropHandshakeRate)
		}
	}
	a, err := s.cfg.Cluster.Accept(m)
	if err != nil {
		return drop(DropHandshake)
	}
	number, name, ok := s.cfg.Clients.Lookup(a.Client)
	if !ok || number == session.Gateway || number > session.MaxClient {
		return drop(DropUnknownKey)
	}
	grant, ok := s.grant(number, a.Offer)
	if !ok {
		s.log.Warn("client has no port block: its number is too high for the egress addresses", "client", number, "name", name)
		return drop(DropNoBlock)
	}
	if !s.table.peer(number).fresh(a.Offer.Timestamp) {
		return drop(DropHandshakeOld)
	}
	b, err := a.Respond(grant, session.FastAES(), now)
	if err != nil {
		return drop(DropHandshake)
	}
	s.counters.handshakes.Add(1)
	s.log.Info("handshake", "client", number, "name", name, "endpoint", i.from.Addr)
	return b
}

// grant is what a client gets: all of it follows from its number and this
// server's settings. It is false for a client whose number has no port block.
func (s *Server) grant(client uint32, o wire.Offer) (g wire.Grant, ok bool) {
	keepAlive := min(max(s.cfg.KeepAlive, session.MinKeepAlive), session.MaxKeepAlive)
	if o.KeepAlive != 0 {
		keepAlive = min(keepAlive, max(time.Duration(o.KeepAlive)*time.Second, session.MinKeepAlive))
	}
	mtu := s.cfg.MTU
	if o.MTU != 0 {
		mtu = min(mtu, int(o.MTU))
	}
	g = wire.Grant{
		Client: client, Server: s.cfg.Number,
		KeepAlive: uint16(keepAlive / time.Second), MTU: uint16(mtu),
		// Egress by the host's sockets picks its own public ports, so there the
		// client may use any but the privileged ones.
		FirstPort: 1024, LastPort: 65535,
		IPv4: s.inner.IPv4(client).As4(), IPv6: s.inner.IPv6(client).As16(),
		Gateway4: s.inner.IPv4(session.Gateway).As4(), Gateway6: s.inner.IPv6(session.Gateway).As16(),
	}
	if !s.public() {
		return g, true
	}
	place, ok := s.cfg.Plan.Of(client)
	if !ok {
		return g, false
	}
	g.FirstPort, g.LastPort, g.PublicPort = place.First, place.Last, true
	if place.IPv4.IsValid() {
		g.Public4 = place.IPv4.As4()
	}
	if place.IPv6.IsValid() {
		g.Public6 = place.IPv6.As16()
	}
	return g, true
}
