package socks5

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

const (
	maxNames        = 64               // remembered per association; beyond it an old one is forgotten
	maxLookups      = 8                // at once per association; beyond it datagrams are dropped
	maxWaiting      = 16               // datagrams that wait for one name; beyond it the newest is dropped
	maxWaitingBytes = 64 << 10         // of all names; likewise
	nameTTL         = time.Minute      // the Network's resolver knows the true one; this spares asking it per datagram
	nameFailureTTL  = 5 * time.Second  // how long a failure is remembered
	lookupTimeout   = 10 * time.Second // of one name
)

// names resolves the destinations of an association's datagrams at the far end, without holding up the datagrams that
// need no look-up.
type names struct {
	s    *proxy.Server
	send func(payload []byte, to netip.AddrPort) // one that has waited
	ctx  context.Context                         // ends the look-ups; set by start before the loops run
	done sync.WaitGroup

	mu      sync.Mutex // guards what follows; not held while sending
	known   map[string]*nameEntry
	lookups int
	bytes   int // of waiting payloads
}

type nameEntry struct {
	addr    netip.Addr // not valid: the last look-up failed, or the first one is under way
	expires time.Time  // zero while a look-up is under way
	waiting []waitingDatagram
}

type waitingDatagram struct {
	payload []byte
	port    uint16
}

func newNames(s *proxy.Server, send func([]byte, netip.AddrPort)) *names {
	return &names{s: s, send: send}
}

func (n *names) start(ctx context.Context) { n.ctx = ctx }

// wait returns when no look-up is under way. There must be no send any more.
func (n *names) wait() { n.done.Wait() }

// find returns the address of a name, or none when a copy of the datagram now waits for it; ok is false for one to be
// dropped.
func (n *names) find(name []byte, port uint16, payload []byte) (addr netip.Addr, drop proxy.Drop, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.known[string(name)] // no allocation
	if e != nil && !e.expires.IsZero() {
		if time.Now().Before(e.expires) {
			return e.addr, proxy.DropName, e.addr.IsValid()
		}
		delete(n.known, string(name))
		e = nil
	}
	if e == nil {
		target, err := proxy.NewTarget(string(name), port)
		if err != nil {
			return netip.Addr{}, proxy.DropName, false
		}
		if target.Addr.IsValid() {
			return target.Addr, 0, true
		}
		if n.lookups == maxLookups {
			return netip.Addr{}, proxy.DropQueue, false
		}
		e = &nameEntry{}
		n.addLocked(target.Name, e)
		n.lookups++
		n.done.Add(1)
		go n.lookup(target.Name, e)
	}
	if len(e.waiting) == maxWaiting || n.bytes+len(payload) > maxWaitingBytes {
		return netip.Addr{}, proxy.DropQueue, false
	}
	n.bytes += len(payload)
	e.waiting = append(e.waiting, waitingDatagram{append([]byte(nil), payload...), port})
	return netip.Addr{}, 0, true
}

// addLocked remembers an entry, and forgets another one, whichever, if there are too many.
func (n *names) addLocked(name string, e *nameEntry) {
	if n.known == nil {
		n.known = make(map[string]*nameEntry)
	}
	if len(n.known) >= maxNames {
		for other, old := range n.known {
			if !old.expires.IsZero() {
				delete(n.known, other)
				break
			}
		}
	}
	n.known[name] = e
}

// lookup asks for one name and sends what has waited for it. Datagrams that find the name while that is done may
// overtake, as datagrams may.
func (n *names) lookup(name string, e *nameEntry) {
	defer n.done.Done()
	ctx, cancel := context.WithTimeout(n.ctx, lookupTimeout)
	defer cancel()
	addrs, err := n.s.Network().LookupNetIP(ctx, "ip", name)
	var addr netip.Addr
	if err == nil {
		addr, err = preferIPv4(name, addrs)
	}
	ttl := nameTTL
	if err != nil {
		ttl = nameFailureTTL
	}

	n.mu.Lock()
	n.lookups--
	waiting := e.waiting
	e.waiting, e.addr, e.expires = nil, addr, time.Now().Add(ttl)
	for _, d := range waiting {
		n.bytes -= len(d.payload)
	}
	n.mu.Unlock()

	for _, d := range waiting {
		if err != nil {
			n.s.Counters().Drop(proxy.DropName, 1)
			continue
		}
		n.send(d.payload, netip.AddrPortFrom(addr, d.port))
	}
}
