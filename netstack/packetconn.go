package netstack

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	reserved "gvisor.dev/gvisor/pkg/tcpip/ports"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A UDP socket does without a gVisor endpoint, whose cost per datagram is a
// multiple of what is done here. gVisor puts fragments together, looks after
// ports, answers for ports that nobody has, and ends the socket with the stack;
// for that the socket is a stack.TransportEndpoint of its demultiplexer.
//
//	in   Input, takeUDP   whole datagrams for a socket: one copy, to its queue
//	     HandlePacket     what came by way of gVisor: put together from fragments
//	     ReadBatch        takes a chunk of the queue, mostly many datagrams
//	out  WriteBatch       builds packets in a batch of the device, flushes once

// PacketConn is an unconnected UDP socket of a Stack, with the method names of
// net.UDPConn. It is safe for concurrent use. Up to 1 MiB of datagrams wait to
// be read; those beyond are dropped and counted in Stats.UDPBufferErrors.
type PacketConn struct {
	s      *Stack
	dual   bool // it has no address of its own and takes both families
	at     netip.AddrPort
	res    reserved.Reservation
	closed atomic.Bool

	queue   udpQueue
	read    gate
	readMu  sync.Mutex // held while reading; guards the next two
	reading *udpChunk  // what the last read took from the queue
	next    int        // the datagram in it that comes next

	write gate // only its deadline; writing never waits
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
	a := unmap(at).Addr()
	c = &PacketConn{s: s, dual: !a.IsValid() || a.IsUnspecified()}
	c.res = reserved.Reservation{Transport: header.UDPProtocolNumber, Port: at.Port()}
	if c.dual {
		a = netip.IPv6Unspecified()
		c.res.Networks = []tcpip.NetworkProtocolNumber{header.IPv6ProtocolNumber, header.IPv4ProtocolNumber}
	} else {
		if !s.isOwn(a) {
			return nil, true, listenError("udp", at, sysErrno("bind", syscall.EADDRNOTAVAIL))
		}
		c.res.Networks = []tcpip.NetworkProtocolNumber{protocolOf(a)}
		c.res.Addr = tcpipAddr(a)
	}
	port, e := s.st.ReservePort(s.st.SecureRNG(), c.res, nil)
	if e != nil {
		return nil, !isNoPort(e), listenError("udp", at, sysError("bind", e))
	}
	c.res.Port = port
	c.at = netip.AddrPortFrom(a, port)
	c.read.init()
	c.write.init()
	if e := s.st.RegisterTransportEndpoint(c.res.Networks, c.res.Transport, c.id(), c, c.res.Flags, 0); e != nil {
		s.st.ReleasePort(c.res)
		return nil, true, listenError("udp", at, sysError("bind", e))
	}
	s.ports.udp.add(c)
	return c, true, nil
}

// id is what gVisor knows the socket by.
func (c *PacketConn) id() stack.TransportEndpointID {
	return stack.TransportEndpointID{LocalAddress: c.res.Addr, LocalPort: c.res.Port}
}

// ReadFromUDPAddrPort reads one datagram; what exceeds b is lost. The address
// is IPv4 for an IPv4 datagram, never 4-in-6.
func (c *PacketConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if err := c.fill(); err != nil {
		return 0, netip.AddrPort{}, err
	}
	k := c.reading
	n, from := copy(b, k.datagrams[c.next][udpRoom:]), k.from[c.next]
	c.next++
	return n, from, nil
}

// ReadBatch waits for datagrams and returns some that have come, in order, with
// their senders: each with room bytes before it, at most 32. They are the
// caller's, to be changed as well, until the next read of the socket.
func (c *PacketConn) ReadBatch(room int) (datagrams [][]byte, from []netip.AddrPort, err error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if err := c.fill(); err != nil {
		return nil, nil, err
	}
	datagrams, from = c.reading.datagrams[c.next:], c.reading.from[c.next:]
	for i, d := range datagrams {
		datagrams[i] = d[udpRoom-room:]
	}
	c.next += len(datagrams)
	return datagrams, from, nil
}

// fill waits until there is a next datagram in c.reading. c.readMu is held.
func (c *PacketConn) fill() error {
	for {
		switch {
		case c.closed.Load():
			return c.opError("read", netip.AddrPort{}, net.ErrClosed)
		case c.read.isExpired():
			return c.opError("read", netip.AddrPort{}, os.ErrDeadlineExceeded)
		case c.reading != nil && c.next < len(c.reading.datagrams):
			return nil
		}
		c.reading.done()
		if c.reading, c.next = c.queue.take(), 0; c.reading == nil {
			<-c.read.ch
		}
	}
}

// WriteToUDPAddrPort sends one datagram, in fragments when it exceeds the MTU.
// A payload above 65507 bytes (IPv4) or 65527 (IPv6) gives EMSGSIZE, a family
// of which the stack has no address ENETUNREACH.
func (c *PacketConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	out := c.s.dev.batch()
	defer out.done()
	if err := c.send(out, b, to); err != nil {
		return 0, err
	}
	return len(b), nil
}

// WriteBatch sends datagrams, each as WriteToUDPAddrPort does, in order. It ends
// at the first that can't be sent and returns how many went before it, and why
// this one didn't.
func (c *PacketConn) WriteBatch(datagrams [][]byte, to []netip.AddrPort) (int, error) {
	out := c.s.dev.batch()
	defer out.done()
	for i, b := range datagrams {
		if err := c.send(out, b, to[i]); err != nil {
			return i, err
		}
	}
	return len(datagrams), nil
}

// send appends a datagram to a batch.
func (c *PacketConn) send(out *batch, b []byte, to netip.AddrPort) error {
	to = unmap(to)
	from, err := c.checkSend(len(b), to)
	if err != nil {
		return c.opError("write", to, err)
	}
	out.putUDP(netip.AddrPortFrom(from, c.at.Port()), to, b)
	return nil
}

// checkSend returns the address from which n bytes can be sent to to.
func (c *PacketConn) checkSend(n int, to netip.AddrPort) (from netip.Addr, err error) {
	a := to.Addr()
	switch {
	case c.closed.Load() || c.s.dev.outClosed.Load():
		return from, net.ErrClosed
	case c.write.isExpired():
		return from, os.ErrDeadlineExceeded
	case !to.IsValid() || to.Port() == 0:
		return from, sysErrno("sendto", syscall.EINVAL)
	case !c.dual && a.Is4() != c.at.Addr().Is4():
		return from, sysErrno("sendto", syscall.EAFNOSUPPORT)
	case a.Is4() && n > maxUDPv4, n > maxUDPv6:
		return from, sysErrno("sendto", syscall.EMSGSIZE)
	}
	from, ok := c.s.sourceFor(c.at.Addr(), a)
	switch {
	case !ok || a.IsUnspecified():
		return from, sysErrno("sendto", syscall.ENETUNREACH)
	case a == broadcast:
		return from, sysErrno("sendto", syscall.EACCES)
	}
	return from, nil
}

// sourceFor returns the stack's address to send to `to` from, which is bound if
// that is one.
func (s *Stack) sourceFor(bound, to netip.Addr) (from netip.Addr, ok bool) {
	n := 0
	for _, a := range *s.own.Load() {
		switch {
		case a == bound:
			return a, true
		case a.Is4() == to.Is4() && bound.IsUnspecified():
			from = a
			n++
		}
	}
	if n < 2 {
		return from, n == 1
	}
	r, err := s.st.FindRoute(nicID, tcpip.Address{}, tcpipAddr(to), protocolOf(to), false)
	if err != nil {
		return from, true
	}
	defer r.Release()
	return netipAddr(r.LocalAddress()), true
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

// SetReadDeadline sets the deadline of the reads.
func (c *PacketConn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.read, t) }

// SetWriteDeadline sets the deadline of the writes.
func (c *PacketConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.write, t) }

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
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	c.s.ports.udp.remove(c)
	c.s.st.UnregisterTransportEndpoint(c.res.Networks, c.res.Transport, c.id(), c, c.res.Flags, 0)
	c.s.st.ReleasePort(c.res)
	c.queue.close()
	c.read.stop()
	c.write.stop()
	c.read.wake()
	return nil
}

func (c *PacketConn) opError(op string, to netip.AddrPort, err error) error {
	e := &net.OpError{Op: op, Net: "udp", Source: c.LocalAddr(), Err: err}
	if to.IsValid() {
		e.Addr = net.UDPAddrFromAddrPort(to)
	}
	return e
}

// arrived puts a datagram into the queue.
func (c *PacketConn) arrived(from netip.AddrPort, payload []byte) {
	first, ok := c.queue.put(from, payload)
	if !ok {
		c.s.st.Stats().UDP.ReceiveBufferErrors.Increment()
		return
	}
	if first {
		c.read.wake()
	}
}

// HandlePacket implements stack.TransportEndpoint.
func (c *PacketConn) HandlePacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	h := pkt.TransportHeader().Slice()
	if len(h) < header.UDPMinimumSize {
		return
	}
	n := int(binary.BigEndian.Uint16(h[4:])) - header.UDPMinimumSize
	// This may move the packet to other memory, the header too.
	b, ok := pkt.Data().PullUp(pkt.Data().Size())
	if !ok && pkt.Data().Size() > 0 || n < 0 || n > len(b) {
		c.s.st.Stats().UDP.MalformedPacketsReceived.Increment()
		return
	}
	c.arrived(netip.AddrPortFrom(netipAddr(id.RemoteAddress), id.RemotePort), b[:n])
}

// HandleError implements stack.TransportEndpoint. An unconnected socket is told
// nothing, RFC 1122 section 4.1.3.3 notwithstanding, as in Linux.
func (*PacketConn) HandleError(stack.TransportError, *stack.PacketBuffer) {}

// Abort implements stack.TransportEndpoint.
func (c *PacketConn) Abort() { _ = c.Close() }

// Wait implements stack.TransportEndpoint.
func (*PacketConn) Wait() {}
