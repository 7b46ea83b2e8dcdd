package netstack

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// PacketConn is an unconnected UDP socket of a Stack, with the method names of
// net.UDPConn. It is safe for concurrent use. Up to 1 MiB of datagrams wait to
// be read; those beyond are dropped and counted in Stats.UDPBufferErrors.
type PacketConn struct {
	ep     tcpip.Endpoint
	dual   bool // an IPv6 socket that takes IPv4 as well
	v4     bool
	at     netip.AddrPort
	gates  gates
	closed atomic.Bool

	readMu sync.Mutex // held while reading; guards in
	in     sliceWriter

	writeMu sync.Mutex // held while writing; guards out and to
	out     sliceReader
	to      tcpip.FullAddress
}

// ListenUDP opens a UDP socket. The unspecified address (or the zero Addr)
// means all of the stack's addresses, both families. Port 0 takes a port of the
// ranges, and waits up to 1.2 s for one. A socket wins over ForwardUDP, but on a stack that forwards it takes
// only datagrams to the stack's own addresses, and a concrete address must be
// one of them. Errors wrap EADDRINUSE or EADDRNOTAVAIL.
func (s *Stack) ListenUDP(at netip.AddrPort) (*PacketConn, error) {
	var c *PacketConn
	var err error
	_ = s.drawPortPatiently(context.Background(), func() (ok bool) {
		c, ok, err = s.listenUDP(at)
		return ok
	})
	return c, err
}

// listenUDP tries once; ok is false if there was no port.
func (s *Stack) listenUDP(at netip.AddrPort) (c *PacketConn, ok bool, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, true, listenError("udp", at, net.ErrClosed)
	}
	proto := bindProtocol(at.Addr())
	dual := !at.Addr().IsValid() || at.Addr().Unmap().IsUnspecified()
	if !dual && !s.isOwn(at.Addr().Unmap().WithZone("")) {
		return nil, true, listenError("udp", at, sysErrno("bind", syscall.EADDRNOTAVAIL))
	}
	wq := new(waiter.Queue)
	ep, e := s.st.NewEndpoint(udp.ProtocolNumber, proto, wq)
	if e != nil {
		return nil, true, listenError("udp", at, sysError("socket", e))
	}
	c = &PacketConn{ep: ep, dual: dual, v4: proto == header.IPv4ProtocolNumber}
	c.gates.init(wq)
	// A multicast datagram goes into the tunnel and nowhere else.
	ep.SocketOptions().SetMulticastLoop(false)
	if c.at, e = bind(ep, at); e != nil {
		ep.Close()
		return nil, !isNoPort(e), listenError("udp", at, sysError("bind", e))
	}
	return c, true, nil
}

// ReadFromUDPAddrPort reads one datagram; what exceeds b is lost. The address
// is IPv4 for an IPv4 datagram, never 4-in-6.
func (c *PacketConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	for {
		if c.closed.Load() {
			return 0, netip.AddrPort{}, c.opError("read", netip.AddrPort{}, net.ErrClosed)
		}
		if c.gates.read.isExpired() {
			return 0, netip.AddrPort{}, c.opError("read", netip.AddrPort{}, os.ErrDeadlineExceeded)
		}
		c.in = sliceWriter{b: b}
		res, err := c.ep.Read(&c.in, tcpip.ReadOptions{NeedRemoteAddr: true})
		n := c.in.n
		c.in.b = nil
		switch err.(type) {
		case nil, *tcpip.ErrBadBuffer: // ErrBadBuffer: b has no room at all
			return n, netip.AddrPortFrom(netipAddr(res.RemoteAddr.Addr), res.RemoteAddr.Port), nil
		case *tcpip.ErrWouldBlock:
			<-c.gates.read.ch
		case *tcpip.ErrClosedForReceive:
			return 0, netip.AddrPort{}, c.opError("read", netip.AddrPort{}, net.ErrClosed)
		default:
			return 0, netip.AddrPort{}, c.opError("read", netip.AddrPort{}, sysError("recvfrom", err))
		}
	}
}

// WriteToUDPAddrPort sends one datagram, in fragments when it exceeds the MTU.
// A payload above 65507 bytes (IPv4) or 65527 (IPv6) gives EMSGSIZE, a family
// of which the stack has no address ENETUNREACH.
func (c *PacketConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	to = unmap(to)
	a := to.Addr()
	var err error
	switch {
	case !to.IsValid() || to.Port() == 0:
		err = sysErrno("sendto", syscall.EINVAL)
	case !c.dual && a.Is4() != c.v4:
		err = sysErrno("sendto", syscall.EAFNOSUPPORT)
	case a.Is4() && len(b) > maxUDPv4, len(b) > maxUDPv6:
		err = sysErrno("sendto", syscall.EMSGSIZE)
	}
	if err != nil {
		return 0, c.opError("write", to, err)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.to = tcpip.FullAddress{Addr: tcpipAddr(a), Port: to.Port()}
	if c.dual {
		c.to.Addr = tcpip.AddrFrom16(a.As16())
	}
	for {
		if c.closed.Load() {
			return 0, c.opError("write", to, net.ErrClosed)
		}
		if c.gates.write.isExpired() {
			return 0, c.opError("write", to, os.ErrDeadlineExceeded)
		}
		c.out.b = b
		_, err := c.ep.Write(&c.out, tcpip.WriteOptions{To: &c.to})
		c.out.b = nil
		switch err.(type) {
		case nil:
			return len(b), nil
		case *tcpip.ErrWouldBlock:
			<-c.gates.write.ch
		case *tcpip.ErrClosedForSend, *tcpip.ErrInvalidEndpointState:
			return 0, c.opError("write", to, net.ErrClosed)
		default:
			return 0, c.opError("write", to, sysError("sendto", err))
		}
	}
}

// LocalAddr returns the *net.UDPAddr the socket is bound to.
func (c *PacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.at) }

// SetDeadline sets both deadlines; the zero time means none.
func (c *PacketConn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline sets the deadline of ReadFromUDPAddrPort.
func (c *PacketConn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.gates.read, t) }

// SetWriteDeadline sets the deadline of WriteToUDPAddrPort.
func (c *PacketConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.gates.write, t) }

func (c *PacketConn) setDeadline(g *gate, t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", netip.AddrPort{}, net.ErrClosed)
	}
	g.setDeadline(t)
	return nil
}

// Close closes the socket and fails what waits on it with net.ErrClosed.
// Close is idempotent.
func (c *PacketConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.ep.Close()
		c.gates.close()
	}
	return nil
}

func (c *PacketConn) opError(op string, to netip.AddrPort, err error) error {
	e := &net.OpError{Op: op, Net: "udp", Source: c.LocalAddr(), Err: err}
	if to.IsValid() {
		e.Addr = net.UDPAddrFromAddrPort(to)
	}
	return e
}
