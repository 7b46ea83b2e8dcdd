package simnet

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// queueLen is how many datagrams a socket holds for its reader; the next
	// one is dropped (DropQueueFull), as a kernel does.
	queueLen = 4096
	// maxInFlight is how many datagrams the network carries at a time; the next
	// one is dropped (DropInFlight). A test that gets there has a loop.
	maxInFlight = 1 << 17
	// maxDatagram is the longest UDP payload over IPv4, bytes.
	maxDatagram = 65507
)

// Network is the whole of the simulated world. Its methods may be called from
// several goroutines.
type Network struct {
	mu      sync.Mutex
	random  *rand.Rand
	hosts   []*Host
	owners  map[netip.Addr][]*Host // who announces an address, in order
	nats    map[netip.Addr]*NAT    // by outer address, old ones included
	routes  map[route]*Host
	sprayed map[netip.Addr]bool
	flight  flight
	order   uint64 // of the next datagram sent
	timer   *time.Timer
	closed  bool
	stats   Stats
	trace   func(Event)
	events  []Event // not yet told to trace
}

// route is the way of one client to an anycast address.
type route struct {
	from *Host
	to   netip.Addr
}

// New makes an empty network. The same seed and the same calls in the same order
// give the same losses.
func New(seed uint64) *Network {
	n := &Network{
		random:  rand.New(rand.NewPCG(seed, 0x616e7974756e)),
		owners:  make(map[netip.Addr][]*Host),
		nats:    make(map[netip.Addr]*NAT),
		routes:  make(map[route]*Host),
		sprayed: make(map[netip.Addr]bool),
	}
	return n
}

// Close closes all sockets and drops what is in flight.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.unlockAndTell()
	n.closed = true
	for _, d := range n.flight {
		n.dropLocked(d, DropDead)
	}
	n.flight = nil
	if n.timer != nil {
		n.timer.Stop()
	}
	for _, h := range n.hosts {
		for _, c := range h.conns {
			c.closeLocked()
		}
	}
}

// Host adds a host with the given addresses. The name is for traces.
func (n *Network) Host(name string, addrs ...netip.Addr) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &Host{net: n, name: name, conns: make(map[netip.AddrPort]*Conn)}
	for _, a := range addrs {
		h.addrs = append(h.addrs, a)
		n.owners[a] = append(n.owners[a], h)
	}
	n.hosts = append(n.hosts, h)
	return h
}

// Announce makes h one of the hosts that addr leads to. The first that announces
// an address gets the packets of everybody for whom SetRoute didn't say
// otherwise.
func (n *Network) Announce(addr netip.Addr, hosts ...*Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range hosts {
		if !slices.Contains(n.owners[addr], h) {
			n.owners[addr] = append(n.owners[addr], h)
		}
		if !slices.Contains(h.addrs, addr) {
			h.addrs = append(h.addrs, addr)
		}
	}
}

// Withdraw ends what Announce began: nobody's packets to addr go to h. The host
// keeps the address and may still send from it, as a draining server does.
func (n *Network) Withdraw(addr netip.Addr, h *Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.owners[addr] = slices.DeleteFunc(n.owners[addr], func(o *Host) bool { return o == h })
}

// SetRoute leads from's packets to addr to the host to from now on: a flip, if
// they went elsewhere. It holds while to announces addr. A nil to takes the
// route away.
func (n *Network) SetRoute(from *Host, addr netip.Addr, to *Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if to == nil {
		delete(n.routes, route{from, addr})
		return
	}
	n.routes[route{from, addr}] = to
}

// Spray sends each datagram to addr to any of its hosts, whatever the routes: the
// worst that load balancing per packet can do.
func (n *Network) Spray(addr netip.Addr, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sprayed[addr] = on
}

// SetTrace sets a function that is told of every datagram when it is sent and when
// it has arrived or is lost. It may change the network. It may be called from
// several goroutines at once.
func (n *Network) SetTrace(trace func(Event)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.trace = trace
}

// Stats returns the network's counters.
func (n *Network) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}

// routeLocked finds the host that a datagram from h to addr goes to.
func (n *Network) routeLocked(h *Host, addr netip.Addr) *Host {
	owners := n.owners[addr]
	switch {
	case len(owners) == 0:
		return nil
	case slices.Contains(owners, h):
		return h
	case n.sprayed[addr]:
		return owners[n.random.IntN(len(owners))]
	}
	if to := n.routes[route{h, addr}]; to != nil && slices.Contains(owners, to) {
		return to
	}
	return owners[0]
}

// datagram is one UDP packet on its way.
type datagram struct {
	from, to netip.AddrPort
	sender   *Host
	host     *Host // receiver; behind a translator, nil until it is known
	nat      *NAT
	payload  []byte
	at       time.Time // of arrival
	order    uint64
}

// sendLocked puts a copy of payload on its way.
func (n *Network) sendLocked(h *Host, from, to netip.AddrPort, payload []byte) {
	if h.nat != nil {
		from = h.nat.outwardLocked(h, from, to)
	}
	d := &datagram{from: from, to: to, sender: h, payload: payload}
	n.stats.Sent++
	n.tellLocked(d, Sent, 0)
	switch {
	case n.closed || h.dead:
		n.dropLocked(d, DropDead)
		return
	case len(payload) > maxDatagram:
		n.dropLocked(d, DropTooBig)
		return
	}
	if d.nat = n.nats[to.Addr()]; d.nat != nil {
		// Only to know whose link it is; the mapping counts on arrival.
		d.host, _, _ = d.nat.inwardLocked(from, to)
	} else if d.host = n.routeLocked(h, to.Addr()); d.host == nil {
		n.dropLocked(d, DropNoRoute)
		return
	}
	down := &Link{}
	if d.host != nil {
		down = &d.host.down
	}
	d.payload = slices.Clone(payload)
	n.crossLocked(d, &h.up, down)
	if n.chanceLocked(h.up.Duplicate) || n.chanceLocked(down.Duplicate) {
		n.stats.Duplicated++
		again := *d
		again.payload = slices.Clone(payload)
		n.crossLocked(&again, &h.up, down)
	}
}

// crossLocked takes d through two links, into the air.
func (n *Network) crossLocked(d *datagram, links ...*Link) {
	var delay time.Duration
	for _, l := range links {
		if l.MTU > 0 && len(d.payload) > l.MTU {
			n.dropLocked(d, DropTooBig)
			return
		}
		if n.chanceLocked(l.Loss) {
			n.dropLocked(d, DropLoss)
			return
		}
		if len(d.payload) > 0 && n.chanceLocked(l.Corrupt) {
			n.stats.Corrupted++
			d.payload[n.random.IntN(len(d.payload))] ^= 1 << n.random.IntN(8)
		}
		delay += l.Delay
		if l.Jitter > 0 {
			delay += time.Duration(n.random.Int64N(int64(l.Jitter)))
		}
		if n.chanceLocked(l.Reorder) {
			n.stats.Reordered++
			delay += l.reorderDelay()
		}
	}
	if len(n.flight) >= maxInFlight {
		n.dropLocked(d, DropInFlight)
		return
	}
	n.order++
	d.order = n.order
	d.at = time.Now().Add(delay)
	if delay == 0 {
		n.arriveLocked(d)
		return
	}
	heap.Push(&n.flight, d)
	if n.flight[0] == d {
		n.armLocked()
	}
}

// chanceLocked is true with probability p. It draws only if there is a choice, so
// that a link without faults doesn't change the others' luck.
func (n *Network) chanceLocked(p float64) bool { return p > 0 && n.random.Float64() < p }

// armLocked sets the timer to the next arrival.
func (n *Network) armLocked() {
	if n.timer != nil {
		n.timer.Stop()
	}
	if len(n.flight) > 0 {
		n.timer = time.AfterFunc(time.Until(n.flight[0].at), n.arrivals)
	}
}

// arrivals runs when the timer fires.
func (n *Network) arrivals() {
	n.mu.Lock()
	now := time.Now()
	for len(n.flight) > 0 && !n.flight[0].at.After(now) {
		n.arriveLocked(heap.Pop(&n.flight).(*datagram))
	}
	n.armLocked()
	n.unlockAndTell()
}

// arriveLocked hands d to a socket, or drops it.
func (n *Network) arriveLocked(d *datagram) {
	to := d.to
	if d.nat != nil {
		host, inner, ok := d.nat.inwardLocked(d.from, d.to)
		if !ok {
			n.dropLocked(d, DropNAT)
			return
		}
		d.host, to = host, inner
	}
	if d.host.dead {
		n.dropLocked(d, DropDead)
		return
	}
	c := d.host.connLocked(to)
	if c == nil {
		n.dropLocked(d, DropNoSocket)
		return
	}
	select {
	case c.queue <- received{from: d.from, local: to.Addr(), payload: d.payload}:
		n.stats.Delivered++
		n.tellLocked(d, Delivered, 0)
	default:
		n.dropLocked(d, DropQueueFull)
	}
}

func (n *Network) dropLocked(d *datagram, r DropReason) {
	n.stats.Drops[r]++
	n.tellLocked(d, Dropped, r)
}

// tellLocked notes an event; unlockAndTell passes it on.
func (n *Network) tellLocked(d *datagram, k Kind, r DropReason) {
	if n.trace == nil {
		return
	}
	e := Event{Time: time.Now(), Kind: k, Reason: r, From: d.from, To: d.to, Sender: d.sender, Payload: slices.Clone(d.payload)}
	if k != Sent {
		e.Receiver = d.host
	}
	n.events = append(n.events, e)
}

func (n *Network) unlockAndTell() {
	events, trace := n.events, n.trace
	n.events = nil
	n.mu.Unlock()
	if trace == nil {
		return
	}
	for _, e := range events {
		trace(e)
	}
}

// flight is a heap by time of arrival; what arrives together keeps its order.
type flight []*datagram

func (f flight) Len() int { return len(f) }
func (f flight) Less(i, j int) bool {
	if !f[i].at.Equal(f[j].at) {
		return f[i].at.Before(f[j].at)
	}
	return f[i].order < f[j].order
}
func (f flight) Swap(i, j int) { f[i], f[j] = f[j], f[i] }
func (f *flight) Push(d any)   { *f = append(*f, d.(*datagram)) }
func (f *flight) Pop() any {
	old := *f
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*f = old[:len(old)-1]
	return d
}

// Kind is what happened to a datagram.
type Kind uint8

// The kinds of events. Each datagram is Sent once; each copy of it then is either
// Delivered or Dropped.
const (
	Sent Kind = iota
	Delivered
	Dropped
)

// Event is one step of a datagram.
type Event struct {
	Time     time.Time
	Kind     Kind
	Reason   DropReason     // if Dropped
	From, To netip.AddrPort // as on the wire: outside of translators
	Sender   *Host
	Receiver *Host  // nil when Sent, or if none was found
	Payload  []byte // a copy; damaged if the link did that
}

// String is for test logs.
func (e Event) String() string {
	s := fmt.Sprintf("%v → %v, %d bytes: ", e.From, e.To, len(e.Payload))
	switch e.Kind {
	case Sent:
		return s + "sent by " + e.Sender.name
	case Delivered:
		return s + "delivered to " + e.Receiver.name
	default:
		return s + "dropped: " + e.Reason.String()
	}
}

// DropReason says why a datagram was lost.
type DropReason uint8

// The reasons.
const (
	DropLoss      DropReason = iota // a link lost it
	DropQueueFull                   // the socket's reader is too slow
	DropInFlight                    // the network is full
	DropDead                        // sender or receiver is dead
	DropNoRoute                     // nobody announces the address
	DropNoSocket                    // nobody listens on the port
	DropNAT                         // the translator knows no such mapping
	DropTooBig                      // longer than UDP or the link carries
	DropSource                      // the sender doesn't have that source address

	// NumDropReasons is the number of reasons above.
	NumDropReasons = iota
)

var dropNames = [NumDropReasons]string{
	DropLoss:      "loss",
	DropQueueFull: "queue full",
	DropInFlight:  "network full",
	DropDead:      "dead host",
	DropNoRoute:   "no route",
	DropNoSocket:  "no socket",
	DropNAT:       "no mapping",
	DropTooBig:    "too big",
	DropSource:    "foreign source",
}

// String names the reason.
func (r DropReason) String() string {
	if int(r) < len(dropNames) {
		return dropNames[r]
	}
	return "unknown"
}

// Stats counts datagrams. In the end, Sent + Duplicated = Delivered + all Drops.
type Stats struct {
	Sent, Delivered                  uint64
	Duplicated, Corrupted, Reordered uint64
	Drops                            [NumDropReasons]uint64
}
