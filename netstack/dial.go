package netstack

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// DialTCP connects to an address at the far end of the tunnel, loopback
// addresses included. When ctx ends the attempt is given up at once and the
// error wraps ctx.Err. Other errors are *net.OpError values wrapping an errno:
// ECONNREFUSED, EHOSTUNREACH, ENETUNREACH (also when the stack has no address
// of the family), EACCES (the far end's rules forbid it), ETIMEDOUT,
// EADDRNOTAVAIL (no port left, after waiting 1.2 s for one). Without a deadline
// in ctx an attempt that nobody answers ends after about two minutes.
func (s *Stack) DialTCP(ctx context.Context, to netip.AddrPort) (*Conn, error) {
	to = unmap(to)
	if err := ctx.Err(); err != nil {
		return nil, dialError(to, err)
	}
	if a := to.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a == broadcast || !s.hasFamily(a) {
		return nil, dialError(to, sysErrno("connect", syscall.ENETUNREACH))
	}
	var c *Conn
	var err error
	gaveUp := s.drawPortPatiently(ctx, func() (ok bool) {
		c, ok, err = s.connect(to)
		return ok
	})
	if err = cmp.Or(gaveUp, err); err != nil {
		return nil, dialError(to, err)
	}
	if err := c.established(ctx); err != nil {
		_ = c.Abort()
		return nil, dialError(to, s.dialReason(c, to, err))
	}
	c.begin()
	return c, nil
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// connect sends the SYN. ok is false if there was no port for it.
func (s *Stack) connect(to netip.AddrPort) (c *Conn, ok bool, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, true, net.ErrClosed
	}
	wq := new(waiter.Queue)
	ep, e := s.st.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), wq)
	if e != nil {
		return nil, true, sysError("socket", e)
	}
	c = &Conn{s: s, ep: ep}
	c.gates.init(wq)
	e = ep.Connect(tcpip.FullAddress{Addr: tcpipAddr(to.Addr()), Port: to.Port()})
	if _, started := e.(*tcpip.ErrConnectStarted); !started && e != nil {
		ep.Close()
		return nil, !isNoPort(e), sysError("connect", e)
	}
	return c, true, nil
}

// established waits for the end of the handshake.
func (c *Conn) established(ctx context.Context) error {
	for {
		switch tcp.EndpointState(c.ep.State()) {
		case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		case tcp.StateError, tcp.StateClose:
			err := c.ep.LastError()
			if err == nil {
				err = &tcpip.ErrConnectionAborted{}
			}
			return sysError("connect", err)
		default:
			return nil
		}
		select {
		case <-c.gates.write.ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dialReason makes err exact if an ICMP message told more than gVisor kept.
func (s *Stack) dialReason(c *Conn, to netip.AddrPort, err error) error {
	switch errno(err) {
	case syscall.EHOSTUNREACH, syscall.ENETUNREACH:
	default:
		return err
	}
	a, e := c.ep.GetLocalAddress()
	if e != nil {
		return err
	}
	if why := s.notes.take(flow{netip.AddrPortFrom(netipAddr(a.Addr), a.Port), to}); why != 0 {
		return sysErrno("connect", why)
	}
	return err
}
