package socks5

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/anytun-go/anytun/proxy"
)

// bind is BIND: a listener the peer can reach, a first reply with its address, a second one with the peer's once it has
// connected. Only the declared peer's address may connect, from any port; 0.0.0.0 and :: mean anybody. A Network that
// can't listen for this peer makes the first reply 0x07 (command not supported) or, for EACCES, 0x02.
func (h *Handler) bind(ctx context.Context, s *proxy.Server, c *proxy.Conn, peer proxy.Target, reply replier) {
	l, from, err := listen(ctx, s, c, peer)
	if err != nil {
		c.CloseWith(reply(proxy.ReasonOf(err), netip.AddrPort{}))
		return
	}
	defer l.Close()
	if err := c.Reply(reply(proxy.ReasonNone, proxy.AddrPortOf(l.Addr()))); err != nil {
		return
	}
	remote, err := h.accept(ctx, s, c, l, from)
	if err != nil {
		s.Counters().Failure(proxy.ReasonOf(err))
		c.CloseWith(reply(proxy.ReasonOf(err), netip.AddrPort{}))
		return
	}
	l.Close() // one connection is what BIND is for
	if err := c.Reply(reply(proxy.ReasonNone, proxy.AddrPortOf(remote.RemoteAddr()))); err != nil {
		proxy.Abort(remote)
		return
	}
	s.Tunnel(c, remote)
}

// listen opens the listener; it returns the address that may connect.
func listen(ctx context.Context, s *proxy.Server, c *proxy.Conn, peer proxy.Target) (net.Listener, netip.Addr, error) {
	from := peer.Addr
	var l net.Listener
	err := lookup(ctx, s, c, func(ctx context.Context) error {
		if !from.IsValid() {
			addrs, err := s.Network().LookupNetIP(ctx, "ip", peer.Name)
			if err != nil {
				return err
			}
			if from, err = preferIPv4(peer.Name, addrs); err != nil {
				return err
			}
		}
		var err error
		l, err = s.Network().Listen(ctx, netip.AddrPortFrom(from, peer.Port))
		return err
	})
	if err != nil && l != nil {
		l.Close() // the application hung up just then
	}
	return l, from, err
}

// accept waits for the peer within the time limit and while the application stays.
func (h *Handler) accept(
	ctx context.Context, s *proxy.Server, c *proxy.Conn, l net.Listener, from netip.Addr,
) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, h.cfg.BindTimeout)
	defer cancel()
	ctx, stop := c.Watch(ctx)
	stopClosing := context.AfterFunc(ctx, func() { l.Close() })
	remote, err := acceptFrom(s, l, from)
	// Whether time ran out must be asked before stop ends the context in any case.
	expired := errors.Is(ctx.Err(), context.DeadlineExceeded)
	stopClosing()
	if hungUp := stop(); hungUp != nil {
		if err == nil {
			proxy.Abort(remote)
		}
		return nil, hungUp
	}
	if err != nil && expired {
		return nil, context.DeadlineExceeded
	}
	return remote, err
}

func acceptFrom(s *proxy.Server, l net.Listener, from netip.Addr) (net.Conn, error) {
	for {
		remote, err := l.Accept()
		if err != nil {
			return nil, err
		}
		if from.IsUnspecified() || proxy.AddrPortOf(remote.RemoteAddr()).Addr() == from {
			return remote, nil
		}
		s.Counters().BindStranger()
		proxy.Abort(remote)
	}
}
