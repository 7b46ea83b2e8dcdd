package simnet

import (
	"net/netip"
	"time"
)

// NAT is an address translator such as homes have: each inner socket gets one
// outer port for all it talks to (RFC 4787 calls it endpoint-independent
// mapping), and only those it has talked to can answer (address and port-dependent
// filtering).
type NAT struct {
	net      *Network
	outer    netip.Addr
	idle     time.Duration
	nextPort uint16
	out      map[inside]*mapping
	in       map[netip.AddrPort]*mapping
}

// inside is a socket behind a translator.
type inside struct {
	host *Host
	at   netip.AddrPort
}

type mapping struct {
	inside inside
	outer  netip.AddrPort
	used   time.Time
	peers  map[netip.AddrPort]bool
}

// NAT adds a translator. It forgets a mapping that carried nothing outward for the
// time idle; 0 means never.
func (n *Network) NAT(outer netip.Addr, idle time.Duration) *NAT {
	n.mu.Lock()
	defer n.mu.Unlock()
	nat := &NAT{
		net: n, outer: outer, idle: idle, nextPort: 20000,
		out: make(map[inside]*mapping), in: make(map[netip.AddrPort]*mapping),
	}
	n.nats[outer] = nat
	return nat
}

// Rebind makes the translator forget everything, as one that restarts: the next
// datagram of each socket comes from another port, and from the given address if
// that is valid.
func (t *NAT) Rebind(outer netip.Addr) {
	t.net.mu.Lock()
	defer t.net.mu.Unlock()
	clear(t.out)
	clear(t.in)
	if outer.IsValid() {
		t.outer = outer
		t.net.nats[outer] = t
	}
}

// outwardLocked translates the source of a datagram from a socket of h at from.
func (t *NAT) outwardLocked(h *Host, from, to netip.AddrPort) netip.AddrPort {
	key := inside{h, from}
	m := t.out[key]
	if m != nil && t.expired(m) {
		delete(t.in, m.outer)
		m = nil
	}
	if m == nil {
		for t.nextPort++; t.in[netip.AddrPortFrom(t.outer, t.nextPort)] != nil || t.nextPort < 1024; t.nextPort++ {
		}
		m = &mapping{inside: key, outer: netip.AddrPortFrom(t.outer, t.nextPort), peers: make(map[netip.AddrPort]bool)}
		t.out[key], t.in[m.outer] = m, m
	}
	m.used = time.Now()
	m.peers[to] = true
	return m.outer
}

// inwardLocked finds the socket behind to that from may answer to.
func (t *NAT) inwardLocked(from, to netip.AddrPort) (*Host, netip.AddrPort, bool) {
	m := t.in[to]
	if m == nil || !m.peers[from] || t.expired(m) {
		return nil, netip.AddrPort{}, false
	}
	return m.inside.host, m.inside.at, true
}

func (t *NAT) expired(m *mapping) bool { return t.idle > 0 && time.Since(m.used) > t.idle }
