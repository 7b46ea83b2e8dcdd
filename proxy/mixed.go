package proxy

import (
	"context"
	"log/slog"
	"net"

	"github.com/anytun-go/anytun/netstack/deep"
	"github.com/anytun-go/anytun/netstack/splice"
)

// Handler speaks one protocol with applications.
type Handler interface {
	// Serve speaks on c, whose first byte is still unread, until the connection has ended or is handed over to
	// Server.Tunnel; the server closes c afterwards. The handshake's deadline is set on c. ctx is cancelled when the
	// server gives its connections up.
	Serve(ctx context.Context, s *Server, c *Conn)
	// Drain closes connections that wait between two requests and makes the others end after theirs. It is called when
	// the server begins to drain and once more after the last connection.
	Drain()
}

// protocol is what a connection's first byte tells.
type protocol uint8

const (
	protocolUnknown protocol = iota
	protocolSOCKS            // 4 or 5, the version
	protocolHTTP             // a letter, of a method
)

func protocolOf(first byte) protocol {
	switch {
	case first == 4 || first == 5:
		return protocolSOCKS
	case 'A' <= first && first <= 'Z', 'a' <= first && first <= 'z':
		return protocolHTTP
	}
	return protocolUnknown
}

// serveConn is the life of one connection.
func (s *Server) serveConn(ctx context.Context, nc net.Conn) {
	deep.Stack()
	c := newConn(nc)
	if s.remember(c) {
		s.handshake(ctx, c)
	}
	if c.tunnel.Load() != nil {
		s.runTunnel(c)
	}
	s.forget(c)
}

// handshake finds the protocol and lets its handler speak. There is no reply to bytes that are no protocol of ours: it
// would be one in a language the other side has not shown to know.
func (s *Server) handshake(ctx context.Context, c *Conn) {
	if err := c.begin(s.cfg.HandshakeTimeout); err != nil {
		return
	}
	first, err := c.br.Peek(1)
	if err != nil {
		// A connection opened and closed without a word is somebody's health check.
		if r := c.Unfinished(); r == ReasonHandshakeSlow {
			s.counters.Failure(r)
		}
		return
	}
	var h Handler
	switch protocolOf(first[0]) {
	case protocolSOCKS:
		h = s.cfg.SOCKS
	case protocolHTTP:
		h = s.cfg.HTTP
	case protocolUnknown: // no handler
	}
	if h == nil {
		s.counters.Failure(ReasonUnknownProtocol)
		s.log.Debug("unknown protocol", "remote", c.RemoteAddr(), "first", first[0])
		return
	}
	h.Serve(ctx, s, c)
}

// runTunnel relays what a handler has handed over.
func (s *Server) runTunnel(c *Conn) {
	r := c.tunnel.Load()
	s.counters.openTunnels.Add(1)
	r.run(c.idle, splice.NewReader(r.b), c.TakeEarly())
	s.counters.openTunnels.Add(-1)
	if r.expired.Load() {
		s.counters.idleTunnels.Add(1)
	}
	if s.log.Enabled(context.Background(), slog.LevelDebug) {
		s.log.Debug("tunnel ended", "remote", c.RemoteAddr(), "out", r.aToB.Load(), "in", r.bToA.Load(), "error", r.err)
	}
}
