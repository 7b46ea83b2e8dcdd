package netstack

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Listener is a listening TCP socket of a Stack; it implements net.Listener.
type Listener struct {
	s      *Stack
	ep     tcpip.Endpoint
	at     netip.AddrPort
	gates  gates
	closed atomic.Bool
	mu     sync.Mutex // held by Accept, which waits at gates.read
}

// ListenTCP listens at an address of the stack. The unspecified address (or
// the zero Addr) means all of them, both families; on a stack that forwards,
// that is every address in the world. Port 0 takes a port of the ranges. A
// listener wins over ForwardTCP. Errors wrap EADDRINUSE or EADDRNOTAVAIL.
func (s *Stack) ListenTCP(at netip.AddrPort) (*Listener, error) {
	var l *Listener
	var err error
	_ = s.drawPortPatiently(context.Background(), func() (ok bool) {
		l, ok, err = s.listenTCP(at)
		return ok
	})
	return l, err
}

// listenTCP tries once; ok is false if there was no port.
func (s *Stack) listenTCP(at netip.AddrPort) (l *Listener, ok bool, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, true, listenError("tcp", at, net.ErrClosed)
	}
	wq := new(waiter.Queue)
	ep, e := s.st.NewEndpoint(tcp.ProtocolNumber, bindProtocol(at.Addr()), wq)
	if e != nil {
		return nil, true, listenError("tcp", at, sysError("socket", e))
	}
	l = &Listener{s: s, ep: ep}
	l.gates.init(wq)
	if l.at, e = bind(ep, at); e == nil {
		e = ep.Listen(listenBacklog)
	}
	if e != nil {
		ep.Close()
		return nil, !isNoPort(e), listenError("tcp", at, sysError("bind", e))
	}
	return l, true, nil
}

// bindProtocol returns the family of a socket bound to a: IPv6, which takes
// IPv4 as well, for the unspecified address.
func bindProtocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if !a.IsValid() || a.Unmap().IsUnspecified() {
		return header.IPv6ProtocolNumber
	}
	return protocolOf(a.Unmap())
}

// bind binds the endpoint to at and returns the address with its port.
func bind(ep tcpip.Endpoint, at netip.AddrPort) (netip.AddrPort, tcpip.Error) {
	at = unmap(at)
	full := tcpip.FullAddress{Port: at.Port()}
	if at.Addr().IsValid() && !at.Addr().IsUnspecified() {
		full.Addr = tcpipAddr(at.Addr())
	}
	if err := ep.Bind(full); err != nil {
		return at, err
	}
	got, err := ep.GetLocalAddress()
	if err != nil {
		return at, err
	}
	a := netipAddr(got.Addr)
	if !a.IsValid() {
		a = netip.IPv6Unspecified()
	}
	return netip.AddrPortFrom(a, got.Port), nil
}

// Accept waits for the next connection, a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if l.closed.Load() {
			return nil, l.opError(net.ErrClosed)
		}
		ep, wq, err := l.ep.Accept(nil)
		switch err.(type) {
		case nil:
			return l.s.newConn(ep, wq), nil
		case *tcpip.ErrWouldBlock:
			<-l.gates.read.ch
		default:
			// The endpoint doesn't listen any more: the stack was closed.
			return nil, l.opError(net.ErrClosed)
		}
	}
}

// Addr returns the *net.TCPAddr listened at.
func (l *Listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

// Close ends the listener; waiting and later Accepts fail with net.ErrClosed.
// Connections not yet accepted are reset.
func (l *Listener) Close() error {
	if l.closed.CompareAndSwap(false, true) {
		l.ep.Close()
		l.gates.close()
	}
	return nil
}

func (l *Listener) opError(err error) error {
	return &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: err}
}
