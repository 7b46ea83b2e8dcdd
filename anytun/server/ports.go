package server

import (
	"context"
	"errors"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/wire"
)

// Further port blocks for clients that have used their own up: leased from the
// top of the address space, one registry entry each, which all servers follow.
// A lease is renewed by the client that uses it and else ends by itself.

const (
	// portLease is how long a lease lasts.
	portLease = time.Hour
	// portQueue bounds the requests that wait; the newest is dropped and
	// counted, and its client asks again.
	portQueue = 64
	// portPause is the least time between two requests of a client; it is to
	// wait twice as long (PROTOCOL.md 6.4).
	portPause = 500 * time.Millisecond
	// maxLeased is how many blocks one client can lease, so that it can't take
	// all there are.
	maxLeased = 16
	// portTries is how many free-looking blocks are tried: others lease at the
	// same moment.
	portTries = 8
	// portTimeout bounds the registry's time for one request.
	portTimeout = 5 * time.Second
)

// portRequest is a client's request and the way to answer it.
type portRequest struct {
	path *path
	wire.PortsRequest
}

// requestPorts hands a request to portLoop, since the registry takes its time.
func (s *Server) requestPorts(w *path, m wire.PortsRequest, now time.Time) {
	asked := w.peer.asked.Load()
	if now.UnixNano()-asked < int64(portPause) || !w.peer.asked.CompareAndSwap(asked, now.UnixNano()) {
		s.counters.drops[DropPortRate].Add(1)
		return
	}
	select {
	case s.portRequests <- portRequest{w, m}:
	default:
		s.counters.drops[DropPortQueue].Add(1)
	}
}

// portLoop answers requests for ports one by one, and forgets leases that have
// ended.
func (s *Server) portLoop(ctx context.Context) {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.expireLeases(now)
		case r := <-s.portRequests:
			timed, cancel := context.WithTimeout(ctx, portTimeout)
			answer := s.leasePorts(timed, r.path.Client, int(r.Blocks), time.Now())
			cancel()
			answer.Token = r.Token
			s.sendControl(r.path, wire.AppendPorts(nil, answer))
		}
	}
}

// expireLeases forgets leases that have ended. While the registry is down nobody
// can renew them, and nobody else can get them, so they stay.
func (s *Server) expireLeases(now time.Time) {
	if s.cfg.Registry.Ready() == nil {
		s.leases.Expire(now)
	}
}

// leasePorts renews the client's leases, and gets it one more block if it has
// fewer than it wants.
func (s *Server) leasePorts(ctx context.Context, client uint32, want int, now time.Time) (m wire.Ports) {
	if !s.public() {
		m.Status = wire.PortsNotSupported
		return m
	}
	m.Status = wire.PortsOK
	until := now.Add(portLease)
	have := s.leases.Blocks(client)
	for _, block := range have {
		// A block whose own client has been enrolled since is to be that one's.
		if s.cfg.Clients.Enrolled(block) {
			continue
		}
		if err := s.claimBlock(ctx, block, client, until); err != nil {
			m.Status = wire.PortsUnavailable
			s.log.Debug("can't renew a port block", "client", client, "block", block, "error", err)
		}
	}
	if len(have) < want && len(have) >= maxLeased {
		m.Status = wire.PortsNoneFree
	} else if len(have) < want {
		m.Status = s.leaseBlock(ctx, client, until, now)
	}
	m.Lifetime = uint32(portLease / time.Second)
	for _, block := range s.leases.Blocks(client) {
		place, ok := s.cfg.Plan.Block(block)
		if !ok || len(m.Blocks) == wire.MaxPortBlocks {
			continue
		}
		b := wire.PortBlock{First: place.First, Last: place.Last}
		if place.IPv4.IsValid() {
			b.IPv4 = place.IPv4.As4()
		}
		m.Blocks = append(m.Blocks, b)
	}
	if len(m.Blocks) == 0 {
		m.Lifetime = 0
	}
	return m
}

// leaseBlock gets a client one more block.
func (s *Server) leaseBlock(ctx context.Context, client uint32, until, now time.Time) wire.PortsStatus {
	tries := 0
	for block := range s.cfg.Plan.Candidates(client, &s.leases, s.cfg.Clients.Highest(), now) {
		err := s.claimBlock(ctx, block, client, until)
		switch {
		case err == nil:
			s.log.Info("leased a port block", "client", client, "block", block)
			return wire.PortsOK
		case !errors.Is(err, registry.ErrTaken):
			s.log.Warn("can't lease a port block", "client", client, "error", err)
			return wire.PortsUnavailable
		}
		if tries++; tries == portTries {
			return wire.PortsUnavailable
		}
	}
	s.log.Warn("no port block is free; give the servers more egress addresses", "client", client)
	return wire.PortsNoneFree
}

func (s *Server) claimBlock(ctx context.Context, block, client uint32, until time.Time) error {
	c, err := s.cfg.Registry.Claim(ctx, registry.Claim{Kind: registry.ClaimBlock, Index: block, Owner: client, Until: until})
	switch {
	case err == nil:
		s.leases.Set(block, client, c.Until)
	case errors.Is(err, registry.ErrTaken) && c.Kind == registry.ClaimBlock && c.Index == block:
		s.leases.Set(block, c.Owner, c.Until) // whose it is; the next try is another block
	}
	return err
}

// Claimed implements registry.Handler.
func (n *news) Claimed(c registry.Claim) {
	if c.Kind == registry.ClaimBlock {
		n.server().leases.Set(c.Index, c.Owner, c.Until)
	}
}

// Released implements registry.Handler.
func (n *news) Released(c registry.Claim) {
	if c.Kind == registry.ClaimBlock {
		n.server().leases.Drop(c.Index)
	}
}
