package simnet

import (
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"
)

// Host is a machine of the network.
type Host struct {
	net      *Network
	name     string
	addrs    []netip.Addr // may send from these
	conns    map[netip.AddrPort]*Conn
	up, down Link
	nat      *NAT
	dead     bool
	nextPort uint16
}

// Link is what happens on the way between a host and the network, in one
// direction. The zero value is perfect and immediate. Probabilities are from 0 to
// 1, each datagram's luck is its own.
type Link struct {
	Delay     time.Duration
	Jitter    time.Duration // up to this much is added at random; so reorders too
	Loss      float64
	Duplicate float64
	Corrupt   float64 // one bit is flipped
	Reorder   float64 // takes ReorderDelay longer
	// ReorderDelay is 1 ms if zero.
	ReorderDelay time.Duration
	// MTU is the longest payload carried, in bytes; longer ones vanish, as in a
	// path MTU black hole. 0 means no limit.
	MTU int
}

func (l *Link) reorderDelay() time.Duration {
	if l.ReorderDelay > 0 {
		return l.ReorderDelay
	}
	return time.Millisecond
}

// Name is what Network.Host was given.
func (h *Host) Name() string { return h.name }

// SetLinks sets how the host is connected: up towards the network, down from it.
func (h *Host) SetLinks(up, down Link) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.up, h.down = up, down
}

// Kill makes the host neither send nor receive any more. What waited in its
// sockets is gone. Routes still lead to it until Withdraw or SetRoute say
// otherwise, since that takes a real network a while to notice.
func (h *Host) Kill() {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.dead = true
	for _, c := range h.conns {
		c.drainLocked()
	}
}

// Revive ends Kill.
func (h *Host) Revive() {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.dead = false
}

// Behind puts the host behind a translator: what it sends to others comes from the
// translator's outer address. Nil takes it out.
func (h *Host) Behind(nat *NAT) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.nat = nat
}

// Listen opens a socket, bound as udp.Listen does it: 0.0.0.0 is all IPv4
// addresses of the host, [::] or an invalid address all addresses, port 0 any
// port.
func (h *Host) Listen(addr netip.AddrPort) (*Conn, error) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	ip := addr.Addr().Unmap()
	switch {
	case !ip.IsValid():
		ip = netip.IPv6Unspecified()
	case !ip.IsUnspecified() && !slices.Contains(h.addrs, ip):
		return nil, fmt.Errorf("listen on udp %s at %s: %w", addr, h.name, syscall.EADDRNOTAVAIL)
	}
	port := addr.Port()
	for tries := 0; port == 0 || h.takenLocked(netip.AddrPortFrom(ip, port)); tries++ {
		if addr.Port() != 0 || tries == 1<<14 {
			return nil, fmt.Errorf("listen on udp %s at %s: %w", addr, h.name, syscall.EADDRINUSE)
		}
		h.nextPort = max(49152, h.nextPort+1)
		port = h.nextPort
	}
	c := &Conn{
		host:  h,
		local: netip.AddrPortFrom(ip, port),
		queue: make(chan received, queueLen),
		done:  make(chan struct{}),
	}
	h.conns[c.local] = c
	if h.net.closed {
		c.closeLocked()
	}
	return c, nil
}

// takenLocked says whether a socket bound to at would collide.
func (h *Host) takenLocked(at netip.AddrPort) bool {
	for other := range h.conns {
		if other.Port() == at.Port() &&
			(other.Addr() == at.Addr() || covers(other.Addr(), at.Addr()) || covers(at.Addr(), other.Addr())) {
			return true
		}
	}
	return false
}

// covers says whether a socket bound to wildcard receives for addr.
func covers(wildcard, addr netip.Addr) bool {
	return wildcard == netip.IPv6Unspecified() || wildcard == netip.IPv4Unspecified() && addr.Is4()
}

// connLocked finds the socket for a datagram to at.
func (h *Host) connLocked(at netip.AddrPort) *Conn {
	for _, ip := range []netip.Addr{at.Addr(), netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		c := h.conns[netip.AddrPortFrom(ip, at.Port())]
		if c != nil && (ip == at.Addr() || covers(ip, at.Addr())) {
			return c
		}
	}
	return nil
}

// sourceLocked is the address a socket of h sends from, or false if it can't.
func (h *Host) sourceLocked(bound, asked, to netip.Addr) (netip.Addr, bool) {
	if !bound.IsUnspecified() {
		return bound, bound.Is4() == to.Is4()
	}
	if !covers(bound, to) {
		return netip.Addr{}, false
	}
	if asked.IsValid() && !asked.IsUnspecified() && asked.Is4() == to.Is4() {
		return asked, slices.Contains(h.addrs, asked)
	}
	for _, a := range h.addrs {
		if a.Is4() == to.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}
