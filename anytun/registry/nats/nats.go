// Package nats is the registry of a real cluster: a NATS server inside each
// anytun-server, all of them connected by routes, or an existing NATS.
//
//	Publish* → Outbox → sendLoop → bus.ID ──NATS──→ busLoop → Handler
//	                                hello ────────→ peers: who is there, what did I miss → syncLoop
//	answerLoop ← ask.ID ←─────────────────────────────────────────────────────────────────── asks
//	Claim → JetStream key-value bucket → watchLoop → Handler
//
// Locations, Seen and Mappings go over plain publish and subscribe: no majority,
// no leader, so the death of servers can't hold them up. Each server numbers its
// messages, and says the last number with every hello; whoever notices a gap, or
// a server that wasn't there before, asks that server for what it heard itself.
// One that starts, was disconnected, or met at least as many as it knew, asks one
// other for everything, since a dead server's clients are known only so.
//
// Claims alone need a majority of the servers, or an arbiter would be two. A
// server that is alone in its cluster forwards but can't claim.
//
//	nats.go    configuration, life and death
//	engine.go  the NATS server inside;  tls.go  who may be its neighbour
//	bus.go     sendLoop, busLoop
//	peers.go   who is there, and what is missing
//	sync.go    syncLoop, answerLoop: snapshots
//	claims.go  Claim, Release, watchLoop
//
// Everything of ours on the bus is sealed with the cluster's secret. A stranger
// on an external bus can hold messages back or delete claims, but not make any.
//
// Lock order: none holds two.
package nats

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/anytun-go/anytun/anytun/registry"
)

// Config says which NATS, and who may listen.
type Config struct {
	// URL of an existing NATS, nats:// or tls://, several separated by commas;
	// user and password may be in it. Credentials names a file instead.
	URL, Credentials string

	// Listen is host:port for the other servers' routes. With it a NATS server
	// runs inside, and URL must be empty. Join are the other servers' host:port.
	// They should be all servers of the cluster, the same list everywhere: its
	// length tells how many are a majority before the servers have met.
	Listen string
	Join   []string
	// Advertise is the host:port that other servers hear of for this one; empty:
	// the address that its connections come from, which must not be an anycast
	// address.
	Advertise string
	// ServerName is unique in the cluster and must stay the same over restarts,
	// like StoreDir, where the claims are. Both are for Listen.
	ServerName, StoreDir string

	// ClusterName keeps clusters on one NATS apart; default "anytun". Letters,
	// digits, - and _.
	ClusterName string
	// Secret of the cluster, any length: seals messages, and lets routes in.
	Secret string
	Logger *slog.Logger // nil: discard
}

// Timing of the protocol between servers; fields of Bus for the tests.
const (
	helloInterval = 5 * time.Second
	// A server that wasn't heard for this many intervals is gone.
	helloFall = 3
	// Appearing servers are gathered for a moment, so that who meets many asks
	// one of them for everything.
	syncDelay = 300 * time.Millisecond
	// How long one step of a snapshot may take before another server is asked.
	stepTimeout = 5 * time.Second
	// Claim's own limit; an election takes less than ten seconds.
	claimTimeout = 5 * time.Second
	// How often the claims are read anew.
	watchInterval = 5 * time.Minute
)

var nameOK = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)

// Bus is one server's end. It implements registry.Registry.
type Bus struct {
	logger   *slog.Logger
	prefix   string // of all subjects
	bucket   string
	id       uint64 // random, this start's
	started  time.Time
	sealer   *registry.Sealer
	counters registry.Counters
	outbox   *registry.Outbox
	engine   *engine // nil: external
	conn     *nats.Conn
	js       jetstream.JetStream
	gone     chan struct{} // closed when conn's last callback returned

	helloInterval, stepTimeout, watchInterval time.Duration

	server      atomic.Uint32 // our number, as far as PublishLocation tells; 0: unknown
	reconnected chan struct{} // 1: for sendLoop
	rewatch     chan struct{} // 1: for watchLoop
	helloNow    chan struct{} // 1: somebody new wants to know us
	peers       peers
	wanted      wanted
	recent      recentMappings

	bucketTurn chan struct{}      // 1: who looks for the bucket or makes it
	kv         jetstream.KeyValue // whose turn it is; nil: not found yet

	mu      sync.Mutex
	closed  bool
	running bool
	cancel  context.CancelFunc // of Run
	ran     chan struct{}      // closed when Run returned
}

var _ registry.Registry = (*Bus)(nil)

// New starts the NATS server if it is to be inside, and connects. That the
// engine can't be reached is no error; wrong configuration is, and a port or
// directory that can't be used.
func New(c Config) (*Bus, error) {
	if c.ClusterName == "" {
		c.ClusterName = "anytun"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	sealer, err := registry.NewSealer([]byte(c.Secret))
	if err != nil {
		return nil, err
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	b := &Bus{
		logger: c.Logger, prefix: "anytun." + c.ClusterName + ".", bucket: "anytun_" + c.ClusterName,
		id: binary.BigEndian.Uint64(id[:]), started: time.Now(), sealer: sealer,
		gone: make(chan struct{}), reconnected: make(chan struct{}, 1), rewatch: make(chan struct{}, 1),
		helloNow: make(chan struct{}, 1), bucketTurn: make(chan struct{}, 1), ran: make(chan struct{}),
		helloInterval: helloInterval, stepTimeout: stepTimeout, watchInterval: watchInterval,
		wanted: wanted{own: make(map[uint64]bool), wake: make(chan struct{}, 1)},
	}
	b.peers.byID = make(map[uint64]*peer)
	b.outbox = registry.NewOutbox(&b.counters)
	if c.Listen != "" {
		if b.engine, err = startEngine(c); err != nil {
			return nil, fmt.Errorf("start cluster: %w", err)
		}
	}
	if err := b.connect(c); err != nil {
		b.engine.stop()
		return nil, fmt.Errorf("registry %w", err)
	}
	return b, nil
}

func (c *Config) check() error {
	switch {
	case c.Secret == "":
		return errors.New("registry without a secret")
	case (c.URL == "") == (c.Listen == ""):
		return errors.New("registry: either an address to listen on or the url of an existing nats")
	case !nameOK.MatchString(c.ClusterName):
		return fmt.Errorf("registry: cluster name %q: letters, digits, - and _, at most 32", c.ClusterName)
	case c.Listen == "":
		return nil
	case !nameOK.MatchString(c.ServerName):
		return fmt.Errorf("registry: server name %q: letters, digits, - and _, at most 32", c.ServerName)
	case c.StoreDir == "":
		return errors.New("registry: no directory for the claims")
	}
	return nil
}

func (b *Bus) connect(c Config) (err error) {
	options := []nats.Option{
		nats.Name("anytun " + c.ServerName),
		nats.NoEcho(),
		nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.IgnoreAuthErrorAbort(),
		nats.ReconnectWait(500 * time.Millisecond), nats.ReconnectJitter(500*time.Millisecond, 500*time.Millisecond),
		nats.Timeout(3 * time.Second),
		// A host that vanished is noticed in 15 s; one whose process died, at once.
		nats.PingInterval(5 * time.Second), nats.MaxPingsOutstanding(2),
		// What can't be sent stays in the Outbox, where the newest wins.
		nats.ReconnectBufSize(-1),
		nats.ConnectHandler(func(*nats.Conn) { b.connected(false) }),
		nats.ReconnectHandler(func(*nats.Conn) { b.connected(true) }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { b.disconnected(err) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			b.logger.Debug("registry connection", "error", err)
		}),
		nats.ClosedHandler(func(*nats.Conn) { close(b.gone) }),
	}
	url := c.URL
	if b.engine != nil {
		url = ""
		options = append(options, nats.InProcessServer(b.engine.server), nats.UserInfo(engineUser, b.engine.password))
	}
	if c.Credentials != "" {
		options = append(options, nats.UserCredentials(c.Credentials))
	}
	if b.conn, err = nats.Connect(url, options...); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if b.js, err = jetstream.New(b.conn); err != nil {
		b.conn.Close()
		<-b.gone
	}
	return err
}

// connected and disconnected are called from the connection's own goroutine.
// What those that are still there said meanwhile shows in their numbers;
// everything is for those that are gone.
func (b *Bus) connected(again bool) {
	if again {
		b.counters.Reconnected()
	}
	b.logger.Info("registry connected", "again", again)
	b.wanted.everything()
	poke(b.reconnected)
	poke(b.rewatch)
}

func (b *Bus) disconnected(err error) {
	if err != nil {
		b.logger.Warn("registry disconnected", "error", err)
	}
}

// poke fills a channel of capacity 1: one reminder is as good as many.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run is busLoop, sendLoop, answerLoop, syncLoop and watchLoop.
func (b *Bus) Run(ctx context.Context, h registry.Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b.mu.Lock()
	if b.closed || b.running {
		b.mu.Unlock()
		return registry.ErrClosed
	}
	b.running, b.cancel = true, cancel
	b.mu.Unlock()
	defer close(b.ran)

	bus, err := b.subscribe(b.prefix+"bus.*", b.subject("ask"))
	if err != nil {
		return err
	}
	var loops sync.WaitGroup
	loops.Go(func() { b.busLoop(ctx, bus[0], h) })
	loops.Go(func() { b.answerLoop(ctx, bus[1], h) })
	loops.Go(func() { b.sendLoop(ctx) })
	loops.Go(func() { b.syncLoop(ctx, h) })
	loops.Go(func() { b.watchLoop(ctx, h) })
	<-ctx.Done()
	loops.Wait()
	for _, sub := range bus {
		_ = sub.Unsubscribe() // a closed connection has none
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return registry.ErrClosed
	}
	return ctx.Err()
}

// subject is this server's own of a sort: ask, bus.
func (b *Bus) subject(sort string) string { return b.peerSubject(sort, b.id) }

func (b *Bus) peerSubject(sort string, id uint64) string {
	return fmt.Sprintf("%s%s.%016x", b.prefix, sort, id)
}

// subscribe bounds what waits for our loops; more is dropped by the connection
// and noticed as a gap in the sender's numbers.
func (b *Bus) subscribe(subjects ...string) (subs []*nats.Subscription, err error) {
	for _, subject := range subjects {
		sub, err := b.conn.SubscribeSync(subject)
		if err != nil {
			return nil, fmt.Errorf("subscribe: %w", err)
		}
		if err := sub.SetPendingLimits(1<<14, 1<<25); err != nil {
			return nil, fmt.Errorf("subscribe: %w", err)
		}
		subs = append(subs, sub)
	}
	return subs, nil
}

// PublishLocation implements registry.Registry.
func (b *Bus) PublishLocation(l registry.Location) {
	b.server.Store(uint32(l.Server))
	b.outbox.Location(l)
}

// PublishSeen implements registry.Registry.
func (b *Bus) PublishSeen(s []registry.Seen) { b.outbox.Seen(s) }

// PublishMapping implements registry.Registry.
func (b *Bus) PublishMapping(m registry.Mapping) {
	b.recent.add(m)
	b.outbox.Mapping(m)
}

// Ready is nil while the NATS server inside runs or the external one is
// connected; whether other servers are there is in Stats.
func (b *Bus) Ready() error {
	b.mu.Lock()
	closed := b.closed
	b.mu.Unlock()
	switch {
	case closed:
		return registry.ErrClosed
	case b.conn.IsConnected():
		return nil
	}
	if err := b.conn.LastError(); err != nil {
		return fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	return registry.ErrUnavailable
}

// Stats implements registry.Registry.
func (b *Bus) Stats() registry.Stats {
	s := b.counters.Stats()
	s.Peers = b.peers.count()
	s.Pending = b.outbox.Len()
	return s
}

// Addr is where the NATS server inside listens for routes; "" if there is none.
func (b *Bus) Addr() string {
	if b.engine == nil {
		return ""
	}
	return b.engine.addr
}

// Close ends Run, waits for it, and stops the NATS server inside.
func (b *Bus) Close() error {
	b.mu.Lock()
	first, running, cancel := !b.closed, b.running, b.cancel
	b.closed = true
	b.mu.Unlock()
	if running {
		cancel()
		<-b.ran
	}
	if first {
		b.conn.Close()
		<-b.gone
		b.engine.stop()
	}
	return nil
}
