package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// Defaults of Config.
const (
	// DefaultMTU leaves room for the outer headers and for PPPoE below 1500.
	DefaultMTU               = 1400
	DefaultMaxFlows          = 65536
	DefaultMaxFlowsPerClient = 16384
)

// Clients is who may use the cluster.
type Clients interface {
	// Lookup finds a client by its key.
	Lookup(session.PublicKey) (number uint32, name string, ok bool)
	// Enrolled says whether a client has this number.
	Enrolled(number uint32) bool
	// AnyPort says whether the client may send from ports outside its blocks:
	// it isn't one of ours, so the tun egress keeps a mapping for each.
	AnyPort(number uint32) bool
	// Highest returns the highest number that is enrolled.
	Highest() uint32
}

// Egress is the way out: it takes inner packets of clients that are for the
// world or for the servers' own addresses, and gives those that come back to
// the output it was made with.
type Egress interface {
	// Input takes authentic packets whose source was checked. They are valid
	// until it returns. It is called from several goroutines.
	Input(pkts [][]byte)
	// Run owns the egress's goroutines and returns after all have ended.
	Run(ctx context.Context) error
	// Drain refuses new flows from now on; those that are open go on.
	Drain()
}

// Config is what a server needs. Conns, Cluster and Clients are required.
type Config struct {
	Conns     []udp.Conn // outer sockets; Run closes them
	Cluster   *session.Cluster
	Clients   Clients
	Number    uint16        // this server's, unique in the cluster, from 1; 0: 1
	KeepAlive time.Duration // longest interval granted; 0: session.DefaultKeepAlive
	MTU       int           // largest inner packet, bytes; 0: DefaultMTU

	// Registry is how servers tell each other where clients are. Run runs it. Nil:
	// this server is alone.
	Registry registry.Registry

	// Device lets packets out under the public addresses and ports that Plan
	// gives to clients. It leaves wire.DataHeaderLen bytes before and
	// wire.TagLen bytes after the packets that it reads. Run closes it. Without a
	// device the egress is that of the host's sockets.
	Device Device
	Plan   portblock.Plan

	// Egress makes the way out, which hands packets for clients to output, each
	// with wire.DataHeaderLen bytes of room before and wire.TagLen after it. Nil:
	// that of Device, or the host's sockets, with the settings that follow.
	Egress            func(output func(bufs [][]byte)) (Egress, error)
	DNS               []netip.AddrPort // upstream resolvers; none: the host's
	AllowLocal        bool             // clients may reach this host's loopback and link-local addresses
	MaxFlows          int              // TCP connections, UDP sockets and pings in all; 0: DefaultMaxFlows
	MaxFlowsPerClient int              // and of one client; 0: DefaultMaxFlowsPerClient

	// Rotated is called when an epoch's secret was erased: the key file should
	// be written anew from Cluster.Marshal. It may be nil.
	Rotated func()
	Logger  *slog.Logger // nil discards
}

// Server is one server of a cluster. Its methods are safe for concurrent use.
type Server struct {
	cfg         Config
	log         *slog.Logger
	inner       session.Inner
	verifier    *session.Verifier
	table       *table
	initiations chan *initiation
	egress      Egress
	leases      portblock.Leases
	// portRequests are those that portLoop has to answer.
	portRequests chan portRequest
	counters     counters
	rejecter     rejecter
	prober       *prober

	lateMu sync.Mutex // guards late
	late   []*peer    // of whom something is still to be told

	// What silentSince has noticed.
	cluster  bool      // there are other servers, or were
	peers    int       // how many
	complete time.Time // when as many were heard
	deaf     time.Time // when not all of them could be
}

// New checks the configuration and makes a server that does nothing until Run.
func New(cfg Config) (*Server, error) {
	if len(cfg.Conns) == 0 || cfg.Cluster == nil || cfg.Clients == nil {
		return nil, errors.New("server: Conns, Cluster and Clients are required")
	}
	if cfg.Number == 0 {
		cfg.Number = 1
	}
	if cfg.KeepAlive == 0 {
		cfg.KeepAlive = session.DefaultKeepAlive
	}
	if cfg.KeepAlive < session.MinKeepAlive || cfg.KeepAlive > session.MaxKeepAlive {
		return nil, fmt.Errorf("server: keep-alive interval must lie between %v and %v", session.MinKeepAlive, session.MaxKeepAlive)
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.MTU < wire.MinMTU || cfg.MTU > 65535-wire.Overhead-48 {
		return nil, fmt.Errorf("server: inner MTU must be at least %d", wire.MinMTU)
	}
	if cfg.MaxFlows == 0 {
		cfg.MaxFlows = DefaultMaxFlows
	}
	if cfg.MaxFlowsPerClient == 0 {
		cfg.MaxFlowsPerClient = DefaultMaxFlowsPerClient
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Registry == nil {
		cfg.Registry = registry.NewMemory()
	}
	if cfg.Device != nil && cfg.Plan.Clients() == 0 {
		return nil, errors.New("server: a device needs a plan of egress addresses")
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger,
		inner:    session.NewInner(cfg.Cluster.Public()),
		verifier: cfg.Cluster.Verifier(), table: newTable(),
		initiations:  make(chan *initiation, handshakeQueue),
		portRequests: make(chan portRequest, portQueue),
	}
	var err error
	if s.prober, err = newProber(); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	open := cfg.Egress
	switch {
	case open != nil:
	case cfg.Device != nil:
		open = s.openTun
	default:
		open = s.openSockets
	}
	if s.egress, err = open(s.output); err != nil {
		return nil, fmt.Errorf("server: egress: %w", err)
	}
	return s, nil
}

func (s *Server) openSockets(output func([][]byte)) (Egress, error) {
	return s.newSockets(output, false)
}

// openTun makes the egress by the device, with the sockets egress for the
// servers' own services.
func (s *Server) openTun(output func([][]byte)) (Egress, error) {
	services, err := s.newSockets(output, true)
	if err != nil {
		return nil, err
	}
	return newTunEgress(tunConfig{
		Device: s.cfg.Device, Plan: &s.cfg.Plan, Leases: &s.leases, Inner: s.inner, AnyPort: s.cfg.Clients.AnyPort,
		MTU: s.cfg.MTU, Services: services, Policy: newEgressPolicy(s.gateway(), s.cfg.AllowLocal), Output: output,
		Reject: func(client uint32, p []byte, kind packet.ErrorKind) {
			if w := s.pathTo(client); w != nil {
				s.reject(w, p, kind, time.Now())
			}
		},
		Publish: s.cfg.Registry.PublishMapping, Service: s.serviceAddresses(),
	}), nil
}

// serviceAddresses are the egress addresses and ports at which an outer socket
// listens.
func (s *Server) serviceAddresses() (list []netip.AddrPort) {
	for _, c := range s.cfg.Conns {
		at := c.LocalAddr()
		if !at.Addr().IsUnspecified() {
			list = append(list, at)
			continue
		}
		own, err := net.InterfaceAddrs()
		if err != nil {
			s.log.Warn("can't tell this host's addresses", "error", err)
		}
		for _, a := range own {
			if p, err := netip.ParsePrefix(a.String()); err == nil && s.cfg.Plan.Contains(p.Addr()) {
				list = append(list, netip.AddrPortFrom(p.Addr(), at.Port()))
			}
		}
	}
	return list
}

func (s *Server) gateway() []netip.Addr {
	return []netip.Addr{s.inner.IPv4(session.Gateway), s.inner.IPv6(session.Gateway)}
}

// public says whether clients have public ports.
func (s *Server) public() bool { return s.cfg.Device != nil }

func (s *Server) newSockets(output func([][]byte), servicesOnly bool) (*sockets, error) {
	return newSockets(socketsConfig{
		ServicesOnly: servicesOnly,
		MTU:          s.cfg.MTU, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen,
		Gateway: s.gateway(),
		Output:  output, ClientOf: s.inner.Client,
		DNS: s.cfg.DNS, AllowLocal: s.cfg.AllowLocal,
		MaxFlows: s.cfg.MaxFlows, MaxFlowsPerClient: s.cfg.MaxFlowsPerClient,
		Logger: s.cfg.Logger,
	})
}

// Run serves until ctx ends, then closes the outer sockets and returns nil; or
// an error when a socket fails.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, c := range s.cfg.Conns {
		wg.Go(func() {
			if err := s.receiveLoop(c); err != nil {
				cancel(fmt.Errorf("outer socket %v: %w", c.LocalAddr(), err))
			}
		})
	}
	wg.Go(func() {
		if err := s.cfg.Registry.Run(ctx, (*news)(s)); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("registry: %w", err))
		}
	})
	wg.Go(func() { s.gossipLoop(ctx) })
	wg.Go(func() { s.portLoop(ctx) })
	wg.Go(func() { s.handshakeLoop(ctx) })
	wg.Go(func() { s.sweepLoop(ctx) })
	wg.Go(func() {
		if err := s.egress.Run(ctx); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("egress: %w", err))
		}
	})
	<-ctx.Done()
	for _, c := range s.cfg.Conns {
		_ = c.Close() // what is still unsent is packet loss
	}
	wg.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	return nil
}

// sweepLoop moves the epochs on and forgets silent sessions.
func (s *Server) sweepLoop(ctx context.Context) {
	t := time.NewTicker(10 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.sweep(now)
		}
	}
}

func (s *Server) sweep(now time.Time) {
	before := s.cfg.Cluster.Epoch()
	erased := s.cfg.Cluster.Advance(now)
	if e := s.cfg.Cluster.Epoch(); e != before {
		s.log.Info("new epoch", "epoch", e)
	}
	if erased && s.cfg.Rotated != nil {
		s.cfg.Rotated()
	}
	idle := now.Add(-max(sessionIdle, 3*s.cfg.KeepAlive)).UnixNano()
	for _, a := range s.table.sweep(func(a *association) bool {
		// Replays must not keep the replay window of a session alive that has
		// been replaced: what comes of it later is too old by the new one's word.
		was := a.old
		a.old = a.superseded()
		return a.heard.Load() < idle || was && a.old || !s.cfg.Cluster.Valid(a.Epoch)
	}) {
		a.forgetPath()
	}
	// A client that nobody hears any more is gone: its peers' packets would only
	// wake somebody else's NAT.
	since, ok := s.silentSince(now)
	for p := range s.table.all {
		if ok && p.silence(since.UnixNano()) {
			s.log.Info("client is silent", "client", p.number)
		}
		if p.path.Load() != nil && !s.cfg.Clients.Enrolled(p.number) {
			p.path.Store(nil) // made by a packet that was faster than Reload
		}
	}
}

// Reload ends the sessions of clients that are no longer enrolled, and tells
// them so. To be called after the list of clients has changed.
func (s *Server) Reload() {
	for _, a := range s.table.sweep(func(a *association) bool { return !s.cfg.Clients.Enrolled(a.Client) }) {
		if w := a.peer.path.Load(); w != nil && w.association == a {
			s.sendControl(w, wire.AppendClose(nil, wire.CloseUnknown))
		}
		s.log.Info("client is no longer enrolled", "client", a.Client)
	}
	// Clients that only other servers hear, too.
	for p := range s.table.all {
		if s.cfg.Clients.Enrolled(p.number) {
			continue
		}
		p.mu.Lock()
		p.forgetLocked()
		p.mu.Unlock()
		switch e := s.egress.(type) {
		case *sockets:
			e.CloseClient(p.number)
		case *tunEgress:
			e.closeClient(p.number)
		}
	}
}

// Drain makes the server refuse new connections while open ones go on.
func (s *Server) Drain() { s.egress.Drain() }

// Egress returns the counters of egress by the host's sockets, which serve the
// gateway addresses of every server; all are zero with Config.Egress.
func (s *Server) Egress() EgressStats {
	switch e := s.egress.(type) {
	case *sockets:
		return e.Stats()
	case *tunEgress:
		return e.Services.Stats()
	}
	return EgressStats{}
}

// Tun returns the counters of egress by a device, and false if there is none.
func (s *Server) Tun() (TunStats, bool) {
	if e, ok := s.egress.(*tunEgress); ok {
		return e.stats(), true
	}
	return TunStats{}, false
}
