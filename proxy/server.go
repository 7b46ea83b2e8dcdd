package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// The defaults of Config.
const (
	DefaultMaxConns         = 16384
	DefaultHandshakeTimeout = 10 * time.Second
	DefaultDialTimeout      = 30 * time.Second
	DefaultHalfIdleTimeout  = 15 * time.Minute
)

// Config is what a Server is made from. For durations and numbers 0 means the default, and a negative one means no
// limit.
type Config struct {
	Network Network // required
	SOCKS   Handler // speaks SOCKS5, SOCKS4 and SOCKS4a; nil: refused
	HTTP    Handler // speaks HTTP; nil: refused
	Auth    *Auth   // nil: everybody may use the proxy

	// MaxConns bounds the open connections of applications (default 16384). Beyond it each listener holds one more
	// connection and leaves the others in the kernel's backlog until one ends.
	MaxConns int
	// HandshakeTimeout bounds the time from the first byte wanted to the end of the request (default 10 s).
	HandshakeTimeout time.Duration
	// DialTimeout bounds a dial, a name's resolution included (default 30 s).
	DialTimeout time.Duration
	// IdleTimeout ends tunnels in which nothing moves (default none: a shell session survives the night).
	IdleTimeout time.Duration
	// HalfIdleTimeout ends tunnels in which nothing moves once one side has finished sending (default 15 min): the
	// application may be gone, which a half-closed connection would never notice.
	HalfIdleTimeout time.Duration

	Logger *slog.Logger // nil: discard
}

// Server serves applications on any number of listeners.
type Server struct {
	cfg      Config
	log      *slog.Logger
	counters Counters
	slots    chan struct{} // MaxConns; nil without a limit
	draining chan struct{} // closed when draining begins
	ended    chan struct{} // closed when Serve has returned
	conns    sync.WaitGroup

	mu       sync.Mutex // guards what follows
	started  bool
	drained  bool               // draining is closed
	aborted  bool               // no connection may live on
	open     map[*Conn]struct{} // every connection being served
	abort    context.CancelFunc // set by Serve
	listener []net.Listener     // set by Serve
}

// New checks the configuration and fills in the defaults.
func New(cfg Config) (*Server, error) {
	if cfg.Network == nil {
		return nil, errors.New("proxy: Config.Network is needed")
	}
	if cfg.SOCKS == nil && cfg.HTTP == nil {
		return nil, errors.New("proxy: Config.SOCKS or Config.HTTP is needed")
	}
	cfg.HandshakeTimeout = Limit(cfg.HandshakeTimeout, DefaultHandshakeTimeout)
	cfg.DialTimeout = Limit(cfg.DialTimeout, DefaultDialTimeout)
	cfg.IdleTimeout = max(cfg.IdleTimeout, 0)
	cfg.HalfIdleTimeout = max(orDefault(cfg.HalfIdleTimeout, DefaultHalfIdleTimeout), 0)
	s := &Server{
		cfg:      cfg,
		log:      cfg.Logger,
		draining: make(chan struct{}),
		ended:    make(chan struct{}),
		open:     make(map[*Conn]struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if n := orDefault(cfg.MaxConns, DefaultMaxConns); n > 0 {
		s.slots = make(chan struct{}, n)
	}
	return s, nil
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// noLimit stands for "no limit" in deadlines: far enough, and nothing overflows.
const noLimit = 10 * 365 * 24 * time.Hour

// Limit gives a configured duration its meaning: 0 is the default, negative is no limit.
func Limit(v, def time.Duration) time.Duration {
	if v < 0 {
		return noLimit
	}
	return orDefault(v, def)
}

// Network is what the server reaches the world with.
func (s *Server) Network() Network { return s.cfg.Network }

// Auth is who may use the server; nil for everybody.
func (s *Server) Auth() *Auth { return s.cfg.Auth }

// Logger is never nil.
func (s *Server) Logger() *slog.Logger { return s.log }

// Counters are for handlers to count into.
func (s *Server) Counters() *Counters { return &s.counters }

// Stats is a snapshot for /metrics.
func (s *Server) Stats() Stats { return s.counters.snapshot() }

// HandshakeTimeout is Config.HandshakeTimeout with its default.
func (s *Server) HandshakeTimeout() time.Duration { return s.cfg.HandshakeTimeout }

// DialTimeout is Config.DialTimeout with its default.
func (s *Server) DialTimeout() time.Duration { return s.cfg.DialTimeout }

// Draining is closed when the server begins to drain.
func (s *Server) Draining() <-chan struct{} { return s.draining }

// Serve accepts connections from the listeners, which it closes, until ctx is cancelled (open connections are then
// reset), until Drain, or until a listener fails. It returns after everything it started has ended; nil after ctx or
// Drain. It can be called once.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.start(cancel, listeners); err != nil {
		for _, l := range listeners {
			l.Close()
		}
		return err
	}
	defer close(s.ended)
	stopAborting := context.AfterFunc(ctx, s.abortAll)
	defer stopAborting()

	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		go s.acceptLoop(ctx, l, errs)
	}
	var failed error
	for range listeners {
		if err := <-errs; err != nil && failed == nil {
			failed = err
			cancel() // one listener is gone: say so now rather than serve by halves
		}
	}
	s.conns.Wait()
	s.drainHandlers()
	return failed
}

func (s *Server) start(abort context.CancelFunc, listeners []net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.started:
		return errors.New("proxy: Serve was called before")
	case s.drained:
		return net.ErrClosed
	case len(listeners) == 0:
		return errors.New("proxy: no listener")
	}
	s.started, s.abort, s.listener = true, abort, listeners
	return nil
}

// Drain stops accepting and waits for the open connections to end; when ctx is cancelled, those that are left are
// reset. It returns after Serve's work has ended: nil, or the context's error if connections had to be reset.
func (s *Server) Drain(ctx context.Context) error {
	s.mu.Lock()
	first, started, abort, listeners := !s.drained, s.started, s.abort, s.listener
	if first {
		s.drained = true
		close(s.draining)
	}
	s.mu.Unlock()
	if !started {
		return nil
	}
	if first {
		for _, l := range listeners {
			l.Close()
		}
		s.drainHandlers()
	}
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
	}
	abort()
	<-s.ended
	return ctx.Err()
}

func (s *Server) drainHandlers() {
	for _, h := range []Handler{s.cfg.SOCKS, s.cfg.HTTP} {
		if h != nil {
			h.Drain()
		}
	}
}

var errStopped = errors.New("the proxy was stopped")

// abortAll runs when Serve's context has ended.
func (s *Server) abortAll() {
	s.mu.Lock()
	s.aborted = true
	open := make([]*Conn, 0, len(s.open))
	for c := range s.open {
		open = append(open, c)
	}
	listeners := s.listener
	s.mu.Unlock()
	for _, l := range listeners {
		l.Close()
	}
	for _, c := range open {
		// Of a tunnel both ends: the application's direction may have ended already, so that its reset changes nothing.
		if r := c.tunnel.Load(); r != nil {
			r.fail(errStopped)
		} else {
			c.Abort()
		}
	}
}

func (s *Server) remember(c *Conn) bool {
	s.counters.openConns.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[c] = struct{}{}
	return !s.aborted
}

func (s *Server) forget(c *Conn) {
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
	c.Close()
	c.release()
	s.counters.openConns.Add(-1)
	if s.slots != nil {
		<-s.slots
	}
	s.conns.Done()
}

const (
	acceptPauseFirst = 5 * time.Millisecond
	acceptPauseMost  = time.Second
)

// acceptLoop takes connections from one listener. Errors that pass (no file descriptors left) are waited out.
func (s *Server) acceptLoop(ctx context.Context, l net.Listener, errs chan<- error) {
	defer l.Close()
	pause := acceptPauseFirst
	for {
		nc, err := l.Accept()
		if err != nil {
			if s.ending(ctx) {
				errs <- nil
				return
			}
			if !passing(err) {
				errs <- fmt.Errorf("accept on %s: %w", l.Addr(), err)
				return
			}
			s.counters.acceptErrors.Add(1)
			if pause == acceptPauseFirst {
				s.log.Warn("accept failed, trying again", "listen", l.Addr(), "error", err)
			}
			s.wait(ctx, pause)
			pause = min(2*pause, acceptPauseMost)
			continue
		}
		pause = acceptPauseFirst
		s.counters.accepted.Add(1)
		if !s.takeSlot(ctx) {
			nc.Close()
			continue // Accept fails next, the listener being closed
		}
		s.conns.Add(1)
		go s.serveConn(ctx, nc)
	}
}

// takeSlot waits while MaxConns are open; false when the server is ending.
func (s *Server) takeSlot(ctx context.Context) bool {
	if s.slots == nil {
		return true
	}
	select {
	case s.slots <- struct{}{}:
		return true
	default:
	}
	s.counters.limitWaits.Add(1)
	select {
	case s.slots <- struct{}{}:
		return true
	case <-ctx.Done():
	case <-s.draining:
	}
	return false
}

func (s *Server) ending(ctx context.Context) bool {
	select {
	case <-s.draining:
		return true
	default:
		return ctx.Err() != nil
	}
}

func (s *Server) wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-s.draining:
	}
}

// Dial opens a connection to the target in the name of c (after EndHandshake): within DialTimeout, and given up when
// the application hangs up. Failures are counted.
func (s *Server) Dial(ctx context.Context, c *Conn, to Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.DialTimeout)
	defer cancel()
	ctx, stop := c.Watch(ctx)
	remote, err := s.cfg.Network.DialContext(ctx, "tcp", to.String())
	if hungUp := stop(); hungUp != nil {
		if err == nil {
			Abort(remote)
		}
		err = hungUp
	}
	if err != nil {
		s.counters.Failure(ReasonOf(err))
		if s.log.Enabled(ctx, slog.LevelDebug) {
			s.log.Debug("dial failed", "target", to, "error", err)
		}
		return nil, err
	}
	return remote, nil
}

// Tunnel hands the connection over: once the handler's Serve has returned, the server relays between the application and
// the remote side until both have ended, and closes both.
func (s *Server) Tunnel(c *Conn, remote net.Conn) {
	c.tunnel.Store(&relay{
		a: c.Conn, b: remote,
		totalAB: &s.counters.bytesOut, totalBA: &s.counters.bytesIn,
		idle: s.cfg.IdleTimeout, halfIdle: s.cfg.HalfIdleTimeout,
	})
}
