package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/proxy"
)

const tunnelDNSPort = 53

// tunnel is the proxy's way into the world: a netstack whose packets a client
// engine carries. The stack is made with the first session, which brings its
// addresses, ports and MTU; until then callers wait.
type tunnel struct {
	log   *slog.Logger
	inner session.Inner
	// output takes the stack's packets; it is set before the first session.
	output func(pkts [][]byte)

	// made is closed when the fields below are set, which then stay as they are.
	made     chan struct{}
	stack    *netstack.Stack
	resolver *netstack.Resolver
	mtu      int
	failed   error // the stack could not be made

	started bool                           // the first session came; used by onSession alone
	current atomic.Pointer[client.Session] // nil before the first
	input   atomic.Pointer[netstack.Stack] // for input, which must not wait

	recovery
}

func newTunnel(serverKey session.PublicKey, log *slog.Logger) *tunnel {
	return &tunnel{
		log: log, inner: session.NewInner(serverKey), made: make(chan struct{}),
		recovery: recovery{news: news{wake: make(chan struct{}, 1)}},
	}
}

// receive takes opened packets from the client engine.
func (t *tunnel) receive(pkts [][]byte) {
	if s := t.input.Load(); s != nil {
		s.Input(pkts)
	}
}

// onSession gives the stack what a handshake brought. The client engine calls
// it from one goroutine.
func (t *tunnel) onSession(s client.Session) {
	old := t.current.Swap(&s)
	if !t.started {
		t.started = true
		t.mtu = s.MTU
		t.stack, t.failed = netstack.New(netstack.Config{
			MTU: s.MTU, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Output: t.output,
			PortsUsedUp: t.portsUsedUp, Logger: cmd.Quieter(t.log),
		})
		if t.failed == nil {
			t.failed = t.configure(s)
		}
		if t.failed == nil {
			t.resolver = t.stack.Resolver([]netip.AddrPort{
				netip.AddrPortFrom(s.Gateways[0], tunnelDNSPort),
				netip.AddrPortFrom(s.Gateways[1], tunnelDNSPort),
			})
			t.input.Store(t.stack)
		}
		close(t.made)
		t.log.Debug("the tunnel is up", "client", s.Number, "address", s.Addresses[0].String(),
			"address6", s.Addresses[1].String(), "first_port", s.FirstPort, "last_port", s.LastPort)
		return
	}
	if t.failed != nil {
		return
	}
	if s.MTU < t.mtu {
		t.log.Warn("the server lowered the MTU; start again so that packets fit", "mtu", s.MTU, "was", t.mtu)
	}
	if old.Addresses == s.Addresses && old.FirstPort == s.FirstPort && old.LastPort == s.LastPort {
		t.log.Debug("new session", "client", s.Number, "server_number", s.Server)
		return
	}
	t.log.Warn("this client has another number now; open connections are lost", "client", s.Number, "was", old.Number)
	if err := t.configure(s); err != nil {
		t.log.Error("can't use the new addresses", "error", err)
	}
}

func (t *tunnel) configure(s client.Session) error {
	if err := t.stack.SetAddresses(s.Addresses[:]); err != nil {
		return fmt.Errorf("set inner addresses: %w", err)
	}
	if err := t.setPorts(); err != nil {
		return fmt.Errorf("set ports: %w", err)
	}
	return nil
}

// wait returns when there is a stack. A server that doesn't answer within the
// caller's time looks to the application like a network that isn't there.
func (t *tunnel) wait(ctx context.Context, op, network string) error {
	select {
	case <-t.made:
		return t.failed
	default:
	}
	select {
	case <-t.made:
		return t.failed
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &net.OpError{Op: op, Net: network, Err: os.NewSyscallError("tunnel", syscall.ENETUNREACH)}
	}
	return ctx.Err()
}

// DialContext implements proxy.Network.
func (t *tunnel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if err := t.wait(ctx, "dial", network); err != nil {
		return nil, err
	}
	d := netstack.Dialer{Stack: t.stack, Resolver: t.resolver}
	return d.DialContext(ctx, network, address)
}

// ListenPacket implements proxy.Network.
func (t *tunnel) ListenPacket(ctx context.Context) (proxy.PacketConn, error) {
	if err := t.wait(ctx, "listen", "udp"); err != nil {
		return nil, err
	}
	c, err := t.stack.ListenUDP(netip.AddrPort{})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Listen implements proxy.Network. Unless the servers pass connections from
// outside on to our ports, only peers inside the tunnel can reach us.
func (t *tunnel) Listen(ctx context.Context, peer netip.AddrPort) (net.Listener, error) {
	if err := t.wait(ctx, "listen", "tcp"); err != nil {
		return nil, err
	}
	s := t.current.Load()
	at := s.Addresses[0]
	if peer.Addr().Is6() && !peer.Addr().Is4In6() && !peer.Addr().IsUnspecified() {
		at = s.Addresses[1]
	}
	_, inside := t.inner.Client(peer.Addr().Unmap())
	if peer.IsValid() && !peer.Addr().IsUnspecified() && !inside && !s.PublicPort {
		return nil, fmt.Errorf("listen for %v: it is outside the tunnel, and this server can't pass its connections on: %w",
			peer, proxy.ErrNotSupported)
	}
	l, err := t.stack.ListenTCP(netip.AddrPortFrom(at, 0))
	if err != nil {
		return nil, err
	}
	if inner := proxy.AddrPortOf(l.Addr()); !inside {
		if public := t.publicAddr(inner); public != inner {
			return publicListener{Listener: l, addr: net.TCPAddrFromAddrPort(public)}, nil
		}
	}
	return l, nil
}

// LookupNetIP implements proxy.Network.
func (t *tunnel) LookupNetIP(ctx context.Context, network, name string) ([]netip.Addr, error) {
	if err := t.wait(ctx, "lookup", "udp"); err != nil {
		return nil, err
	}
	return t.resolver.LookupNetIP(ctx, network, name)
}

// LookupAddr implements proxy.Network.
func (t *tunnel) LookupAddr(ctx context.Context, addr netip.Addr) (string, error) {
	if err := t.wait(ctx, "lookup", "udp"); err != nil {
		return "", err
	}
	return t.resolver.LookupAddr(ctx, addr)
}

// close ends the stack. It is called after the client engine has ended, so no
// session comes any more.
func (t *tunnel) close() error {
	if t.stack == nil {
		return nil
	}
	return t.stack.Close()
}

var _ proxy.Network = (*tunnel)(nil)
