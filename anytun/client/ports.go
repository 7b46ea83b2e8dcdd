package client

import (
	"net/netip"
	"slices"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

// Port blocks besides the client's own (PROTOCOL.md 6.4): asked for when the
// owner of the client says that ports are used up, renewed as long as the
// client runs, since it can't know which ports its connections still need.

const (
	portsEvery = time.Second      // requests are at least this far apart
	portsRetry = 30 * time.Second // and at most, while one isn't answered
	portsTries = 5                // requests for more; then it is given up until the next RequestPorts

	// How long the answer that there are no more is taken to hold.
	portsNoneFree     = 30 * time.Second
	portsUnavailable  = 5 * time.Second
	portsNotSupported = 10 * time.Minute
)

// leases decides when to ask for port blocks. It is told the time and the
// answers, and owns no timer.
type leases struct {
	blocks []wire.PortBlock
	until  time.Time // when the blocks are lost
	renew  time.Time // when to ask for them again
	wanted int       // how many to have in all
	closed time.Time // there are no more to get before this
	token  uint64    // of the request that waits for its answer; 0: none does
	serial uint64    // token of the last request
	tries  int       // how often it was sent
	sent   time.Time // last
	due    time.Time // when to send a request; zero: never
}

// want tells that the ports are used up.
func (l *leases) want(now time.Time) {
	if l.wanted > len(l.blocks) || now.Before(l.closed) || len(l.blocks) >= wire.MaxPortBlocks {
		return // asked for already, or in vain
	}
	l.wanted = len(l.blocks) + 1
	l.token, l.tries, l.due = 0, 0, now
}

// next says what to do at now: send a request, note that all blocks are lost,
// and when to look again, zero for not before something else happens.
func (l *leases) next(now time.Time) (m wire.PortsRequest, send, lost bool, again time.Time) {
	if len(l.blocks) > 0 && !now.Before(l.until) {
		lost = l.reset()
	}
	if l.due.IsZero() {
		return m, false, lost, l.earliest()
	}
	if !l.sent.IsZero() && l.due.Before(l.sent.Add(portsEvery)) {
		l.due = l.sent.Add(portsEvery)
	}
	if now.Before(l.due) {
		return m, false, lost, l.earliest()
	}
	if l.tries >= portsTries && l.wanted > len(l.blocks) { // nobody answers
		l.wanted, l.token, l.tries, l.due = len(l.blocks), 0, 0, time.Time{}
		if len(l.blocks) > 0 {
			l.due = later(l.renew, now.Add(portsRetry))
		}
		return m, false, lost, l.earliest()
	}
	if l.token == 0 {
		l.serial++
		l.token = l.serial
	}
	l.tries++
	l.sent = now
	l.due = now.Add(min(portsEvery<<min(l.tries-1, 10), portsRetry))
	return wire.PortsRequest{Blocks: uint8(l.wanted), Token: l.token}, true, lost, l.earliest()
}

// earliest returns when to look again: the next request, or the end of the
// leases.
func (l *leases) earliest() time.Time {
	if len(l.blocks) > 0 && (l.due.IsZero() || l.until.Before(l.due)) {
		return l.until
	}
	return l.due
}

// answer takes a server's answer and says whether the blocks are others now.
func (l *leases) answer(now time.Time, m wire.Ports) (changed bool) {
	if l.token == 0 || m.Token != l.token {
		return false
	}
	l.token, l.tries = 0, 0
	switch m.Status {
	case wire.PortsOK:
	case wire.PortsNoneFree:
		l.closed = now.Add(portsNoneFree)
	case wire.PortsNotSupported:
		l.closed = now.Add(portsNotSupported)
	default: // also what a later version may say
		l.closed = now.Add(portsUnavailable)
	}
	known := m.Status == wire.PortsOK || m.Status == wire.PortsNoneFree || m.Status == wire.PortsNotSupported
	if known || len(m.Blocks) > 0 {
		changed = !slices.Equal(l.blocks, m.Blocks)
		l.blocks = m.Blocks
	}
	life := time.Duration(m.Lifetime) * time.Second
	switch {
	case len(l.blocks) == 0:
		l.until, l.renew = time.Time{}, time.Time{}
	case known:
		l.until, l.renew = now.Add(life), now.Add(max(life/3, portsEvery))
	default: // not renewed; what is new in the list lasts a little at least
		if l.until.IsZero() {
			l.until = now.Add(life)
		}
		l.renew = now.Add(portsUnavailable)
	}
	l.wanted, l.due = len(l.blocks), l.renew
	return changed
}

// reset forgets the blocks, and says whether there were any.
func (l *leases) reset() (changed bool) {
	changed = len(l.blocks) > 0
	*l = leases{serial: l.serial, sent: l.sent}
	return changed
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// RequestPorts tells that the client's ports are used up, so that it asks for
// another block. It returns at once and may be called as often as one likes.
func (c *Client) RequestPorts() { notify(c.more) }

// renewPorts sends the request that is due, if one is, and returns when to look
// again.
func (c *Client) renewPorts(u *upkeep, cur *active, now time.Time) time.Time {
	if cur == nil {
		return time.Time{}
	}
	m, send, lost, again := u.leases.next(now)
	c.setPorts(u, lost)
	if lost {
		c.log.Warn("the lease of further ports has ended")
	}
	if send {
		c.counters.portRequests.Add(1)
		c.sendControl(cur, wire.AppendPortsRequest(nil, m))
	}
	return again
}

// portsAnswer takes a server's answer about ports.
func (c *Client) portsAnswer(u *upkeep, m wire.Ports) {
	before, wanted := len(u.leases.blocks), u.leases.wanted
	fits := u.leases.token != 0 && u.leases.token == m.Token
	changed := u.leases.answer(time.Now(), m)
	c.setPorts(u, changed)
	switch {
	case !fits:
	case len(u.leases.blocks) < wanted:
		c.counters.portRefusals.Add(1)
		c.log.Warn("ports are used up, and the server gives no more", "why", m.Status.String(), "blocks", len(u.leases.blocks))
	case changed:
		c.log.Info("the server gave further ports", "blocks", len(u.leases.blocks), "before", before)
	}
}

// setPorts publishes the blocks after a change.
func (c *Client) setPorts(u *upkeep, changed bool) {
	if !changed {
		return
	}
	ports := make([]PortRange, 0, len(u.leases.blocks))
	for _, b := range u.leases.blocks {
		ports = append(ports, PortRange{First: b.First, Last: b.Last, Public: unlessZero(netip.AddrFrom4(b.IPv4))})
	}
	c.ports.Store(&ports)
	if c.cfg.OnPorts != nil {
		c.cfg.OnPorts(slices.Clone(ports))
	}
}
