package netstack

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/anytun-go/anytun/netstack/deep"
)

// tcpForwarder turns SYNs nobody listens for into requests. gVisor's Forwarder
// does the handshake; what it doesn't tell is kept here beside it: the SYN
// itself, which an ICMP message must quote.
type tcpForwarder struct {
	s       *Stack
	max     int
	handler func(*TCPRequest)
	gvisor  *tcp.Forwarder

	mu sync.Mutex
	// pending are the requests neither accepted nor rejected.
	pending map[stack.TransportEndpointID]*TCPRequest
}

// ForwardTCP hands every new connection to an address at which nobody listens
// to handler, each on a goroutine of its own. At most maxInFlight requests
// exist that were neither accepted nor rejected; SYNs beyond are dropped and
// counted in Stats.TCPForwardFull, and the client's retransmission asks again.
// The limit is for all clients together, so that it should be generous, and the
// handler has to hold back a client that asks for too much (Reject(nil) costs
// nothing). The stack must have been made with Config.Forward. To be called once, before
// the first Input.
func (s *Stack) ForwardTCP(maxInFlight int, handler func(*TCPRequest)) {
	if !s.forward || s.tcp != nil {
		panic("netstack: ForwardTCP without Config.Forward, or twice")
	}
	f := &tcpForwarder{s: s, max: maxInFlight, handler: handler, pending: make(map[stack.TransportEndpointID]*TCPRequest)}
	f.gvisor = tcp.NewForwarder(s.st, bufferDefault, maxInFlight, f.serve)
	s.tcp = f
	s.st.SetTransportProtocolHandler(tcp.ProtocolNumber, f.handle)
}

// handle is gVisor's default handler of TCP. A false result makes gVisor
// answer with a RST.
func (f *tcpForwarder) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := pkt.TransportHeader().Slice()
	if len(h) < header.TCPMinimumSize || h[13]&(flagSYN|flagACK|flagRST) != flagSYN {
		return false
	}
	if !f.reserve(id, pkt) {
		return true
	}
	if !f.gvisor.HandlePacket(id, pkt) {
		f.release(id)
		f.s.handlers.Done()
		return false
	}
	return true
}

// reserve makes a request for the SYN pkt. It returns false when the SYN is to
// be ignored: it is a repetition, or there are too many requests.
func (f *tcpForwarder) reserve(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	f.s.mu.RLock()
	defer f.s.mu.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.pending[id]; ok || f.s.closed {
		return false
	}
	if len(f.pending) >= f.max {
		f.s.dev.counters.forwardFull.Add(1)
		return false
	}
	ip, h := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	r := &TCPRequest{f: f, id: id, syn: make([]byte, 0, len(ip)+len(h))}
	r.syn = append(append(r.syn, ip...), h...)
	f.pending[id] = r
	f.s.handlers.Add(1)
	return true
}

func (f *tcpForwarder) release(id stack.TransportEndpointID) {
	f.mu.Lock()
	delete(f.pending, id)
	f.mu.Unlock()
}

// serve runs the handler, on a goroutine that gVisor's Forwarder started.
func (f *tcpForwarder) serve(g *tcp.ForwarderRequest) {
	defer f.s.handlers.Done()
	deep.Stack()
	f.mu.Lock()
	r := f.pending[g.ID()]
	f.mu.Unlock()
	r.gvisor = g
	defer r.Reject(nil)
	f.handler(r)
}

// TCPRequest is a connection a client of the tunnel asks for. Its SYN has not
// been answered: one of Accept and Reject is to be called, and a request whose
// handler returns without either is dropped in silence.
type TCPRequest struct {
	f      *tcpForwarder
	gvisor *tcp.ForwarderRequest
	id     stack.TransportEndpointID
	syn    []byte // IP and TCP header
	done   atomic.Bool
}

// Source returns the client's address and port.
func (r *TCPRequest) Source() netip.AddrPort {
	return netip.AddrPortFrom(netipAddr(r.id.RemoteAddress), r.id.RemotePort)
}

// Destination returns where the client wants to.
func (r *TCPRequest) Destination() netip.AddrPort {
	return netip.AddrPortFrom(netipAddr(r.id.LocalAddress), r.id.LocalPort)
}

// Accept completes the handshake with the client. It returns when that is
// done, or with an error when the client has gone away. The request counts as
// in flight until then.
func (r *TCPRequest) Accept() (*Conn, error) {
	if !r.done.CompareAndSwap(false, true) {
		return nil, r.error(syscall.EINVAL)
	}
	defer r.complete(false)
	r.f.s.mu.RLock()
	closed := r.f.s.closed
	r.f.s.mu.RUnlock()
	if closed {
		return nil, r.error(net.ErrClosed)
	}
	wq := new(waiter.Queue)
	ep, err := r.gvisor.CreateEndpoint(wq)
	if err != nil {
		return nil, r.error(sysError("accept", err))
	}
	return r.f.s.newConn(ep, wq), nil
}

func (r *TCPRequest) error(err error) error {
	return &net.OpError{Op: "accept", Net: "tcp", Source: net.TCPAddrFromAddrPort(r.Destination()), Addr: net.TCPAddrFromAddrPort(r.Source()), Err: err}
}

// complete ends the request. gVisor's part goes first: a SYN that came in
// between would otherwise find the place here free and there taken, and its
// request would never be served.
func (r *TCPRequest) complete(reset bool) {
	r.gvisor.Complete(reset)
	r.f.release(r.id)
}

// Reject answers the SYN with what err says: ECONNREFUSED gives a RST;
// EHOSTUNREACH, ENETUNREACH and EACCES (or EPERM) the ICMP unreachable of that
// meaning; nil and timeouts silence. Any other error gives a RST. After Accept,
// or a second time, Reject does nothing.
func (r *TCPRequest) Reject(err error) {
	if !r.done.CompareAndSwap(false, true) {
		return
	}
	var u Unreachable
	switch n := errno(err); {
	case err == nil, errors.Is(err, os.ErrDeadlineExceeded), n != 0 && n.Timeout(), isTimeout(err):
		r.complete(false)
		return
	case n == syscall.EHOSTUNREACH:
		u = UnreachableHost
	case n == syscall.ENETUNREACH:
		u = UnreachableNet
	case n == syscall.EACCES, n == syscall.EPERM:
		u = UnreachableProhibited
	default:
		r.complete(true)
		return
	}
	r.complete(false)
	r.f.s.dev.unreachable(u, r.Source().Addr(), r.Destination().Addr(), r.syn, nil)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// endTimeWait makes room for a client that uses a port again while the last
// connection's TIME-WAIT isn't over. gVisor passes such a SYN on only to a
// listening endpoint, and a forwarder is none: it would be lost. p is a SYN.
func (s *Stack) endTimeWait(p *packet) {
	t := p.payload()
	id := stack.TransportEndpointID{
		LocalAddress:  tcpipAddr(p.destination()),
		LocalPort:     binary.BigEndian.Uint16(t[2:]),
		RemoteAddress: tcpipAddr(p.source()),
		RemotePort:    binary.BigEndian.Uint16(t),
	}
	e := s.st.FindTransportEndpoint(protocolOf(p.source()), tcp.ProtocolNumber, id, nicID)
	if ep, ok := e.(*tcp.Endpoint); ok && ep.EndpointState() == tcp.StateTimeWait {
		// This sends a RST of the old connection, which the client, waiting
		// for an answer to its SYN, ignores (RFC 9293 section 3.10.7.3).
		ep.Abort()
	}
}

// ForwardUDP hands every datagram that no socket of the stack takes to handler,
// inline from Input and whole: fragments have been put together. A datagram to
// an address of the stack goes to the socket bound to its port, if there is
// one. Destinations may be broadcast and multicast addresses. payload is valid until handler returns. The stack must have been made
// with Config.Forward. To be called once, before the first Input.
func (s *Stack) ForwardUDP(handler func(from, to netip.AddrPort, payload []byte)) {
	if !s.forward || s.udp != nil {
		panic("netstack: ForwardUDP without Config.Forward, or twice")
	}
	s.udp = handler
	s.st.SetTransportProtocolHandler(header.UDPProtocolNumber, s.handleUDP)
}

// forwardUDP takes the short way to the handler for a datagram to a foreign
// address, which no socket can be bound to. It reports whether it did.
func (s *Stack) forwardUDP(p *packet) bool {
	to := p.destination()
	if s.isOwn(to) {
		return false
	}
	u := p.payload()
	if len(u) < header.UDPMinimumSize {
		s.dev.counters.dropMalformed.Add(1)
		return true
	}
	n := int(binary.BigEndian.Uint16(u[4:]))
	if n < header.UDPMinimumSize || n > len(u) {
		s.dev.counters.dropMalformed.Add(1)
		return true
	}
	s.udp(netip.AddrPortFrom(p.source(), binary.BigEndian.Uint16(u)),
		netip.AddrPortFrom(to, binary.BigEndian.Uint16(u[2:])), u[header.UDPMinimumSize:n])
	return true
}

// handleUDP is gVisor's default handler of UDP: it gets what was put together
// from fragments, and what is for an address of the stack and no socket.
func (s *Stack) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	b, ok := pkt.Data().PullUp(pkt.Data().Size())
	if !ok {
		return false
	}
	s.udp(netip.AddrPortFrom(netipAddr(id.RemoteAddress), id.RemotePort),
		netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort), b)
	return true
}
