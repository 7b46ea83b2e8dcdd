// Package registry shares between the servers of a cluster what can't be
// computed: where each client was last heard, which replay counters were seen,
// the few NAT entries that aren't arithmetic, and who holds a server number or a
// further port block.
//
// The road:
//
//	engine → Publish* (never waits) → Outbox → engine of messages → Handler of every other server
//	engine → Claim (asks an arbiter) → Claimed/Released at every server
//
// A server that starts, or was cut off, gets what it missed from any other one's
// Handler.Snapshot. Losing the registry never stops packets: servers go on from
// what they know.
//
//	registry.go  what is shared, the interface
//	codec.go     its bytes;  seal.go  their authentication
//	outbox.go    what waits to be published
//	stats.go     counters: the bytes of synchronisation
//	memory.go    one server alone
//	hub.go       several servers of one process
//
// Package nats, below, is the one for real clusters. Lock order: a Hub's before
// those of its members.
package registry

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

var (
	// ErrTaken says that somebody else holds what was claimed or released.
	ErrTaken = errors.New("claimed by another")
	// ErrUnavailable says that nobody can decide on claims now: no engine, or
	// no majority of its servers.
	ErrUnavailable = errors.New("registry unavailable")
	// ErrClosed says that the registry was closed.
	ErrClosed = errors.New("registry closed")
)

// Location is where a client was last heard.
type Location struct {
	Client  uint32
	Session uint64 // id, as in data headers
	Epoch   byte   // as in data headers
	// Counter is that of the client's newest message. It orders all Locations
	// of a client: sessions that begin later have higher counters, since those
	// begin at the wall clock.
	Counter  uint64
	Endpoint netip.AddrPort // the client's outer endpoint
	Local    netip.AddrPort // the service address and port that it sends to
	Server   uint16         // number of the server that heard it
	Left     bool           // the client said goodbye
}

// Newer says whether l replaces old. A goodbye has the counter of a message of
// its own, so nothing is newer than an equal.
func (l Location) Newer(old Location) bool { return l.Counter > old.Counter }

// Seen says that a client was heard lately, with this counter: also the
// watermark below which its messages are replays.
type Seen struct {
	Client  uint32
	Counter uint64
}

// Mapping is an entry of the NAT table: the client's inner port is seen as the
// public port.
type Mapping struct {
	Client        uint32
	Protocol      byte // IP protocol number
	Inner, Public uint16
	Since         uint64 // nanoseconds since 1970 UTC; the lower one wins
}

// Kind is what a Claim is about.
type Kind byte

// The kinds of claims.
const (
	ClaimBlock  Kind = 1 // Index: a port block; Owner: the client that leases it
	ClaimServer Kind = 2 // Index: a server number; Owner: random, the server's
)

// String is the kind's name in keys, logs and metrics.
func (k Kind) String() string {
	switch k {
	case ClaimBlock:
		return "block"
	case ClaimServer:
		return "server"
	}
	return fmt.Sprintf("kind%d", byte(k))
}

// Claim is a lease of something that only one may have.
type Claim struct {
	Kind         Kind
	Index, Owner uint32
	Until        time.Time // to the nanosecond, without monotonic reading; it may be taken over afterwards
}

// MaxClaim bounds the life of a claim. An engine forgets what nobody renewed for
// longer.
const MaxClaim = 24 * time.Hour

// Handler is the server's engine. Its methods are called from the registry's
// goroutines, must be quick and safe for concurrent use, and may call Publish*.
// Nothing that is delivered need be new: the receiver compares counters.
type Handler interface {
	Location(Location)
	Seen([]Seen) // the slice isn't to be changed, nor kept
	Mapping(Mapping)
	// Claimed tells of a claim of any server, this one included. It ends at
	// Until without further notice.
	Claimed(Claim)
	// Released tells of a claim that was given back before its end.
	Released(Claim)
	// Snapshot yields everything that this server knows, for one that starts,
	// until yield returns false.
	Snapshot(yield func(Location) bool)
	// Mappings is Snapshot for the NAT table.
	Mappings(yield func(Mapping) bool)
}

// Registry is one server's end of the registry. Safe for concurrent use.
type Registry interface {
	// Run delivers to h until ctx ends or the registry is closed, and returns
	// ctx's error or ErrClosed after all of its goroutines have ended. It
	// reconnects for ever: an unreachable engine is no error. Call it once.
	Run(ctx context.Context, h Handler) error

	// PublishLocation and its kin tell the other servers. They never wait: what
	// can't be sent now is kept within bounds, for each client the newest, and
	// the rest dropped and counted. They don't keep the slice.
	PublishLocation(Location)
	PublishSeen([]Seen)
	PublishMapping(Mapping)

	// Claim takes what is free or expired, or renews what c.Owner holds, until
	// c.Until. It returns the claim that stands now: c, or with ErrTaken the
	// other one's. ErrUnavailable: nobody can decide now.
	Claim(ctx context.Context, c Claim) (Claim, error)
	// Release gives back what c.Owner holds. Not to hold it is no error, unless
	// another does (ErrTaken).
	Release(ctx context.Context, c Claim) error

	Ready() error // nil: connected, what is published now is sent now
	Stats() Stats
	// Close ends Run and frees everything. It may be called again.
	Close() error
}

// Check says what is wrong with a claim, nil if it may be asked for.
func (c Claim) Check(now time.Time) error {
	switch {
	case c.Kind != ClaimBlock && c.Kind != ClaimServer:
		return fmt.Errorf("claim of unknown %s", c.Kind)
	case !c.Until.After(now):
		return fmt.Errorf("claim of %s %d has ended already", c.Kind, c.Index)
	case c.Until.Sub(now) > MaxClaim:
		return fmt.Errorf("claim of %s %d for more than %v", c.Kind, c.Index, MaxClaim)
	}
	return nil
}
