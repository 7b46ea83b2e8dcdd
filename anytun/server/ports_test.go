package server

import (
	"context"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/wire"
)

// arbiter is a registry whose answers to claims a test makes.
type arbiter struct {
	registry.Registry
	claim func(registry.Claim) (registry.Claim, error)
	ready error
}

func (a *arbiter) Claim(_ context.Context, c registry.Claim) (registry.Claim, error) {
	return a.claim(c)
}
func (a *arbiter) Ready() error { return a.ready }

func newArbiter(t *testing.T) (*serverRig, *arbiter) {
	t.Helper()
	a := &arbiter{Registry: registry.NewMemory()}
	a.claim = func(c registry.Claim) (registry.Claim, error) { return c, nil }
	r := newServerRig(t, withDevice(t), func(c *Config) { c.Registry = a })
	t.Cleanup(func() { r.egress.(*tunEgress).Services.stack.Close() })
	return r, a
}

// One client gets some, not all that there are.
func TestPortsPerClient(t *testing.T) {
	r, _ := newArbiter(t)
	for i := range maxLeased + 5 {
		m := r.leasePorts(t.Context(), 2, 255, time.Now())
		want, status := i+1, wire.PortsOK
		if i >= maxLeased {
			want, status = maxLeased, wire.PortsNoneFree
		}
		if len(m.Blocks) != want || m.Status != status {
			t.Fatalf("request %d: %d blocks, %v", i+1, len(m.Blocks), m.Status)
		}
	}
	if m := r.leasePorts(t.Context(), 3, 1, time.Now()); len(m.Blocks) != 1 {
		t.Errorf("another client got %d blocks", len(m.Blocks))
	}
	if m := r.leasePorts(t.Context(), 2, 0, time.Now()); len(m.Blocks) != maxLeased || m.Status != wire.PortsOK {
		t.Errorf("renewed %d, %v", len(m.Blocks), m.Status)
	}
}

// What the registry says of blocks that others have is remembered, so that the next
// request tries others.
func TestPortsTaken(t *testing.T) {
	r, a := newArbiter(t)
	tried := make(map[uint32]int)
	free := r.cfg.Plan.Clients() - 3*portTries
	a.claim = func(c registry.Claim) (registry.Claim, error) {
		tried[c.Index]++
		if c.Index > free {
			return registry.Claim{Kind: c.Kind, Index: c.Index, Owner: 7, Until: c.Until}, registry.ErrTaken
		}
		return c, nil
	}
	var m wire.Ports
	requests := 0
	for ; len(m.Blocks) == 0 && requests < 10; requests++ {
		m = r.leasePorts(t.Context(), 2, 1, time.Now())
	}
	if requests != 4 || len(m.Blocks) != 1 {
		t.Errorf("%d blocks after %d requests", len(m.Blocks), requests)
	}
	for block, n := range tried {
		if n != 1 {
			t.Errorf("block %d was tried %d times", block, n)
		}
	}
	// A block that another server has given away meanwhile.
	block := r.leases.Blocks(2)[0]
	a.claim = func(c registry.Claim) (registry.Claim, error) {
		c.Owner = 8
		return c, registry.ErrTaken
	}
	if m := r.leasePorts(t.Context(), 2, 0, time.Now()); len(m.Blocks) != 0 || m.Status != wire.PortsUnavailable {
		t.Errorf("still has %v, %v", m.Blocks, m.Status)
	}
	if client, _ := r.leases.Client(block); client != 8 {
		t.Errorf("the block is client %d's", client)
	}
}

// A lease isn't renewed once the block's own client is enrolled, and doesn't end
// while nobody could renew it.
func TestPortsEnd(t *testing.T) {
	r, a := newArbiter(t)
	now := time.Now()
	if m := r.leasePorts(t.Context(), 2, 1, now); len(m.Blocks) != 1 || m.Lifetime != 3600 {
		t.Fatalf("leased %+v", m)
	}
	block := r.leases.Blocks(2)[0]
	a.ready = registry.ErrUnavailable
	r.expireLeases(now.Add(2 * time.Hour))
	if len(r.leases.Blocks(2)) != 1 {
		t.Error("the lease ended while the registry was down")
	}
	a.ready = nil
	r.leasePorts(t.Context(), 2, 0, now.Add(30*time.Minute))
	r.expireLeases(now.Add(80 * time.Minute))
	if len(r.leases.Blocks(2)) != 1 {
		t.Error("the lease wasn't renewed")
	}
	r.cfg.Clients.(*Directory).Replace(append(r.list, Enrolment{Key: testKey(99), Name: "late", Number: block}))
	r.leasePorts(t.Context(), 2, 0, now.Add(85*time.Minute))
	r.expireLeases(now.Add(91 * time.Minute))
	if len(r.leases.Blocks(2)) != 0 {
		t.Error("the lease of an enrolled client's block was renewed")
	}
}

// One client's requests don't fill the queue.
func TestPortsFlood(t *testing.T) {
	r, _ := newArbiter(t)
	now := time.Now()
	g := granted(t, r.cluster, 2, now)
	for range 500 {
		r.from(g, "10.0.0.1:1", wire.AppendPortsRequest(nil, wire.PortsRequest{Blocks: 255, Token: 1}))
	}
	if n := len(r.portRequests); n == 0 || n > 20 {
		t.Errorf("%d requests wait", n)
	}
	if n := r.Stats().Drops[DropPortRate.String()]; n < 480 {
		t.Errorf("%d dropped", n)
	}
	other := granted(t, r.cluster, 3, now)
	before := len(r.portRequests)
	r.from(other, "10.0.0.3:1", wire.AppendPortsRequest(nil, wire.PortsRequest{Blocks: 1, Token: 1}))
	if len(r.portRequests) != before+1 {
		t.Error("another client's request was dropped")
	}
}

// Only claims of blocks are leases, and each ends when it is given back.
func TestPortsClaims(t *testing.T) {
	r, a := newArbiter(t)
	n := (*news)(r.Server)
	until := time.Now().Add(time.Hour)
	block := r.cfg.Plan.Clients()
	n.Claimed(registry.Claim{Kind: registry.ClaimServer, Index: block, Owner: 2, Until: until})
	if r.leases.Len() != 0 {
		t.Error("a server's number became a lease")
	}
	n.Claimed(registry.Claim{Kind: registry.ClaimBlock, Index: block, Owner: 2, Until: until})
	n.Released(registry.Claim{Kind: registry.ClaimServer, Index: block, Owner: 2})
	if len(r.leases.Blocks(2)) != 1 {
		t.Error("the lease isn't there")
	}
	n.Released(registry.Claim{Kind: registry.ClaimBlock, Index: block, Owner: 2})
	if r.leases.Len() != 0 {
		t.Error("the lease is still there")
	}
	// Without an arbiter there is no use in asking for one block after the other.
	asked := 0
	a.claim = func(registry.Claim) (registry.Claim, error) {
		asked++
		return registry.Claim{}, registry.ErrUnavailable
	}
	if m := r.leasePorts(t.Context(), 2, 1, time.Now()); m.Status != wire.PortsUnavailable || m.Lifetime != 0 || asked != 1 {
		t.Errorf("%+v after %d claims", m, asked)
	}
	alone := newServerRig(t)
	if m := alone.leasePorts(t.Context(), 2, 1, time.Now()); m.Status != wire.PortsNotSupported {
		t.Errorf("egress by sockets leases ports: %v", m.Status)
	}
}
