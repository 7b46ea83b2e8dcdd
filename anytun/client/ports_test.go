package client

import (
	"slices"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// landlord answers requests for ports as servers do.
type landlord struct {
	status wire.PortsStatus
	blocks []wire.PortBlock
	most   int
	silent bool
}

func (s *landlord) take(m wire.PortsRequest) (wire.Ports, bool) {
	if s.silent {
		return wire.Ports{}, false
	}
	a := wire.Ports{Status: s.status, Token: m.Token, Lifetime: 3600}
	if s.status == wire.PortsOK && len(s.blocks) < int(m.Blocks) {
		if len(s.blocks) == s.most {
			a.Status = wire.PortsNoneFree
		} else {
			first := uint16(10_000 + 1000*len(s.blocks))
			s.blocks = append(s.blocks, wire.PortBlock{First: first, Last: first + 999})
		}
	}
	a.Blocks = slices.Clone(s.blocks)
	return a, true
}

// tenant drives leases with a clock, jumping from deadline to deadline.
type tenant struct {
	t        *testing.T
	l        leases
	server   landlord
	now      time.Time
	requests []time.Duration
	lost     []time.Duration
}

func newTenant(t *testing.T) *tenant { return &tenant{t: t, now: epoch, server: landlord{most: 3}} }

func (c *tenant) at() time.Duration { return c.now.Sub(epoch) }

func (c *tenant) run(d time.Duration) {
	c.t.Helper()
	end := c.now.Add(d)
	for steps := 0; ; steps++ {
		if steps > 100_000 {
			c.t.Fatal("leases spin")
		}
		m, send, lost, again := c.l.next(c.now)
		if lost {
			c.lost = append(c.lost, c.at())
		}
		if send {
			if n := len(c.requests); n > 0 && c.at()-c.requests[n-1] < portsEvery {
				c.t.Fatalf("requests at %v and %v", c.requests[n-1], c.at())
			}
			c.requests = append(c.requests, c.at())
			if a, ok := c.server.take(m); ok {
				c.l.answer(c.now, a)
				continue
			}
		}
		if !again.IsZero() && !again.After(c.now) {
			if send || lost {
				continue
			}
			c.t.Fatalf("at %v: asked to come back at once", c.at())
		}
		if again.IsZero() || again.After(end) {
			c.now = end
			return
		}
		c.now = again
	}
}

func (c *tenant) expect(blocks, requests int) {
	c.t.Helper()
	if len(c.l.blocks) != blocks || len(c.requests) != requests {
		c.t.Fatalf("at %v: %d blocks after requests at %v; want %d after %d", c.at(), len(c.l.blocks), c.requests, blocks, requests)
	}
}

func TestLeases(t *testing.T) {
	c := newTenant(t)
	c.run(time.Hour)
	c.expect(0, 0)
	for range 10 { // one answer to many calls at a time
		c.l.want(c.now)
	}
	c.run(0)
	c.expect(1, 1)
	c.l.want(c.now) // it wasn't enough, but not more than one request a second
	c.run(999 * time.Millisecond)
	c.expect(1, 1)
	c.run(time.Millisecond)
	c.expect(2, 2)
	c.run(20*time.Minute - time.Millisecond)
	c.expect(2, 2)
	c.run(time.Millisecond) // a third of the lifetime
	c.expect(2, 3)
	c.run(10 * time.Hour)
	c.expect(2, 33)
	if len(c.lost) > 0 {
		t.Errorf("lost at %v", c.lost)
	}
}

func TestLeasesNoneFree(t *testing.T) {
	for status, closed := range map[wire.PortsStatus]time.Duration{
		wire.PortsNoneFree: portsNoneFree, wire.PortsUnavailable: portsUnavailable,
		wire.PortsNotSupported: portsNotSupported, 99: portsUnavailable,
	} {
		c := newTenant(t)
		c.server.status = status
		for c.at() < time.Hour {
			c.l.want(c.now)
			c.run(100 * time.Millisecond)
		}
		if n, want := len(c.requests), int(time.Hour/closed); n < want-1 || n > want+1 {
			t.Errorf("%v: %d requests in an hour of need, want about %d", status, n, want)
		}
	}
	// A refusal takes nothing away.
	c := newTenant(t)
	c.server.most = 1
	c.l.want(c.now)
	c.run(time.Minute)
	c.l.want(c.now)
	c.run(time.Minute)
	c.expect(1, 2)
}

func TestLeasesUnanswered(t *testing.T) {
	c := newTenant(t)
	c.server.silent = true
	c.l.want(c.now)
	c.run(time.Hour)
	c.expect(0, portsTries)
	c.server.silent = false
	c.l.want(c.now)
	c.run(time.Minute)
	c.expect(1, portsTries+1)

	// The servers are gone: renewal is tried until the lease ends.
	c.server.silent = true
	c.run(2 * time.Hour)
	if len(c.lost) != 1 || len(c.l.blocks) != 0 {
		t.Fatalf("lost at %v, %d blocks left", c.lost, len(c.l.blocks))
	}
	if n := len(c.requests); n < portsTries+60 || n > portsTries+100 {
		t.Errorf("%d requests for renewal in 40 minutes", n-portsTries-1)
	}
	n := len(c.requests)
	c.run(time.Hour)
	c.expect(0, n)
}

// While the engine of the leases is away, the client keeps what it has, and
// doesn't count it as renewed.
func TestLeasesNotRenewed(t *testing.T) {
	c := newTenant(t)
	c.l.want(c.now)
	c.run(time.Minute)
	until := c.l.until
	c.server.status = wire.PortsUnavailable
	c.run(40 * time.Minute)
	if len(c.l.blocks) != 1 || c.l.until != until {
		t.Fatalf("%d blocks until %v, were until %v", len(c.l.blocks), c.l.until, until)
	}
	c.server.status = wire.PortsOK
	c.run(10 * time.Second)
	if !c.l.until.After(until) {
		t.Error("not renewed when it could be")
	}
	// Others' blocks: a list that has changed counts.
	c.server.blocks = []wire.PortBlock{{First: 1024, Last: 2047}}
	c.run(30 * time.Minute)
	if !slices.Equal(c.l.blocks, c.server.blocks) {
		t.Errorf("blocks %v, want %v", c.l.blocks, c.server.blocks)
	}
}

func TestLeasesForeignAnswer(t *testing.T) {
	c := newTenant(t)
	blocks := []wire.PortBlock{{First: 1024, Last: 2047}}
	if c.l.answer(c.now, wire.Ports{Lifetime: 60, Blocks: blocks}) {
		t.Error("took an answer that nobody asked for")
	}
	c.server.silent = true
	c.l.want(c.now)
	c.run(time.Millisecond)
	if c.l.answer(c.now, wire.Ports{Token: 99, Lifetime: 60, Blocks: blocks}) {
		t.Error("took an answer to another request")
	}
	// The first request's answer, after it was sent a second time.
	c.run(2 * time.Second)
	if !c.l.answer(c.now, wire.Ports{Token: c.l.token, Lifetime: 60, Blocks: blocks}) {
		t.Error("refused a late answer")
	}
	if !c.l.reset() || c.l.reset() {
		t.Error("reset doesn't say whether there were blocks")
	}
}
