package netstack

import (
	"context"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// A dial that finds no port free waits this long for one: connections in
// TIME-WAIT give theirs back within timeWait, so that a burst of short
// connections is slowed down rather than refused.
const (
	portPatience = timeWait + 200*time.Millisecond
	portRetry    = 10 * time.Millisecond
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
	c, err := s.connect(to)
	if errno(err) == syscall.EADDRNOTAVAIL {
		c, err = s.connectPatiently(ctx, to)
	}
	if err != nil {
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

// connect sends the SYN.
func (s *Stack) connect(to netip.AddrPort) (*Conn, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, net.ErrClosed
	}
	wq := new(waiter.Queue)
	ep, err := s.st.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), wq)
	if err != nil {
		return nil, sysError("socket", err)
	}
	c := &Conn{ep: ep}
	c.gates.init(wq)
	err = ep.Connect(tcpip.FullAddress{Addr: tcpipAddr(to.Addr()), Port: to.Port()})
	if _, started := err.(*tcpip.ErrConnectStarted); !started && err != nil {
		ep.Close()
		return nil, sysError("connect", err)
	}
	return c, nil
}

// connectPatiently tries again until a port is free. One dial tries at a time,
// since looking through all ports is work.
func (s *Stack) connectPatiently(ctx context.Context, to netip.AddrPort) (*Conn, error) {
	patience := time.NewTimer(portPatience)
	defer patience.Stop()
	noPort := sysErrno("connect", syscall.EADDRNOTAVAIL)
	select {
	case s.portWait <- struct{}{}:
		defer func() { <-s.portWait }()
	case <-patience.C:
		return nil, noPort
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	retry := time.NewTicker(portRetry)
	defer retry.Stop()
	for {
		c, err := s.connect(to)
		if errno(err) != syscall.EADDRNOTAVAIL {
			return c, err
		}
		select {
		case <-retry.C:
		case <-patience.C:
			return nil, noPort
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
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
