// Package client is the client's engine: it keeps a session with a cluster
// alive over an outer socket and carries inner packets through it. It doesn't
// know what makes or takes those packets.
//
// The roads: packets from the netstack go Output → Seal → WriteBatch (send.go),
// packets from the network ReadBatch → Open → Config.Input (receive.go); the
// session's upkeep is control.go, with gap.go for times when nothing gets
// through and ports.go for port blocks besides the client's own. Three
// goroutines at most touch a Client: receiveLoop, controlLoop, and whoever calls
// Output; they meet in atomics and bounded channels, no locks.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// Config is what a client needs. All fields but KeepAlive, MTU, the On
// functions and Logger are required. The On functions are called one after
// another from the goroutine that keeps the session, and must not hold it up.
type Config struct {
	Conn      udp.Conn         // outer socket; Run closes it
	Servers   []netip.AddrPort // service addresses, tried in turn
	ServerKey session.PublicKey
	Key       session.PrivateKey
	KeepAlive time.Duration // proposed interval; 0: session.DefaultKeepAlive
	MTU       int           // proposed inner MTU, bytes; 0 leaves it to the server

	// Input takes opened inner packets, in order of arrival. They are valid
	// until it returns. It is called from one goroutine.
	Input func(pkts [][]byte)
	// OnSession is called after every handshake, before packets of the new
	// session are sent.
	OnSession func(Session)
	// OnSuspect tells that it isn't known whether anything gets through (true),
	// and that something does again (false). It isn't told twice in a row.
	OnSuspect func(bool)
	// OnGap tells that packets flow again after a time in which none did. It is
	// called between OnSuspect(true) and OnSuspect(false).
	OnGap func(Gap)
	// OnPorts gives all port blocks that the client has leased besides its own,
	// whenever they have changed.
	OnPorts func([]PortRange)
	Logger  *slog.Logger // nil discards
}

// Gap is a time in which nothing was received although it should have been.
type Gap struct {
	Length        time.Duration // from the last message before it, or the first that wasn't answered, to the first after it
	Before, After uint16        // numbers of the servers that those came from
}

// PortRange is a range of the client's ports, both ends included.
type PortRange struct {
	First, Last uint16
	Public      netip.Addr // IPv4 address that packets from them have outside; the zero Addr: none
}

// Session is what the cluster granted.
type Session struct {
	Number              uint32 // client number
	Server              uint16 // number of the server that answered
	Addresses, Gateways [2]netip.Addr
	Public              [2]netip.Addr // what the world sees, IPv4 and IPv6; the zero Addr: not told
	MTU                 int
	FirstPort, LastPort uint16 // the client's ports
	PublicPort          bool   // the Internet can reach them
	KeepAlive           time.Duration
	Cipher              wire.Cipher
}

// Status is a snapshot for people and metrics.
type Status struct {
	Session       Session
	Connected     bool           // there is a session, and something was heard within two intervals
	Endpoint      netip.AddrPort // service address in use
	Observed      netip.AddrPort // our outer endpoint as the server sees it
	RTT           time.Duration  // of the last answered keep-alive
	SessionSince  time.Time
	LastReceived  time.Time
	Handshakes    uint64 // that succeeded
	ServerChanges uint64 // times that packets began to come from another server
	Suspect       bool   // something was asked for, and nothing has come yet
	Gaps          uint64 // that have ended
	LastGap       Gap
	LastGapEnd    time.Time // zero without any
	LongestGap    time.Duration
	Ports         []PortRange // leased besides those of the session
}

// active is a session in use.
type active struct {
	*session.Granted
	to        udp.Endpoint
	keepAlive time.Duration
}

// Client is one client. Its methods are safe for concurrent use.
type Client struct {
	cfg      Config
	log      *slog.Logger
	interval uint16 // proposed keep-alive, seconds

	current  atomic.Pointer[active]
	previous atomic.Pointer[active] // still opened, never sealed with

	began          time.Time    // what moment counts from
	sent, received atomic.Int64 // moments of the last message each way
	packet         atomic.Int64 // and of the last received one with an inner packet
	waiting        atomic.Int64 // and of the first inner packet sent since received; 0: none was
	watched        atomic.Bool  // controlLoop knows that packets come or go
	suspect        atomic.Bool  // controlLoop wants to be woken by the next message
	moved          atomic.Bool  // the last answered keep-alive came another way than what was before it
	answering      atomic.Uint32
	reaches        uint16        // server that answered the last keep-alive; receiveLoop's
	steady         int           // and how many more it answered before, up to steadyAfter
	resumed        atomic.Uint32 // server that ended the suspicion
	rtt, smooth    atomic.Int64
	observed       atomic.Pointer[netip.AddrPort]
	gaps           atomic.Pointer[gaps]
	ports          atomic.Pointer[[]PortRange]
	handshakes     atomic.Uint64
	changes        atomic.Uint64
	counters       counters
	token          atomic.Uint64 // of the newest keep-alive: the moment it was sent
	tokened        uint64        // of the newest one that was answered; receiveLoop's

	// control carries copies of handshake messages from receiveLoop to
	// controlLoop. When it is full the newest is dropped and counted: the
	// attempt's own retry makes up for it.
	control chan []byte
	// answers carries what servers say about port blocks, with the same policy:
	// the request is repeated.
	answers chan wire.Ports
	// refused: the server has said that it no longer knows us; wake: packets come
	// or go; more: ports are used up.
	refused, wake, more chan struct{}
}

// New checks the configuration and returns a client that does nothing until Run.
func New(cfg Config) (*Client, error) {
	if cfg.Conn == nil || cfg.Input == nil || len(cfg.Servers) == 0 {
		return nil, errors.New("client: Conn, Input and Servers are required")
	}
	if cfg.ServerKey == (session.PublicKey{}) || cfg.Key == (session.PrivateKey{}) {
		return nil, errors.New("client: ServerKey and Key are required")
	}
	if cfg.KeepAlive == 0 {
		cfg.KeepAlive = session.DefaultKeepAlive
	}
	if cfg.KeepAlive < session.MinKeepAlive || cfg.KeepAlive > session.MaxKeepAlive {
		return nil, fmt.Errorf("client: keep-alive interval must lie between %v and %v", session.MinKeepAlive, session.MaxKeepAlive)
	}
	if cfg.MTU != 0 && (cfg.MTU < wire.MinMTU || cfg.MTU > 65535-wire.Overhead-48) {
		return nil, fmt.Errorf("client: inner MTU must be at least %d", wire.MinMTU)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{
		cfg: cfg, log: cfg.Logger, interval: uint16(cfg.KeepAlive / time.Second),
		began:   time.Now(),
		control: make(chan []byte, 16), answers: make(chan wire.Ports, 4),
		refused: make(chan struct{}, 1), wake: make(chan struct{}, 1), more: make(chan struct{}, 1),
	}, nil
}

// Run keeps the session until ctx ends, tells the server that the client
// leaves, and closes the outer socket. It returns nil then, and an error when
// the socket fails.
func (c *Client) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() { cancel(c.receiveLoop()) })
	c.controlLoop(ctx)
	c.leave()
	err := c.cfg.Conn.Close()
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return fmt.Errorf("outer socket: %w", cause)
	}
	return err
}

func notify(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default: // one is waiting already
	}
}

// Status returns a snapshot.
func (c *Client) Status() Status {
	s := Status{
		RTT: time.Duration(c.rtt.Load()), Handshakes: c.handshakes.Load(), ServerChanges: c.changes.Load(),
	}
	if p := c.observed.Load(); p != nil {
		s.Observed = *p
	}
	s.Suspect = c.suspect.Load()
	if g := c.gaps.Load(); g != nil {
		s.Gaps, s.LastGap, s.LastGapEnd, s.LongestGap = g.count, g.last, g.end, g.longest
	}
	if p := c.ports.Load(); p != nil {
		s.Ports = slices.Clone(*p)
	}
	s.LastReceived = c.time(c.received.Load())
	if a := c.current.Load(); a != nil {
		s.Session = a.session()
		if n := c.answering.Load(); n != 0 {
			s.Session.Server = uint16(n)
		}
		s.Endpoint = a.to.Addr
		s.SessionSince = a.Made
		heard := a.Made
		if s.LastReceived.After(heard) {
			heard = s.LastReceived
		}
		s.Connected = time.Since(heard) < 2*a.keepAlive
	}
	return s
}

func (a *active) session() Session {
	return Session{
		Number: a.Grant.Client, Server: a.Server, MTU: int(a.MTU),
		Addresses: [2]netip.Addr{netip.AddrFrom4(a.IPv4), netip.AddrFrom16(a.IPv6)},
		Gateways:  [2]netip.Addr{netip.AddrFrom4(a.Gateway4), netip.AddrFrom16(a.Gateway6)},
		Public:    [2]netip.Addr{unlessZero(netip.AddrFrom4(a.Public4)), unlessZero(netip.AddrFrom16(a.Public6))},
		FirstPort: a.FirstPort, LastPort: a.LastPort, PublicPort: a.PublicPort,
		KeepAlive: a.keepAlive, Cipher: a.Grant.Cipher,
	}
}

// moment is now, in nanoseconds since the client was made and never 0. It is
// monotonic, so that a clock that is set doesn't look like a silence.
func (c *Client) moment() int64 { return max(1, int64(time.Since(c.began))) }

// time turns a moment into a time; 0 is the zero Time.
func (c *Client) time(moment int64) time.Time {
	if moment == 0 {
		return time.Time{}
	}
	return c.began.Add(time.Duration(moment))
}

// unlessZero turns the protocol's "none" into Go's.
func unlessZero(a netip.Addr) netip.Addr {
	if a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// jitter needs no secrecy: it only spreads retries.
func jitter() float64 { return rand.Float64() }
