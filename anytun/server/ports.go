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
func (s *Server) requestPorts(w *path, m wire.PortsRequest) {
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
			s.leases.Expire(now)
		case r := <-s.portRequests:
			timed, cancel := context.WithTimeout(ctx, portTimeout)
			answer := s.leasePorts(timed, r.path.Client, int(r.Blocks), time.Now())
			cancel()
			answer.Token = r.Token
			s.sendControl(r.path, wire.AppendPorts(nil, answer))
		}
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
		if err := s.claimBlock(ctx, block, client, until); err != nil {
			m.Status = wire.PortsUnavailable
			s.log.Debug("can't renew a port block", "client", client, "block", block, "error", err)
		}
	}
	if len(have) < want {
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
	if err != nil {
		return err
	}
	s.leases.Set(block, client, c.Until)
	return nil
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
