package netstack

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// The stack draws local ports from a list of ranges. gVisor knows one range at
// a time, so the list is kept here: when a dial or a bind finds no port in the
// range that gVisor has, it goes through the others, and the one that had a port
// stays for a while, since the next dial would find the first as full.

const (
	// A dial that finds no port free waits this long for one: connections in
	// TIME-WAIT give theirs back within timeWait, so that a burst of short
	// connections is slowed down rather than refused; and whoever is told by
	// Config.PortsUsedUp may get more.
	portPatience = timeWait + 200*time.Millisecond
	portRetry    = 10 * time.Millisecond

	// firstRangeAgain is how long the stack draws from another range before it
	// looks at the first one again, whose ports need not be given back.
	firstRangeAgain = time.Second

	// portsToldEvery is how often Config.PortsUsedUp is called at most.
	portsToldEvery = time.Second
)

// PortRange is a range of ports, first and last included.
type PortRange struct{ First, Last uint16 }

// ports are the ranges. The zero value leaves gVisor with its own.
type ports struct {
	// mu guards what follows, and is held while a search through the ranges
	// goes on: two searches would turn gVisor's range away under each other.
	mu     sync.Mutex
	ranges []PortRange
	at     int       // the range gVisor draws from
	moved  time.Time // when at last became other than 0

	usedUp atomic.Uint64 // searches without a result
	told   atomic.Int64  // UnixNano of the last call of Config.PortsUsedUp

	// wait lets one caller at a time wait for a free port, since looking
	// through all of them is work.
	wait chan struct{}

	udp udpSockets // who has the ports of UDP
}

// SetPortRange is SetPortRanges with a single range.
func (s *Stack) SetPortRange(first, last uint16) error {
	return s.SetPortRanges([]PortRange{{first, last}})
}

// SetPortRanges sets the ports from which the stack takes the local ports of
// new connections and sockets: from the first range as long as it has some,
// then from the others in turn. Connections and sockets that exist keep their
// ports. The slice is not kept.
func (s *Stack) SetPortRanges(ranges []PortRange) error {
	if len(ranges) == 0 {
		return &net.OpError{Op: "set", Net: "ports", Err: syscall.EINVAL}
	}
	for _, r := range ranges {
		if r.First == 0 || r.First > r.Last {
			return &net.OpError{Op: "set", Net: "ports", Err: syscall.EINVAL}
		}
	}
	p := &s.ports
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ranges = slices.Clone(ranges)
	return s.useRangeLocked(0)
}

// useRangeLocked makes gVisor draw from range i. s.ports.mu is held.
func (s *Stack) useRangeLocked(i int) error {
	r := s.ports.ranges[i]
	if err := s.st.SetPortRange(r.First, r.Last); err != nil {
		return fmt.Errorf("netstack: port range %d to %d: %s", r.First, r.Last, err)
	}
	if s.ports.at = i; i != 0 {
		s.ports.moved = time.Now()
	}
	return nil
}

// drawPort runs try, which makes a socket with a port of gVisor's range and says
// whether there was one, until there is or the ranges have all been tried. It
// reports whether there was.
func (s *Stack) drawPort(try func() bool) bool {
	p := &s.ports
	if p.mu.TryLock() {
		if p.at != 0 && time.Since(p.moved) > firstRangeAgain {
			_ = s.useRangeLocked(0) // it was taken before
		}
		p.mu.Unlock()
	}
	if try() || s.searchRanges(try) {
		return true
	}
	s.tellPortsUsedUp()
	return false
}

// searchRanges tries every range, beginning with the one after that in use.
func (s *Stack) searchRanges(try func() bool) bool {
	p := &s.ports
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ranges) < 2 {
		return false
	}
	for n, from := 1, p.at; n <= len(p.ranges); n++ {
		if s.useRangeLocked((from+n)%len(p.ranges)) == nil && try() {
			return true
		}
	}
	return false
}

// tellPortsUsedUp counts a search in vain, and tells the owner about it from
// time to time. No lock is held.
func (s *Stack) tellPortsUsedUp() {
	p := &s.ports
	p.usedUp.Add(1)
	if s.portsUsedUp == nil {
		return
	}
	now, told := time.Now().UnixNano(), p.told.Load()
	if now-told >= int64(portsToldEvery) && p.told.CompareAndSwap(told, now) {
		s.portsUsedUp()
	}
}

// drawPortPatiently is drawPort, again and again for as long as portPatience
// while no port is free. Its error is ctx's.
func (s *Stack) drawPortPatiently(ctx context.Context, try func() bool) error {
	if s.drawPort(try) {
		return nil
	}
	patience := time.NewTimer(portPatience)
	defer patience.Stop()
	select {
	case s.ports.wait <- struct{}{}:
		defer func() { <-s.ports.wait }()
	case <-patience.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	retry := time.NewTicker(portRetry)
	defer retry.Stop()
	for !s.drawPort(try) {
		select {
		case <-retry.C:
		case <-patience.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// isNoPort reports whether err, of a socket that may have any port, means that
// there is none.
func isNoPort(err tcpip.Error) bool {
	_, ok := err.(*tcpip.ErrNoPortAvailable)
	return ok
}
