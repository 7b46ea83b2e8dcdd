// Package httpproxy speaks HTTP with applications: CONNECT, plain requests with an absolute URI, and a few pages of its
// own (/ and /proxy.pac).
//
// Requests are parsed by net/http's server and written anew by its transport, so a request that two parsers could read
// in two ways is refused or made unambiguous, never passed on.
package httpproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

// The defaults of Config.
const (
	DefaultKeepAlive    = 2 * time.Minute
	DefaultMaxIdleConns = 256
)

// Config is what a Handler is made from. 0 means the default, a negative duration no limit.
type Config struct {
	// KeepAlive is how long a connection may wait for its next request (default 2 min).
	KeepAlive time.Duration
	// MaxIdleConns bounds the unused connections kept open towards servers (default 256, 8 per server, for a minute).
	MaxIdleConns int
	// Logger receives net/http's complaints at level debug; nil: discard.
	Logger *slog.Logger
}

const (
	upstreamIdleTimeout    = time.Minute
	upstreamIdlePerHost    = 8
	continueTimeout        = time.Second // then the request's body is sent without waiting for "100 Continue"
	maxRequestHeaderBytes  = 64 << 10
	maxResponseHeaderBytes = 256 << 10
)

// Handler is a proxy.Handler; it serves one proxy.Server. Safe for concurrent use.
type Handler struct {
	server    *http.Server
	transport *http.Transport
	forward   *httputil.ReverseProxy
	first     sync.Once
	proxy     *proxy.Server // known from the first connection on
}

// New returns a handler for proxy.Config.HTTP.
func New(cfg Config) *Handler {
	if cfg.MaxIdleConns <= 0 {
		cfg.MaxIdleConns = DefaultMaxIdleConns
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	complaints := slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	h := &Handler{}
	h.transport = &http.Transport{
		Proxy:                  nil, // we are the proxy; the environment's is not asked
		DialContext:            h.dial,
		DisableCompression:     true, // the application gets the bytes the server sent
		MaxIdleConns:           cfg.MaxIdleConns,
		MaxIdleConnsPerHost:    upstreamIdlePerHost,
		IdleConnTimeout:        upstreamIdleTimeout,
		ExpectContinueTimeout:  continueTimeout,
		MaxResponseHeaderBytes: maxResponseHeaderBytes,
	}
	h.forward = &httputil.ReverseProxy{
		Rewrite:       rewrite,
		Transport:     h.transport,
		FlushInterval: -1, // an event must not wait in a buffer for the next one
		ErrorLog:      complaints,
		BufferPool:    proxy.Buffers{},
		ErrorHandler:  h.forwardFailed,
	}
	h.server = &http.Server{
		Handler:                      http.HandlerFunc(h.serveHTTP),
		DisableGeneralOptionsHandler: true,
		IdleTimeout:                  proxy.Limit(cfg.KeepAlive, DefaultKeepAlive),
		MaxHeaderBytes:               maxRequestHeaderBytes,
		ErrorLog:                     complaints,
		BaseContext:                  func(l net.Listener) context.Context { return l.(*session).ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, sessionKey{}, c.(*sessionConn).session)
		},
		ConnState: func(c net.Conn, state http.ConnState) { c.(*sessionConn).session.changed(state) },
	}
	return h
}

// Drain implements proxy.Handler.
func (h *Handler) Drain() {
	h.server.SetKeepAlivesEnabled(false) // also closes the connections between two requests
	h.transport.CloseIdleConnections()
}

// Serve implements proxy.Handler: net/http serves the connection as the only one of a listener of its own, until it has
// ended or its request was CONNECT, which then goes on here, net/http's goroutine and buffers being gone.
func (h *Handler) Serve(ctx context.Context, s *proxy.Server, c *proxy.Conn) {
	h.first.Do(func() {
		h.proxy = s
		h.server.ReadHeaderTimeout = s.HandshakeTimeout()
	})
	c.EndHandshake() // net/http sets its own deadlines
	ss := &session{ctx: ctx, proxy: s, conn: c, ended: make(chan struct{})}
	// Serve returns when Accept fails, which it does after the connection's end.
	_ = h.server.Serve(ss)
	if ss.malformed() {
		s.Counters().Failure(proxy.ReasonMalformed)
	}
	if ss.connect != nil {
		connect(ctx, s, c, *ss.connect)
	}
}

// dial is the transport's. The transport cuts its context off from the request's, so that a dial can serve whoever comes
// next; here a dial ends with the request that wanted it, which is how the application's hang-up cancels it.
func (h *Handler) dial(ctx context.Context, network, address string) (net.Conn, error) {
	s := h.proxy
	ctx, cancel := context.WithTimeout(ctx, s.DialTimeout())
	defer cancel()
	if request, ok := ctx.Value(requestKey{}).(context.Context); ok {
		defer context.AfterFunc(request, cancel)()
	}
	return s.Network().DialContext(ctx, network, address)
}

// sessionKey finds a request's session in its context, requestKey the request's context in that of a dial.
type (
	sessionKey struct{}
	requestKey struct{}
)

// session is one connection, and to net/http a listener that has just this connection.
type session struct {
	ctx     context.Context // of the server; net/http asks for it through BaseContext
	proxy   *proxy.Server
	conn    *proxy.Conn
	ended   chan struct{}
	once    sync.Once
	inner   *sessionConn  // set by the first Accept
	begun   atomic.Uint64 // requests of which a byte was read
	served  atomic.Uint64 // requests that were well-formed
	taken   atomic.Bool   // by a handler that took the connection away from net/http
	connect *proxy.Target // set by a CONNECT request before ended is closed
}

// Accept implements net.Listener.
func (ss *session) Accept() (net.Conn, error) {
	if ss.inner == nil {
		ss.inner = &sessionConn{Conn: ss.conn.Conn, session: ss, early: ss.conn.TakeEarly()}
		return ss.inner, nil
	}
	<-ss.ended
	return nil, net.ErrClosed
}

// Close implements net.Listener. The connection's end is what ends the session.
func (ss *session) Close() error { return nil }

// Addr implements net.Listener.
func (ss *session) Addr() net.Addr { return ss.conn.LocalAddr() }

func (ss *session) end() { ss.once.Do(func() { close(ss.ended) }) }

// changed follows net/http's view of the connection.
func (ss *session) changed(state http.ConnState) {
	switch state {
	case http.StateActive:
		ss.begun.Add(1)
	case http.StateHijacked:
		ss.taken.Store(true)
	case http.StateClosed:
		ss.end()
	default:
	}
}

// malformed says whether a request was begun that never became one.
func (ss *session) malformed() bool { return ss.begun.Load() > ss.served.Load() }

// sessionConn is the connection as net/http sees it: first what was read ahead to tell the protocol.
type sessionConn struct {
	net.Conn
	session *session
	early   []byte
}

// Read implements net.Conn.
func (c *sessionConn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		if c.early = c.early[n:]; len(c.early) == 0 {
			c.early = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// CloseWrite lets net/http close without cutting its last reply off.
func (c *sessionConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// ReadFrom lets the kernel's socket take a body in large pieces.
func (c *sessionConn) ReadFrom(r io.Reader) (int64, error) {
	if rf, ok := c.Conn.(io.ReaderFrom); ok {
		return rf.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{c.Conn}, r)
}
