// Package socks5 speaks SOCKS5 (RFC 1928, with RFC 1929 passwords and Tor's RESOLVE and RESOLVE_PTR), SOCKS4 and
// SOCKS4a with applications.
//
// Of github.com/things-go/go-socks5 it uses the authenticators and the parsers of greeting and request. Its Server is
// not used, handlers or not: Server.ServeConn answers every command but 1, 2 and 3 itself, so RESOLVE (0xF0) can't
// reach a handler; it resolves names before any handler runs; it closes without a reply on a malformed greeting,
// password or request; and its 4 KiB reader lives as long as the connection, which ten thousand idle ones would pay.
package socks5

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	gosocks5 "github.com/things-go/go-socks5"
	"github.com/things-go/go-socks5/statute"

	"github.com/anytun-go/anytun/proxy"
)

// The commands of Tor's extension, tor-spec "socks-extensions": the destination is the question, the answer is
// BND.ADDR.
const (
	commandResolve    = 0xF0
	commandResolvePTR = 0xF1
)

// The defaults of Config.
const (
	DefaultUDPIdleTimeout  = 5 * time.Minute
	DefaultBindTimeout     = 2 * time.Minute
	DefaultMaxAssociations = 1024
)

// Config is what a Handler is made from. 0 means the default, a negative duration no limit.
type Config struct {
	// UDPIdleTimeout ends a UDP association that moves no datagram (default 5 min).
	UDPIdleTimeout time.Duration
	// BindTimeout is how long BIND waits for the peer (default 2 min).
	BindTimeout time.Duration
	// MaxAssociations bounds the open UDP associations (default 1024); one more gets the reply 0x01.
	MaxAssociations int
	// ListenUDP opens an association's socket towards the application; nil: one of package net, which moves one
	// datagram at a time. Port 0 takes any port.
	ListenUDP func(at netip.AddrPort) (AppConn, error)
}

// AppConn is a UDP socket towards an application.
type AppConn interface {
	// ReadBatch waits for datagrams and returns some of one sender, in order. They are the caller's, to be changed as
	// well, until the next call. One goroutine at a time calls it. Any error is final.
	ReadBatch() (datagrams [][]byte, from netip.AddrPort, err error)
	// WriteBatch sends datagrams to one receiver, in order, and returns how many could be sent.
	WriteBatch(datagrams [][]byte, to netip.AddrPort) (sent int, err error)
	LocalAddr() net.Addr
	Close() error
}

// Handler is a proxy.Handler. Safe for concurrent use.
type Handler struct {
	cfg          Config
	associations chan struct{} // a slot each
	outgoing     sync.Pool     // of *outgoing
}

// New returns a handler for proxy.Config.SOCKS.
func New(cfg Config) *Handler {
	cfg.UDPIdleTimeout = proxy.Limit(cfg.UDPIdleTimeout, DefaultUDPIdleTimeout)
	cfg.BindTimeout = proxy.Limit(cfg.BindTimeout, DefaultBindTimeout)
	if cfg.MaxAssociations <= 0 {
		cfg.MaxAssociations = DefaultMaxAssociations
	}
	if cfg.ListenUDP == nil {
		cfg.ListenUDP = listenSingly
	}
	return &Handler{
		cfg:          cfg,
		associations: make(chan struct{}, cfg.MaxAssociations),
		outgoing:     sync.Pool{New: func() any { return new(outgoing) }},
	}
}

// Drain does nothing: a SOCKS connection carries one request and ends with it.
func (h *Handler) Drain() {}

// Serve implements proxy.Handler.
func (h *Handler) Serve(ctx context.Context, s *proxy.Server, c *proxy.Conn) {
	version, err := c.Reader().Peek(1)
	if err != nil {
		return
	}
	if version[0] == version4 {
		h.serve4(ctx, s, c)
		return
	}
	h.serve5(ctx, s, c)
}

// request is a complete SOCKS5 request.
type request struct {
	kind   proxy.Kind
	target proxy.Target
	// source is what ASSOCIATE declares as the application's own address.
	source netip.AddrPort
}

func (h *Handler) serve5(ctx context.Context, s *proxy.Server, c *proxy.Conn) {
	if !negotiate(ctx, s, c) {
		return
	}
	req, reason := parse(c.Reader())
	if reason != proxy.ReasonNone {
		if reason == proxy.ReasonMalformed {
			reason = c.Unfinished()
		}
		s.Counters().Failure(reason)
		c.CloseWith(reply(reason, netip.AddrPort{}))
		return
	}
	c.EndHandshake()
	s.Counters().Request(req.kind)
	switch req.kind {
	case proxy.KindSOCKS5Connect:
		connect(ctx, s, c, req.target, reply)
	case proxy.KindSOCKS5Bind:
		h.bind(ctx, s, c, req.target, reply)
	case proxy.KindSOCKS5Associate:
		h.associate(ctx, s, c, req.source)
	case proxy.KindSOCKS5Resolve:
		resolve(ctx, s, c, req.target)
	case proxy.KindSOCKS5ResolvePTR:
		resolvePTR(ctx, s, c, req.target)
	default: // the parser makes no others
	}
}

// negotiate reads the greeting, chooses a method and authenticates; false when the connection is done with.
func negotiate(ctx context.Context, s *proxy.Server, c *proxy.Conn) bool {
	greeting, err := statute.ParseMethodRequest(c.Reader())
	if err != nil {
		s.Counters().Failure(c.Unfinished())
		c.CloseWith([]byte{statute.VersionSocks5, statute.MethodNoAcceptable})
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, s.HandshakeTimeout())
	defer cancel()
	check := &credentials{ctx: ctx, auth: s.Auth()}
	methods := []gosocks5.Authenticator{gosocks5.UserPassAuthenticator{Credentials: check}}
	if check.auth == nil {
		// Some applications that were given a password offer nothing but passwords; then any will do.
		methods = []gosocks5.Authenticator{gosocks5.NoAuthAuthenticator{}, methods[0]}
	}
	method := choose(methods, greeting.Methods)
	if method == nil {
		s.Counters().Failure(proxy.ReasonAuth)
		c.CloseWith([]byte{statute.VersionSocks5, statute.MethodNoAcceptable})
		return false
	}
	if _, err := method.Authenticate(c.Reader(), c, ""); err != nil {
		if errors.Is(err, statute.ErrUserAuthFailed) {
			s.Counters().Failure(proxy.ReasonAuth)
			s.Logger().Debug("authentication failed", "remote", c.RemoteAddr())
			c.CloseWith(nil) // the authenticator has replied
			return false
		}
		s.Counters().Failure(c.Unfinished())
		c.CloseWith([]byte{statute.UserPassAuthVersion, statute.AuthFailure})
		return false
	}
	return true
}

func choose(methods []gosocks5.Authenticator, offered []byte) gosocks5.Authenticator {
	for _, m := range methods {
		for _, code := range offered {
			if m.GetCode() == code {
				return m
			}
		}
	}
	return nil
}

// credentials lets go-socks5's authenticator ask proxy.Auth.
type credentials struct {
	ctx  context.Context // of this handshake; the interface has no room for it
	auth *proxy.Auth
}

// Valid implements gosocks5.CredentialStore.
func (c *credentials) Valid(user, password, _ string) bool {
	return c.auth == nil || c.auth.Verify(c.ctx, user, password)
}

// parse reads a request, RFC 1928 section 4.
func parse(r io.Reader) (request, proxy.Reason) {
	raw, err := statute.ParseRequest(r)
	if errors.Is(err, statute.ErrUnrecognizedAddrType) {
		return request{}, proxy.ReasonAddressType
	}
	if err != nil {
		return request{}, proxy.ReasonMalformed
	}
	var req request
	switch raw.Command {
	case statute.CommandConnect:
		req.kind = proxy.KindSOCKS5Connect
	case statute.CommandBind:
		req.kind = proxy.KindSOCKS5Bind
	case statute.CommandAssociate:
		req.kind = proxy.KindSOCKS5Associate
	case commandResolve:
		req.kind = proxy.KindSOCKS5Resolve
	case commandResolvePTR:
		req.kind = proxy.KindSOCKS5ResolvePTR
	default:
		return request{}, proxy.ReasonCommand
	}
	port := uint16(raw.DstAddr.Port)
	addr, _ := netip.AddrFromSlice(raw.DstAddr.IP) // not valid for a name
	if req.kind == proxy.KindSOCKS5Associate {
		// Not a destination: a name or none at all is as good as "any address".
		req.source = netip.AddrPortFrom(addr.Unmap(), port)
		return req, proxy.ReasonNone
	}
	if addr.IsValid() {
		req.target = proxy.Target{Addr: addr.Unmap(), Port: port}
		return req, proxy.ReasonNone
	}
	if req.target, err = proxy.NewTarget(raw.DstAddr.FQDN, port); err != nil {
		return request{}, proxy.ReasonUnknownName
	}
	return req, proxy.ReasonNone
}

// replier writes the reply of a protocol version: a code for the reason and an address.
type replier func(reason proxy.Reason, bound netip.AddrPort) []byte

// reply is the SOCKS5 one, RFC 1928 section 6. An address that is not valid becomes 0.0.0.0.
func reply(reason proxy.Reason, bound netip.AddrPort) []byte {
	b := append(make([]byte, 0, 22), statute.VersionSocks5, reason.SOCKS5(), 0)
	return appendAddrPort(b, bound)
}

// connect is CONNECT: dial first, then reply, so that the reply tells the truth.
func connect(ctx context.Context, s *proxy.Server, c *proxy.Conn, to proxy.Target, reply replier) {
	remote, err := s.Dial(ctx, c, to)
	if err != nil {
		c.CloseWith(reply(proxy.ReasonOf(err), netip.AddrPort{}))
		return
	}
	if err := c.Reply(reply(proxy.ReasonNone, proxy.AddrPortOf(remote.LocalAddr()))); err != nil {
		proxy.Abort(remote)
		return
	}
	s.Tunnel(c, remote)
}
