// Package nat maps the source ports of clients that don't keep to their port block
// onto it: kernels behind a TUN device, programs that aren't ours. The address
// and the block follow from the client's number by arithmetic; only the port needs
// a table, so a packet that comes back finds its client without one, and its
// inner port with one look-up here.
//
//	            outward: inner port -> public port, of the client's block
//	client 7    UDP 51820 ------------------------------> 8112
//	            inward:  public port -> inner port
//	            UDP 51820 <------------------------------ 8112
//
// A mapping doesn't depend on who is at the other end, and everybody may send to it
// (RFC 4787 REQ-1 and section 5), as with ports of the block itself. It holds for
// IPv4 and IPv6 alike. A port that lies in the block already stays, if it is free.
//
// # Several servers
//
// Every server has a Table. New mappings are published, and those in use again from
// time to time, so that a server that sees only the packets that come back
// doesn't forget them. Two servers that see a flow's first packets at the same time
// most likely choose the same public port, since they begin to look at the same
// place; if not, the mapping made first wins and replaces the other everywhere.
//
// The package knows nothing of addresses, blocks and the registry, and starts no
// goroutines: whoever owns a Table calls Sweep every few seconds.
package nat

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// Mapping says that a client's inner port appears as a public port. For ICMP the
// ports are identifiers of queries.
type Mapping struct {
	Client        uint32
	Protocol      packet.Protocol
	Inner, Public uint16
	// Since is when it was made, unix time in nanoseconds.
	Since uint64
}

// Drop is a reason not to let a packet out.
type Drop uint8

// The reasons.
const (
	// Mapped is none: there is a mapping.
	Mapped Drop = iota
	// BadProtocol: neither TCP nor UDP nor ICMP.
	BadProtocol
	// NoPorts: the block is used up.
	NoPorts
	// ClientFull: the client has as many mappings as one may have.
	ClientFull
	// TableFull: there are as many mappings as there may be.
	TableFull
	// StrayReset: a TCP RST of a connection nobody knows.
	StrayReset

	// NumDrops is the number of values above.
	NumDrops = iota
)

var dropNames = [NumDrops]string{
	Mapped:      "mapped",
	BadProtocol: "bad_protocol",
	NoPorts:     "no_ports",
	ClientFull:  "client_full",
	TableFull:   "table_full",
	StrayReset:  "stray_reset",
}

// String is the reason's name as a metrics label.
func (d Drop) String() string {
	if int(d) < len(dropNames) {
		return dropNames[d]
	}
	return "unknown"
}

// Config is how to make a Table.
type Config struct {
	// Max is how many mappings there may be; 0 means DefaultMax.
	Max int
	// MaxPerClient is how many one client may have; 0 means DefaultMaxPerClient.
	MaxPerClient int
	// Publish is told mappings that other servers should Learn. It is called by
	// whoever calls Outward, Learn or Sweep, must not block, and may be nil.
	Publish func(Mapping)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

const (
	// DefaultMax is about 70 MB.
	DefaultMax = 1 << 19
	// DefaultMaxPerClient is a block of 1024 ports, for TCP, UDP and ICMP each, and
	// one more.
	DefaultMaxPerClient = 4096
)

// Table holds mappings. Safe for concurrent use; a client's mappings are all in one
// shard, so that servers' goroutines rarely meet.
type Table struct {
	cfg    Config
	start  time.Time
	size   atomic.Int64
	shards [numShards]shard

	drops                                       [NumDrops]atomic.Uint64
	created, learned, replaced, kept, reclaimed atomic.Uint64
	refused, expired, published, unknown        atomic.Uint64
}

const numShards = 64

// shard is a part of a Table. Its mutex is the only one; Publish is never called
// under it.
type shard struct {
	mu sync.Mutex
	// inner and public find a mapping by either of its ports. A mapping is in
	// both or in none.
	inner, public map[key]*entry
	count         map[uint32]int // mappings by client
	// full says until when it isn't worth looking through a block again, by its
	// first port.
	full map[key]time.Duration
}

// key is client ‖ protocol ‖ port.
type key uint64

func keyOf(client uint32, p packet.Protocol, port uint16) key {
	return key(client)<<24 | key(p)<<16 | key(port)
}

// Stats are a Table's numbers.
type Stats struct {
	// Mappings there are now.
	Mappings int
	// Created here; Learned from other servers; Replaced by an older one of
	// another server; Kept against a younger one; Reclaimed because a block was
	// full and nobody seemed to use them; Refused, because there was no room for
	// another server's; Expired.
	Created, Learned, Replaced, Kept, Reclaimed, Refused, Expired uint64
	// Published counts calls of Config.Publish.
	Published uint64
	// Unknown counts packets from outside to a port without a mapping.
	Unknown uint64
	// Drops counts packets by why they were not let out.
	Drops [NumDrops]uint64
}

// New returns an empty Table.
func New(cfg Config) *Table {
	if cfg.Max <= 0 {
		cfg.Max = DefaultMax
	}
	if cfg.MaxPerClient <= 0 {
		cfg.MaxPerClient = DefaultMaxPerClient
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &Table{cfg: cfg, start: cfg.Now()}
	for i := range t.shards {
		t.shards[i] = shard{
			inner: make(map[key]*entry), public: make(map[key]*entry),
			count: make(map[uint32]int), full: make(map[key]time.Duration),
		}
	}
	return t
}

// Outward is the public port for a packet that a client sends from an inner port:
// that of its mapping, or of a new one in the block first to last. A mapping that
// there is holds even if it is in another block of the client; so when the answer is
// NoPorts, the caller may try again with the next block, in the same order. flags
// are those of a TCP segment.
func (t *Table) Outward(client uint32, proto packet.Protocol, inner uint16, flags uint8, first, last uint16) (
	public uint16, why Drop,
) {
	if !mappable(proto) {
		t.drops[BadProtocol].Add(1)
		return 0, BadProtocol
	}
	wall := t.cfg.Now()
	now := wall.Sub(t.start)
	s := t.shard(client)
	s.mu.Lock()
	e := s.inner[keyOf(client, proto, inner)]
	if e != nil && now < e.deadline() {
		e.outward(flags, now)
		public = e.Public
		s.mu.Unlock()
		return public, Mapped
	}
	if e != nil {
		t.removeLocked(s, e)
		t.expired.Add(1)
	}
	if proto == packet.TCP && flags&packet.RST != 0 {
		s.mu.Unlock()
		t.drops[StrayReset].Add(1)
		return 0, StrayReset
	}
	m := Mapping{Client: client, Protocol: proto, Inner: inner, Since: uint64(wall.UnixNano())}
	e, why = t.createLocked(s, m, first, last, now)
	if why != Mapped {
		s.mu.Unlock()
		t.drops[why].Add(1)
		return 0, why
	}
	e.outward(flags, now)
	m = e.Mapping
	s.mu.Unlock()
	t.created.Add(1)
	t.publish(m)
	return m.Public, Mapped
}

// Inward is the inner port for a packet from outside to a client's public port, and
// false if there is no mapping.
func (t *Table) Inward(client uint32, proto packet.Protocol, public uint16, flags uint8) (inner uint16, ok bool) {
	if mappable(proto) {
		now := t.cfg.Now().Sub(t.start)
		s := t.shard(client)
		s.mu.Lock()
		if e := s.public[keyOf(client, proto, public)]; e != nil && now < e.deadline() {
			e.inward(flags, now)
			inner, ok = e.Inner, true
		}
		s.mu.Unlock()
	}
	if !ok {
		t.unknown.Add(1)
	}
	return inner, ok
}

// Public is the public port of an inner one, if there is a mapping, without using it:
// for what a client says about packets that came to it, in ICMP errors.
func (t *Table) Public(client uint32, proto packet.Protocol, inner uint16) (public uint16, ok bool) {
	now := t.cfg.Now().Sub(t.start)
	s := t.shard(client)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.inner[keyOf(client, proto, inner)]; e != nil && now < e.deadline() {
		return e.Public, true
	}
	return 0, false
}

// Forget removes a client's mappings to ports from first to last: for a client
// that is gone, or a block that it has lost.
func (t *Table) Forget(client uint32, first, last uint16) {
	s := t.shard(client)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[client] == 0 {
		return
	}
	for _, e := range s.inner {
		if e.Client == client && first <= e.Public && e.Public <= last {
			t.removeLocked(s, e)
		}
	}
}

// Stats are the numbers now.
func (t *Table) Stats() Stats {
	s := Stats{
		Mappings: int(t.size.Load()),
		Created:  t.created.Load(), Learned: t.learned.Load(), Replaced: t.replaced.Load(), Kept: t.kept.Load(),
		Reclaimed: t.reclaimed.Load(), Refused: t.refused.Load(), Expired: t.expired.Load(),
		Published: t.published.Load(), Unknown: t.unknown.Load(),
	}
	for i := range s.Drops {
		s.Drops[i] = t.drops[i].Load()
	}
	return s
}

func mappable(p packet.Protocol) bool {
	return p == packet.TCP || p == packet.UDP || p == packet.ICMPv4 || p == packet.ICMPv6
}

func (t *Table) shard(client uint32) *shard { return &t.shards[client%numShards] }

func (t *Table) publish(m Mapping) {
	if t.cfg.Publish != nil {
		t.published.Add(1)
		t.cfg.Publish(m)
	}
}
