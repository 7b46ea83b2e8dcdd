package server

import (
	"container/list"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// egressKind is the protocol of a flow.
type egressKind uint8

const (
	egressKindTCP egressKind = iota
	egressKindUDP
	egressKindPing
	egressKinds
)

// egressPace says how long a mapping may be idle.
type egressPace uint8

const (
	egressQuick egressPace = iota // DNS questions and pings: seconds
	egressSlow                    // every other mapping: minutes
	egressHeld                    // TCP: ended by its ends, or after many hours
	egressPaces
)

// egressDeny says why a flow was not admitted.
type egressDeny uint8

const (
	egressAdmitted egressDeny = iota
	egressClientFull
	egressAllFull
	egressDialsFull
	egressClosed
)

// egressKey finds the mapping of a datagram: the client's inner address and
// port (RFC 4787's endpoint-independent mapping), or its echo identifier. The
// family of the address is also the family of every destination.
type egressKey struct {
	kind egressKind
	from netip.AddrPort
}

// egressEnd ends what a flow holds. It is called without the table's lock, may
// be called more than once, and must not wait for the flow's goroutines.
type egressEnd interface{ endFlow() }

// egressFlow is one TCP connection, UDP mapping or ping mapping: one unit of
// the limits from admission until drop.
type egressFlow struct {
	key  egressKey
	last atomic.Int64 // when it was last used, Unix nanoseconds

	// The rest is guarded by egressFlows.mu.
	client *egressClient
	end    egressEnd // nil until insert
	pace   egressPace
	at     *list.Element // in client.flows[pace]
	gone   bool
}

// egressClient is a client's account; it exists while it has flows.
type egressClient struct {
	number uint32
	count  int
	dials  int
	flows  [egressPaces]*list.List // longest unused first, except egressHeld
}

// egressFlows is the account of all flows: what a client may hold is bounded
// before what all clients may hold together, so one client's appetite is
// refused while the others still have room. A client that is at its limit gives
// up its own longest unused UDP or ping mapping for a new flow, provided that
// mapping has been idle for evictAfter; nobody's flow is ever given up for
// another client's. TCP connections are never given up.
type egressFlows struct {
	perClient, all           int
	dialsPerClient, dialsAll int
	idle                     [egressPaces]time.Duration
	evictAfter               time.Duration

	mu      sync.Mutex
	closed  bool
	clients map[uint32]*egressClient
	byKey   map[egressKey]*egressFlow // UDP and ping mappings
	kinds   [egressKinds]int
	dials   int
}

func newEgressFlows(c *socketsConfig) *egressFlows {
	return &egressFlows{
		perClient:      c.MaxFlowsPerClient,
		all:            c.MaxFlows,
		dialsPerClient: c.MaxDialsPerClient,
		dialsAll:       c.MaxDials,
		idle: [egressPaces]time.Duration{
			egressQuick: c.QuickTimeout,
			egressSlow:  c.UDPTimeout,
			egressHeld:  c.TCPTimeout,
		},
		evictAfter: c.QuickTimeout,
		clients:    make(map[uint32]*egressClient),
		byKey:      make(map[egressKey]*egressFlow),
	}
}

// lookup finds a mapping and marks it used at now. A mapping whose use turns
// out to be a longer one (pace) is kept longer from now on.
func (t *egressFlows) lookup(key egressKey, pace egressPace, now time.Time) *egressFlow {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.byKey[key]
	if f == nil {
		return nil
	}
	f.last.Store(now.UnixNano())
	if pace > f.pace {
		f.client.flows[f.pace].Remove(f.at)
		f.pace = pace
		f.at = f.client.flows[pace].PushBack(f)
	} else {
		f.client.flows[f.pace].MoveToBack(f.at)
	}
	return f
}

// admit takes a unit of the client's account for a new flow. victim, if not
// nil, is the mapping that was given up for it: the caller ends it.
func (t *egressFlows) admit(number uint32, key egressKey, pace egressPace, now time.Time) (f *egressFlow, victim egressEnd, deny egressDeny) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, nil, egressClosed
	}
	c := t.clients[number]
	if c != nil && c.count >= t.perClient || t.countLocked() >= t.all {
		old := t.evictableLocked(c, now)
		switch {
		case old != nil:
			victim = old.end
			t.dropLocked(old)
			c = t.clients[number]
		case c != nil && c.count >= t.perClient:
			return nil, nil, egressClientFull
		default:
			return nil, nil, egressAllFull
		}
	}
	if c == nil {
		c = &egressClient{number: number}
		for i := range c.flows {
			c.flows[i] = list.New()
		}
		t.clients[number] = c
	}
	f = &egressFlow{key: key, client: c, pace: pace}
	f.last.Store(now.UnixNano())
	f.at = c.flows[pace].PushBack(f)
	c.count++
	t.kinds[key.kind]++
	return f, victim, egressAdmitted
}

// evictableLocked returns the client's mapping that has been unused longest,
// if that is long enough. The lists are in order of use, so only their heads
// need a look.
func (t *egressFlows) evictableLocked(c *egressClient, now time.Time) *egressFlow {
	if c == nil {
		return nil
	}
	limit := now.Add(-t.evictAfter).UnixNano()
	for _, p := range [...]egressPace{egressQuick, egressSlow} {
		for e := c.flows[p].Front(); e != nil; e = e.Next() {
			f := e.Value.(*egressFlow)
			if f.last.Load() > limit {
				break
			}
			if f.end != nil { // else it is being opened just now
				return f
			}
		}
	}
	return nil
}

// insert makes an admitted flow findable and says how to end it. When another
// goroutine was faster with the same key, the flow is dropped and that
// goroutine's is returned; when the table has been closed meanwhile, nil is. In
// both cases the caller ends what it opened.
func (t *egressFlows) insert(f *egressFlow, end egressEnd) *egressFlow {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || f.gone {
		t.dropLocked(f)
		return nil
	}
	if f.key.kind != egressKindTCP {
		if first := t.byKey[f.key]; first != nil {
			t.dropLocked(f)
			return first
		}
		t.byKey[f.key] = f
	}
	f.end = end
	return f
}

// drop gives the flow's unit back. It may be called more than once.
func (t *egressFlows) drop(f *egressFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropLocked(f)
}

func (t *egressFlows) dropLocked(f *egressFlow) {
	if f.gone {
		return
	}
	f.gone = true
	c := f.client
	c.flows[f.pace].Remove(f.at)
	c.count--
	t.kinds[f.key.kind]--
	if t.byKey[f.key] == f {
		delete(t.byKey, f.key)
	}
	t.sweepClientLocked(c)
}

func (t *egressFlows) sweepClientLocked(c *egressClient) {
	if c.count == 0 && c.dials == 0 {
		delete(t.clients, c.number)
	}
}

// startDial takes one of the client's half-open connections for an admitted
// flow; endDial gives it back.
func (t *egressFlows) startDial(f *egressFlow) egressDeny {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.client.dials >= t.dialsPerClient || t.dials >= t.dialsAll {
		return egressDialsFull
	}
	f.client.dials++
	t.dials++
	return egressAdmitted
}

func (t *egressFlows) endDial(f *egressFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f.client.dials--
	t.dials--
	t.sweepClientLocked(f.client)
}

// expire drops every flow that has been idle for its pace's time and returns
// what is to be ended, by kind.
func (t *egressFlows) expire(now time.Time) [egressKinds][]egressEnd {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out [egressKinds][]egressEnd
	for _, c := range t.clients {
		for p, flows := range c.flows {
			limit := now.Add(-t.idle[p]).UnixNano()
			var next *list.Element
			for e := flows.Front(); e != nil; e = next {
				next = e.Next()
				f := e.Value.(*egressFlow)
				if f.last.Load() > limit {
					if egressPace(p) == egressHeld {
						continue // used without moving in the list
					}
					break
				}
				if f.end == nil {
					continue
				}
				out[f.key.kind] = append(out[f.key.kind], f.end)
				t.dropLocked(f)
			}
		}
	}
	return out
}

// take drops all flows of one client and returns what is to be ended.
func (t *egressFlows) take(number uint32) []egressEnd {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.clients[number]; c != nil {
		return t.takeLocked(c)
	}
	return nil
}

// close refuses all flows from now on, drops those there are, and returns what
// is to be ended.
func (t *egressFlows) close() []egressEnd {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	var out []egressEnd
	for _, c := range t.clients {
		out = append(out, t.takeLocked(c)...)
	}
	return out
}

func (t *egressFlows) takeLocked(c *egressClient) []egressEnd {
	var out []egressEnd
	for _, flows := range c.flows {
		var next *list.Element
		for e := flows.Front(); e != nil; e = next {
			next = e.Next()
			f := e.Value.(*egressFlow)
			if f.end != nil {
				out = append(out, f.end)
			}
			t.dropLocked(f)
		}
	}
	return out
}

func (t *egressFlows) countLocked() int {
	n := 0
	for _, k := range t.kinds {
		n += k
	}
	return n
}

// gauges returns the flows there are by kind, the dials under way, and the
// clients that hold any of them.
func (t *egressFlows) gauges() (kinds [egressKinds]int, dials, clients int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.kinds, t.dials, len(t.clients)
}
