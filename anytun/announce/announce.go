// Package announce tells the routers next to a server that the cluster's
// anycast addresses are reached through it, as long as that is true: BGP to
// every peer, with BFD where the peer has it, and a command of the operator's
// for those with a routing daemon of their own.
//
// The road of a decision, file by file: health.go turns the results of a check
// into "healthy" or not; announce.go, here, joins that with draining and the
// end of the program to one wish, "announce" or "withdraw"; bgp.go and hook.go
// carry it out. nexthop.go finds out what the routers shall send packets to,
// log.go brings the BGP engine's words into the program's log.
//
// A dead server's routes must go at once, so nothing here asks a router to keep
// them: no graceful restart (RFC 4724), a short hold time (RFC 4271), BFD (RFC
// 5880). The kernel closes the session of a killed process, which is the
// fastest of all.
//
// The package knows nothing of tunnels. It takes in no routes: what peers send
// is refused, though the engine keeps a copy, so let a router send a server
// nothing. The engine keeps settings in package variables of its own, which two
// Announcers running in one process would write at the same time.
package announce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Config says what to announce to whom. New fills in the defaults.
type Config struct {
	// RouterID is the BGP identifier, an IPv4 address, which no two servers
	// may share: never the anycast address. Zero: the address from which the
	// first IPv4 peer is reached.
	RouterID netip.Addr
	// AS is this server's autonomous system. A peer with the same number is
	// an internal one.
	AS    uint32
	Peers []Peer
	// Prefixes are what is announced, IPv4 and IPv6, all of it over every
	// session.
	Prefixes []netip.Prefix
	// ListenPort is the TCP port on which peers may open the session; 0 for
	// none: then this side opens all of them.
	ListenPort uint16
	// HoldTime, in whole seconds, 3 at least: a peer that hears nothing for so
	// long drops the routes. Default 9 s.
	HoldTime time.Duration
	// ConnectRetry, in whole seconds, 2 at least, is how often an unreachable
	// peer is tried. Default 2 s.
	ConnectRetry time.Duration
	// BFDInterval is how often BFD speaks, 10 ms at least and 200 ms where it is
	// zero; after BFDMultiplier (default 3) silent ones a peer takes this
	// server for dead. A busy host needs slack: Go's scheduler has to run.
	BFDInterval   time.Duration
	BFDMultiplier uint8

	// Check tells whether this server serves: nil is well. It must end when
	// its context does, which is after Timeout. Without a Check the server
	// counts as healthy. It is never called twice at once.
	Check func(context.Context) error
	// Interval from the start of one check to the next, default 1 s; Timeout
	// of one, default Interval.
	Interval, Timeout time.Duration
	// Fall failures in a row withdraw (default 3), then Rise successes in a row
	// announce again (default 2). At the start one success is enough.
	Fall, Rise int

	// Hook is a shell command that is run with "announce" or "withdraw" as its
	// last argument. Its environment is PATH, ANYTUN_ACTION (the same word),
	// ANYTUN_PREFIXES (separated by spaces) and ANYTUN_REASON.
	Hook string
	// HookTimeout is when a hook is killed; default 10 s.
	HookTimeout time.Duration

	Logger *slog.Logger // nil: discard
}

// Peer is a router to announce to.
type Peer struct {
	Addr netip.Addr
	AS   uint32
	// Port is the peer's TCP port; default 179.
	Port uint16
	// Local is the address to speak from; zero leaves it to the kernel.
	Local netip.Addr
	// Password for TCP MD5 (RFC 2385), 80 bytes at most.
	Password string `json:"-"`
	// BFD asks for BFD over one hop (RFC 5881); the peer has to have it too.
	BFD bool
	// Multihop is the number of hops an external peer may be away, 0 for a
	// direct neighbour.
	Multihop uint8
	// NextHop is where the peer shall send packets for prefixes of the family
	// that Addr is not of. Zero: an address of the interface by which the
	// peer is reached, and failing that, the session's own address for IPv4
	// prefixes on an IPv6 session (RFC 8950, the peer has to allow it).
	NextHop netip.Addr
}

// String names the peer, without its password.
func (p Peer) String() string { return fmt.Sprintf("%s@%d", p.Addr, p.AS) }

// GoString keeps the password out of %#v as well.
func (p Peer) GoString() string { return p.String() }

// LogValue keeps the password out of logs.
func (p Peer) LogValue() slog.Value { return slog.StringValue(p.String()) }

// Status is what an Announcer is doing. Its zero value is one that doesn't run.
type Status struct {
	// Announcing: peers are told, as far as their sessions are up.
	Announcing bool
	Since      time.Time // of Announcing's last change
	// Healthy is the check's verdict, and Why the error of the last check that
	// failed, or what keeps the BGP engine from starting.
	Healthy  bool
	Why      string
	Draining bool
	Peers    []PeerStatus // in Config's order
	// Hook is the error of the newest run of the hook, if it failed.
	Hook string
}

// PeerStatus is the state of one session.
type PeerStatus struct {
	Addr netip.Addr
	AS   uint32
	// State: "idle", "connect", "active", "opensent", "openconfirm",
	// "established", or "waiting" while there is no session to speak of.
	State string
	// Since is when an established session came up, or when it was lost, to
	// the second; zero if it never was there.
	Since time.Time
	// Announced is how many prefixes the peer was told.
	Announced int
	// BFD: "up", "init", "down", empty where it wasn't asked for.
	BFD string
	// Why says what a waiting peer waits for.
	Why string
}

// Announcer announces. Its methods are safe for concurrent use.
type Announcer struct {
	cfg Config
	log *slog.Logger
	bgp *engine // nil without peers
	hk  *hook   // nil without a hook

	drain     chan struct{} // closed by Drain
	drainOnce sync.Once
	ran       sync.Once

	mu     sync.Mutex
	status Status // without Peers and Hook, which are asked for
}

// New checks the configuration. Nothing is sent before Run.
func New(cfg Config) (*Announcer, error) {
	if err := cfg.fill(); err != nil {
		return nil, fmt.Errorf("announce: %w", err)
	}
	a := &Announcer{cfg: cfg, log: cfg.Logger, drain: make(chan struct{})}
	if len(cfg.Peers) > 0 {
		a.bgp = newEngine(&a.cfg)
	}
	if cfg.Hook != "" {
		a.hk = newHook(cfg.Hook, cfg.Prefixes, cfg.HookTimeout, cfg.Logger)
	}
	return a, nil
}

// fill checks what was given and sets what wasn't.
func (c *Config) fill() error {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Peers = slices.Clone(c.Peers)
	c.Prefixes = slices.Clone(c.Prefixes)
	if len(c.Prefixes) == 0 {
		return errors.New("no prefixes to announce")
	}
	for i, p := range c.Prefixes {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fmt.Errorf("prefix %s is not valid", p)
		}
		if p != p.Masked() {
			return fmt.Errorf("prefix %s has bits set behind its length; %s is meant?", p, p.Masked())
		}
		if slices.Contains(c.Prefixes[:i], p) {
			return fmt.Errorf("prefix %s is there twice", p)
		}
	}
	if len(c.Peers) == 0 && c.Hook == "" {
		return errors.New("nobody to announce to: neither peers nor a hook")
	}
	if c.RouterID.IsValid() && (!c.RouterID.Is4() || c.RouterID.IsUnspecified()) {
		return fmt.Errorf("router id %s is not an IPv4 address", c.RouterID)
	}
	if len(c.Peers) > 0 && c.AS == 0 {
		return errors.New("no AS number of our own")
	}
	if !c.RouterID.IsValid() && len(c.Peers) > 0 &&
		!slices.ContainsFunc(c.Peers, func(p Peer) bool { return p.Addr.Is4() }) {
		return errors.New("no router id, and no IPv4 peer to take it from")
	}
	for i, p := range c.Peers {
		if err := p.check(c.AS); err != nil {
			return fmt.Errorf("peer %s: %w", p, err)
		}
		if slices.ContainsFunc(c.Peers[:i], func(o Peer) bool { return o.Addr == p.Addr }) {
			return fmt.Errorf("peer %s is there twice", p.Addr)
		}
	}
	// Whole seconds are what BGP and its engine count in; the bounds are RFC
	// 4271's, section 4.2, and the engine's.
	seconds := func(what string, d *time.Duration, least, unset time.Duration) error {
		if *d == 0 {
			*d = unset
		}
		if *d < least || *d > time.Hour || *d%time.Second != 0 {
			return fmt.Errorf("%s of %s is not a number of seconds from %s up", what, *d, least)
		}
		return nil
	}
	if err := seconds("hold time", &c.HoldTime, 3*time.Second, 9*time.Second); err != nil {
		return err
	}
	if err := seconds("connect retry", &c.ConnectRetry, 2*time.Second, 2*time.Second); err != nil {
		return err
	}
	for _, d := range []struct {
		what         string
		value        *time.Duration
		least, unset time.Duration
	}{
		{"bfd interval", &c.BFDInterval, 10 * time.Millisecond, 200 * time.Millisecond},
		{"check interval", &c.Interval, 10 * time.Millisecond, time.Second},
		{"hook timeout", &c.HookTimeout, 10 * time.Millisecond, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.unset
		}
		if *d.value < d.least || *d.value > time.Hour {
			return fmt.Errorf("%s of %s is not between %s and 1h", d.what, *d.value, d.least)
		}
	}
	if c.Timeout == 0 {
		c.Timeout = c.Interval
	}
	if c.BFDMultiplier == 0 {
		c.BFDMultiplier = 3
	}
	if c.Fall == 0 {
		c.Fall = 3
	}
	if c.Rise == 0 {
		c.Rise = 2
	}
	if c.Timeout < 0 || c.Fall < 0 || c.Rise < 0 {
		return errors.New("timeout, fall and rise can't be negative")
	}
	return nil
}

func (p Peer) check(as uint32) error {
	switch {
	case !p.Addr.IsValid() || p.Addr.IsUnspecified() || p.Addr.IsMulticast() || p.Addr.Is4In6():
		return errors.New("no address of a router")
	case p.Addr.Zone() != "" || p.Addr.IsLinkLocalUnicast() && p.Addr.Is6():
		return errors.New("a link-local address can't be used")
	case p.AS == 0:
		return errors.New("no AS number")
	case p.Local.IsValid() && p.Local.Is4() != p.Addr.Is4():
		return fmt.Errorf("local address %s is of the other family", p.Local)
	case p.NextHop.IsValid() && p.NextHop.Is4() == p.Addr.Is4():
		return fmt.Errorf("next hop %s is of the session's own family, whose next hop is the local address", p.NextHop)
	case len(p.Password) > 80:
		return errors.New("password longer than 80 bytes")
	case p.BFD && p.Multihop > 0:
		return errors.New("bfd works with direct neighbours only")
	case p.Multihop > 0 && p.AS == as:
		return errors.New("multihop is for external peers, internal ones may be anywhere")
	}
	return nil
}

// Run announces while the server is healthy, until ctx ends; then it withdraws,
// waits until that is sent (for a second at most), ends the sessions, and
// returns when all that it started has ended. It can be called once.
//
// A peer or port that can't be had is no error: it is tried again, logged, and
// in the Status. The error is nil unless the engine can't be ended.
func (a *Announcer) Run(ctx context.Context) error {
	err := errors.New("announce: already run")
	a.ran.Do(func() { err = a.run(ctx) })
	return err
}

func (a *Announcer) run(ctx context.Context) error {
	if a.hk != nil {
		go a.hk.loop()
	}
	h := health{fall: a.cfg.Fall, rise: a.cfg.Rise}
	results := make(chan error, 1) // one check at a time, so its sender never waits
	var started time.Time          // of the check that is under way
	checking := false
	check := func() {
		switch {
		case a.cfg.Check == nil:
			h.result(nil)
		case !checking:
			checking, started = true, time.Now()
			go a.checkOnce(ctx, results)
		case time.Since(started) > a.cfg.Timeout:
			h.result(errHung) // each interval, though nothing more can be started
		}
	}
	tick := time.NewTicker(a.cfg.Interval)
	defer tick.Stop()
	turns := time.NewTicker(turnInterval)
	defer turns.Stop()
	check()
	for drain := a.drain; ctx.Err() == nil; {
		a.apply(&h)
		select {
		case <-ctx.Done():
		case err := <-results:
			checking = false
			h.result(err)
		case <-drain:
			drain = nil // apply sees what Drain has set
		case <-tick.C:
			check()
		case <-turns.C: // apply gives the engine its turn
		}
	}

	a.wish(false, "shutting down")
	var err error
	if a.bgp != nil {
		if err = a.bgp.stop(); err != nil {
			err = fmt.Errorf("announce: %w", err)
		}
	}
	if a.hk != nil {
		a.hk.end()
	}
	if checking {
		<-results
	}
	return err
}

// turnInterval is how often the engine looks after its sessions.
const turnInterval = 500 * time.Millisecond

var errHung = errors.New("check hangs")

// checkOnce runs one check and reports on it.
func (a *Announcer) checkOnce(ctx context.Context, results chan<- error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Timeout)
	defer cancel()
	err := a.cfg.Check(ctx)
	if err == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("check took longer than %s", a.cfg.Timeout)
	}
	results <- err
}

// apply makes what is announced follow health and draining, and gives the
// engine its turn to try again what failed.
func (a *Announcer) apply(h *health) {
	a.mu.Lock()
	if a.status.Healthy != h.healthy {
		a.status.Healthy = h.healthy
		if h.healthy {
			a.log.Info("self-check passes")
		} else {
			a.log.Warn("self-check fails", "err", h.why)
		}
	}
	a.status.Why = ""
	if h.why != nil {
		a.status.Why = h.why.Error()
	}
	draining := a.status.Draining
	a.mu.Unlock()

	switch {
	case draining:
		a.wish(false, "draining")
	case h.healthy:
		a.wish(true, "healthy")
	case h.known:
		a.wish(false, a.status.Why)
	}
	if a.bgp != nil {
		a.bgp.turn()
	}
}

// wish announces or withdraws, if that is a change.
func (a *Announcer) wish(announce bool, why string) {
	a.mu.Lock()
	first := a.status.Since.IsZero()
	change := first || a.status.Announcing != announce
	if change {
		a.status.Announcing, a.status.Since = announce, time.Now()
	}
	a.mu.Unlock()
	if !change {
		return
	}
	if announce {
		a.log.Info("announcing", "prefixes", joined(a.cfg.Prefixes), "why", why)
	} else {
		a.log.Info("withdrawing", "prefixes", joined(a.cfg.Prefixes), "why", why)
	}
	if a.hk != nil {
		a.hk.wish(announce, why)
	}
	if a.bgp != nil {
		a.bgp.wish(announce)
	}
}

func joined(prefixes []netip.Prefix) string {
	var b strings.Builder
	for i, p := range prefixes {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(p.String())
	}
	return b.String()
}

// Drain withdraws for good: health no longer matters, and sessions stay up
// until Run's context ends. It doesn't wait.
func (a *Announcer) Drain() {
	a.drainOnce.Do(func() {
		a.mu.Lock()
		a.status.Draining = true
		a.mu.Unlock()
		a.log.Info("draining")
		close(a.drain)
	})
}

// Status tells what is announced and how the sessions are.
func (a *Announcer) Status() Status {
	a.mu.Lock()
	s := a.status
	a.mu.Unlock()
	if a.bgp != nil {
		s.Peers = a.bgp.peers()
		if why := a.bgp.trouble(); why != "" {
			s.Why = why
		}
	}
	if a.hk != nil {
		s.Hook = a.hk.trouble()
	}
	return s
}
