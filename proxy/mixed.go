package proxy

import (
	"context"
	"net"
)

// Handler speaks one protocol with applications.
type Handler interface {
	// Serve speaks on c, whose first byte is still unread, until the connection has ended; the server closes c
	// afterwards. The handshake's deadline is set on c. ctx is cancelled when the server gives its connections up.
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

// serveConn is the life of one connection. There is no reply to bytes that are no protocol of ours: it would be one in a
// language the other side has not shown to know.
func (s *Server) serveConn(ctx context.Context, nc net.Conn) {
	defer s.conns.Done()
	c := newConn(nc)
	defer s.forget(c)
	if !s.remember(c) {
		return
	}
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
	}
	if h == nil {
		s.counters.Failure(ReasonUnknownProtocol)
		s.log.Debug("unknown protocol", "remote", nc.RemoteAddr(), "first", first[0])
		return
	}
	h.Serve(ctx, s, c)
}
