package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

// egressSocketBuffer is asked of the host for every UDP socket, in bytes; the
// host may give less. It is memory only while datagrams wait.
const egressSocketBuffer = 1 << 20

// dnsPort marks mappings that live only for a question and its answer.
const dnsPort = 53

// egressUDPFlow is the mapping of one client address and port to one socket of
// the host (RFC 4787: endpoint-independent mapping and filtering).
type egressUDPFlow struct {
	flow *egressFlow
	sock *egressUDPSocket
}

// endFlow closes the socket, which ends the mapping's goroutine.
func (f *egressUDPFlow) endFlow() { f.sock.close() }

// udpReassembled takes the datagrams that came in fragments.
func (e *sockets) udpReassembled(from, to netip.AddrPort, payload []byte) {
	if e.own(to.Addr()) {
		// Nobody listens there, or the netstack would not ask.
		e.count.forbidden.Add(1)
		e.stack.RejectUDP(from, to, payload, netstack.UnreachablePort)
		return
	}
	e.udpOutbound(from, to, payload)
}

// udpOutbound sends a client's datagram, opening the mapping if there is none.
// When the limits leave no room the datagram is dropped and counted.
func (e *sockets) udpOutbound(from, to netip.AddrPort, payload []byte) {
	if to.Port() == 0 || from.Port() == 0 {
		e.count.udpInvalid.Add(1)
		return
	}
	if e.policy.verdict(to.Addr()) != egressAllow {
		e.count.forbidden.Add(1)
		e.stack.RejectUDP(from, to, payload, netstack.UnreachableProhibited)
		return
	}
	pace := egressSlow
	if to.Port() == dnsPort {
		pace = egressQuick
	}
	now := e.now()
	f := e.flows.lookup(egressKey{egressKindUDP, from}, pace, now)
	if f == nil {
		if f = e.openUDP(from, pace, now); f == nil {
			return
		}
	}
	err := f.end.(*egressUDPFlow).sock.send(payload, to)
	switch {
	case err == nil:
		e.count.udpOut.Add(1)
		e.count.udpBytesOut.Add(uint64(len(payload)))
	case errors.Is(err, errEgressFull):
		e.count.udpFull.Add(1)
	default:
		e.count.udpSendFailed.Add(1)
		if code, ok := unreachableOf(err); ok {
			e.stack.RejectUDP(from, to, payload, code)
		}
	}
}

// errEgressFull is a send that would have had to wait.
var errEgressFull = errors.New("send buffer full")

// unreachableOf says which ICMP message tells a client about an error of send.
func unreachableOf(err error) (netstack.Unreachable, bool) {
	switch {
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EAFNOSUPPORT), errors.Is(err, syscall.EADDRNOTAVAIL):
		return netstack.UnreachableNet, true
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN):
		return netstack.UnreachableHost, true
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return netstack.UnreachableProhibited, true
	}
	return 0, false
}

// openUDP makes the mapping for a client's address and port. nil means that it
// could not be made, which has been counted.
func (e *sockets) openUDP(from netip.AddrPort, pace egressPace, now time.Time) *egressFlow {
	f := e.admit(egressKindUDP, from, pace, now)
	if f == nil {
		return nil
	}
	sock, err := openEgressUDP(from.Addr().Is6())
	if err != nil {
		e.count.udpNoSocket.Add(1)
		e.flows.drop(f)
		return nil
	}
	mine := &egressUDPFlow{flow: f, sock: sock}
	got := e.flows.insert(f, mine)
	if got != f {
		sock.close()
		if got == nil {
			e.count.notRunning.Add(1)
		}
		return got
	}
	if !e.begin() {
		sock.close()
		e.flows.drop(f)
		e.count.notRunning.Add(1)
		return nil
	}
	go e.udpInboundLoop(mine)
	return f
}

// listenEgressUDP opens an unconnected UDP socket of one family that the
// kernel lets talk to unicast destinations only.
func listenEgressUDP(v6 bool) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: egressUDPControl}
	network, at := "udp4", "0.0.0.0:0"
	if v6 {
		network, at = "udp6", "[::]:0"
	}
	c, err := lc.ListenPacket(context.Background(), network, at)
	if err != nil {
		return nil, err
	}
	u := c.(*net.UDPConn)
	_ = u.SetReadBuffer(egressSocketBuffer) // best effort: the kernel cuts it to what it allows
	_ = u.SetWriteBuffer(egressSocketBuffer)
	return u, nil
}

// egressGather is how many datagrams that have come are given to Output at once,
// about: the client's end works on them while the next are read.
const egressGather = 16

// udpInboundLoop reads the mapping's socket until it is closed and gives what
// arrives, from whomever, to the client.
func (e *sockets) udpInboundLoop(f *egressUDPFlow) {
	defer e.wg.Done()
	defer e.flows.drop(f.flow)
	defer f.sock.close()
	in := f.sock.reader()
	for {
		r, err := in.read(true)
		out := egressOuts.Get().(*egressOut)
		for r != nil {
			e.udpReceived(out, f.flow.key.from, r)
			in.release()
			if r = nil; len(out.pkts) < egressGather {
				r, err = in.read(false)
			}
		}
		e.flush(out)
		egressOuts.Put(out)
		if err != nil {
			return
		}
	}
}

// udpReceived puts what was read into out, or tells the client of an error.
func (e *sockets) udpReceived(out *egressOut, client netip.AddrPort, r *egressRead) {
	if r.failed {
		// An ICMP error about a datagram of this mapping.
		e.count.udpErrors.Add(1)
		e.stack.RejectUDP(client, r.peer, r.data, r.code)
		return
	}
	e.udpInbound(out, r.peer, client, r.data, r.size)
}

// egressRead is what one read of a UDP socket gave: datagrams of size bytes
// each, the last one maybe shorter, one behind another in data, from one peer; or
// an error report about a datagram to peer. It is valid until release.
type egressRead struct {
	peer   netip.AddrPort
	data   []byte
	size   int
	failed bool
	code   netstack.Unreachable
}

// egressOut is the memory of one batch given to Output.
type egressOut struct {
	buf  [128 << 10]byte
	used int
	pkts [][]byte
}

var egressOuts = sync.Pool{New: func() any { return new(egressOut) }}

// udpInbound puts the datagrams in data into out, for the client. Those that need
// fragments leave at once.
func (e *sockets) udpInbound(out *egressOut, peer, client netip.AddrPort, data []byte, size int) {
	if e.policy.verdict(peer.Addr()) != egressAllow {
		e.count.udpInForbidden.Add(1)
		return
	}
	hl := ipHeaderLen(client.Addr()) + udpHeaderLen
	for first := true; first || len(data) > 0; first = false {
		d := data[:min(size, len(data))]
		data = data[len(d):]
		e.count.udpIn.Add(1)
		e.count.udpBytesIn.Add(uint64(len(d)))
		if hl+len(d) > e.cfg.MTU {
			e.flush(out) // not to overtake those before
			if err := e.stack.WriteUDP(peer, client, d); err != nil {
				e.count.udpInFailed.Add(1)
			}
			continue
		}
		n := e.cfg.Headroom + hl + len(d) + e.cfg.Tailroom
		if out.used+n > len(out.buf) {
			e.flush(out)
		}
		b := out.buf[out.used : out.used+n : out.used+n]
		out.used += n
		pkt := b[e.cfg.Headroom : e.cfg.Headroom+hl+len(d)]
		copy(pkt[hl:], d)
		putIPHeader(pkt, peer.Addr(), client.Addr(), protoUDP)
		putUDPHeader(pkt, peer, client)
		out.pkts = append(out.pkts, b)
	}
}

// flush gives the batch to Output.
func (e *sockets) flush(out *egressOut) {
	if len(out.pkts) == 0 {
		return
	}
	e.cfg.Output(out.pkts)
	clear(out.pkts)
	out.pkts, out.used = out.pkts[:0], 0
}
