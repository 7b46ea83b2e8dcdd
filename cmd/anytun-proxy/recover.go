package main

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/netstack"
)

// What the client engine finds out about the tunnel, and what the netstack does
// about it:
//
//	OnSuspect  maybe nothing gets through      keep what may have to be sent again
//	OnGap      something does again            send it, and wake the peers
//	OnPorts    further port blocks             draw from them too
//
// and the other way round, PortsUsedUp asks for further blocks. The engine must
// not be held up and the netstack's part is work, so recoverLoop does it.

// portsUsedUpEvery is how often the log says that ports are used up, at most.
const portsUsedUpEvery = 10 * time.Second

// recovery is the part of a tunnel that this file is about.
type recovery struct {
	news       news
	more       func() // asks for further ports; set before the first session
	leased     atomic.Pointer[[]client.PortRange]
	setting    sync.Mutex   // so that the stack gets the newest ports last
	saidUsedUp atomic.Int64 // UnixNano of the last time the log said so
}

// news is what recoverLoop has to pass on: the latest of each, so that there is
// nothing to overflow.
type news struct {
	mu      sync.Mutex
	suspect bool
	gap     time.Duration // longest since the last look; 0: none
	ports   bool          // tunnel.leased has changed
	wake    chan struct{} // has room for one
}

func (n *news) change(f func()) {
	n.mu.Lock()
	f()
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default: // it looks anyway
	}
}

// onSuspect, onGap and onPorts are the client engine's.
func (t *tunnel) onSuspect(yes bool) { t.news.change(func() { t.news.suspect = yes }) }

func (t *tunnel) onGap(g client.Gap) {
	t.news.change(func() { t.news.gap = max(t.news.gap, g.Length) })
}

func (t *tunnel) onPorts(ports []client.PortRange) {
	t.leased.Store(&ports)
	t.news.change(func() { t.news.ports = true })
}

// recoverLoop passes on what the client engine has told, until ctx ends.
func (t *tunnel) recoverLoop(ctx context.Context) {
	select {
	case <-t.made:
	case <-ctx.Done():
		return
	}
	if t.failed != nil {
		return
	}
	told := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.news.wake:
		}
		t.news.mu.Lock()
		suspect, gap, ports := t.news.suspect, t.news.gap, t.news.ports
		t.news.gap, t.news.ports = 0, false
		t.news.mu.Unlock()
		if gap > 0 {
			t.stack.Resume(gap) // which ends the suspicion
			told = false
		}
		if suspect != told {
			t.stack.Suspect(suspect)
			told = suspect
		}
		if ports {
			if err := t.setPorts(); err != nil {
				t.log.Error("can't use the further ports", "error", err)
			}
		}
	}
}

// setPorts gives the stack the ports of the session and those leased besides.
func (t *tunnel) setPorts() error {
	t.setting.Lock()
	defer t.setting.Unlock()
	s := t.current.Load()
	ranges := []netstack.PortRange{{First: s.FirstPort, Last: s.LastPort}}
	for _, p := range t.furtherPorts() {
		ranges = append(ranges, netstack.PortRange{First: p.First, Last: p.Last})
	}
	return t.stack.SetPortRanges(ranges)
}

func (t *tunnel) furtherPorts() []client.PortRange {
	if p := t.leased.Load(); p != nil {
		return *p
	}
	return nil
}

// portsUsedUp is called by the stack, at most once a second, when it finds no
// port.
func (t *tunnel) portsUsedUp() {
	t.more()
	if now := time.Now().UnixNano(); now-t.saidUsedUp.Load() >= int64(portsUsedUpEvery) {
		t.saidUsedUp.Store(now)
		t.log.Warn("ports used up: new connections wait for one, then fail; asking the server for more")
	}
}

// publicAddr is the address at which the world reaches an inner address and
// port of ours; the inner one where there is no other.
func (t *tunnel) publicAddr(inner netip.AddrPort) netip.AddrPort {
	s := t.current.Load()
	at := s.Public[1]
	if inner.Addr().Is4() {
		at = s.Public[0]
		for _, p := range t.furtherPorts() {
			if p.First <= inner.Port() && inner.Port() <= p.Last {
				at = p.Public
			}
		}
	}
	if !s.PublicPort || !at.IsValid() {
		return inner
	}
	return netip.AddrPortFrom(at, inner.Port())
}

// publicListener is a listener that says where the world reaches it.
type publicListener struct {
	net.Listener
	addr net.Addr
}

func (l publicListener) Addr() net.Addr { return l.addr }
