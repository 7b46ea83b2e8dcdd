package server

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/netstack/splice"
)

// egressPingOpen opens an ICMP socket: a ping socket, which the kernel gives to
// users in net.ipv4.ping_group_range and which sees nothing but the replies to
// its own requests, or a raw one, which needs CAP_NET_RAW and sees all replies.
type egressPingOpen func(v6, raw bool) (*egressUDPSocket, error)

// egressPingMode is how pings leave, found out once per family.
type egressPingMode uint8

const (
	egressPingOff  egressPingMode = iota
	egressPingUser                // a ping socket per client and echo identifier
	egressPingRaw                 // one raw socket for all
)

func (m egressPingMode) String() string {
	switch m {
	case egressPingUser:
		return "ping sockets"
	case egressPingRaw:
		return "raw socket"
	default:
		return "none"
	}
}

// egressPing is the ping service; index 0 is IPv4, 1 is IPv6.
type egressPing struct {
	open egressPingOpen
	mode [2]egressPingMode
	raw  [2]*egressRawPing
}

// egressPingFlow maps a client's address and echo identifier to a socket of its
// own, or to an identifier of the raw socket.
type egressPingFlow struct {
	flow *egressFlow
	sock *egressUDPSocket
	raw  *egressRawPing // nil: sock is the flow's own
	id   uint16         // with raw: the identifier outside
}

// endFlow gives back what the mapping holds.
func (f *egressPingFlow) endFlow() {
	if f.raw != nil {
		f.raw.free(f)
		return
	}
	f.sock.close()
}

// egressRawPings is how many mappings share a raw socket at most.
const egressRawPings = 1 << 15

// egressRawPing shares a raw socket among mappings by identifiers of its own,
// since those that clients choose may be equal.
type egressRawPing struct {
	sock *egressUDPSocket

	mu sync.Mutex
	id map[uint16]*egressPingFlow
}

// alloc gives f an identifier that is free, from a random start: one that was
// just given back should not be the next, or late replies would reach a
// stranger. Only half of them are given, so that one is found after a look or
// two.
func (r *egressRawPing) alloc(f *egressPingFlow) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.id) >= egressRawPings {
		return false
	}
	id := uint16(rand.Uint32())
	for r.id[id] != nil {
		id++
	}
	r.id[id] = f
	f.id = id
	return true
}

func (r *egressRawPing) free(f *egressPingFlow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.id[f.id] == f {
		delete(r.id, f.id)
	}
}

func (r *egressRawPing) find(id uint16) *egressPingFlow {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.id[id]
}

// openEgressPing finds out how this host lets pings leave, and says so once.
func openEgressPing(e *sockets, open egressPingOpen) *egressPing {
	if open == nil {
		open = openPingSocket
	}
	p := &egressPing{open: open}
	var why error
	for i, v6 := range [...]bool{false, true} {
		s, err := open(v6, false)
		if err == nil {
			s.close()
			p.mode[i] = egressPingUser
			continue
		}
		why = err
		if s, err = open(v6, true); err != nil {
			continue
		}
		if !e.begin() {
			s.close()
			return p
		}
		p.mode[i] = egressPingRaw
		p.raw[i] = &egressRawPing{sock: s, id: make(map[uint16]*egressPingFlow)}
		go e.rawPingLoop(p.raw[i])
	}
	if p.mode[0] == egressPingOff || p.mode[1] == egressPingOff {
		e.log.Warn("pings of clients are dropped, because this host gives no ICMP socket",
			"ipv4", p.mode[0].String(), "ipv6", p.mode[1].String(), "error", why,
			"hint", "let the server's group in with sysctl net.ipv4.ping_group_range")
	} else {
		e.log.Info("pings of clients leave through the host", "ipv4", p.mode[0].String(), "ipv6", p.mode[1].String())
	}
	return p
}

// close ends what the service holds besides the mappings.
func (p *egressPing) close() {
	if p == nil {
		return
	}
	for _, r := range p.raw {
		if r != nil {
			r.sock.close()
		}
	}
}

// pingOutbound sends a client's echo request to its destination.
func (e *sockets) pingOutbound(p *egressPacket) {
	if p.fragment || len(p.payload) < icmpEchoLen {
		e.count.pingFragment.Add(1)
		return
	}
	if e.policy.verdict(p.dst) != egressAllow {
		e.count.forbidden.Add(1)
		return
	}
	from := netip.AddrPortFrom(p.src, binary.BigEndian.Uint16(p.payload[4:]))
	now := e.now()
	f := e.flows.lookup(egressKey{egressKindPing, from}, egressQuick, now)
	if f == nil {
		if f = e.openPing(from, now); f == nil {
			return
		}
	}
	ping := f.end.(*egressPingFlow)
	buf := splice.Get()
	defer splice.Put(buf)
	msg := buf[:copy(buf[:], p.payload)]
	binary.BigEndian.PutUint16(msg[4:], ping.id)
	if p.dst.Is4() {
		// Ping sockets and ICMPv6 sockets do it themselves; raw ones don't.
		putICMPChecksum(msg, 0)
	}
	if err := ping.sock.send(msg, netip.AddrPortFrom(p.dst, 0)); err != nil {
		e.count.pingSendFailed.Add(1)
		return
	}
	e.count.pingOut.Add(1)
}

// openPing makes the mapping for a client's address and echo identifier. nil
// means that it could not be made, which has been counted.
func (e *sockets) openPing(from netip.AddrPort, now time.Time) *egressFlow {
	family := 0
	if from.Addr().Is6() {
		family = 1
	}
	mode := e.ping.mode[family]
	if mode == egressPingOff {
		e.count.pingNoSocket.Add(1)
		return nil
	}
	f := e.admit(egressKindPing, from, egressQuick, now)
	if f == nil {
		return nil
	}
	mine := &egressPingFlow{flow: f}
	if mode == egressPingRaw {
		mine.raw = e.ping.raw[family]
		mine.sock = mine.raw.sock
		if !mine.raw.alloc(mine) {
			e.count.pingNoSocket.Add(1)
			e.flows.drop(f)
			return nil
		}
	} else {
		s, err := e.ping.open(from.Addr().Is6(), false)
		if err != nil {
			e.count.pingNoSocket.Add(1)
			e.flows.drop(f)
			return nil
		}
		mine.sock = s
	}
	got := e.flows.insert(f, mine)
	if got != f {
		mine.endFlow()
		if got == nil {
			e.count.notRunning.Add(1)
		}
		return got
	}
	if mode == egressPingUser {
		if !e.begin() {
			mine.endFlow()
			e.flows.drop(f)
			e.count.notRunning.Add(1)
			return nil
		}
		go e.pingInboundLoop(mine)
	}
	return f
}

// pingInboundLoop gives the replies of a mapping's own socket to the client
// until the socket is closed.
func (e *sockets) pingInboundLoop(f *egressPingFlow) {
	defer e.wg.Done()
	defer e.flows.drop(f.flow)
	defer f.endFlow()
	in := f.sock.reader()
	for {
		r, err := in.read(true)
		if err != nil {
			return
		}
		if msg := echoReply(r); msg != nil {
			e.pingInbound(r.peer.Addr(), f.flow.key.from, msg)
		} else {
			e.count.pingStray.Add(1)
		}
		in.release()
	}
}

// rawPingLoop gives the replies that a raw socket sees to the clients whose
// they are, until the socket is closed.
func (e *sockets) rawPingLoop(raw *egressRawPing) {
	defer e.wg.Done()
	defer raw.sock.close()
	in := raw.sock.reader()
	for {
		r, err := in.read(true)
		if err != nil {
			return
		}
		var f *egressPingFlow
		msg := echoReply(r)
		if msg != nil {
			f = raw.find(binary.BigEndian.Uint16(msg[4:]))
		}
		if f != nil {
			e.pingInbound(r.peer.Addr(), f.flow.key.from, msg)
		} else {
			e.count.pingStray.Add(1) // as a rule another process's reply
		}
		in.release()
	}
}

// echoReply returns the ICMP message in what a socket has read, or nil if it is
// not an echo reply.
func echoReply(r *egressRead) []byte {
	b := r.data
	v6 := r.peer.Addr().Is6()
	if !v6 && len(b) >= ipv4HeaderLen && b[0]>>4 == 4 {
		// Raw sockets deliver the header too; no echo reply begins with 4.
		b = b[min(len(b), int(b[0]&15)*4):]
	}
	want := byte(icmpEchoReply)
	if v6 {
		want = icmpv6EchoReply
	}
	if r.failed || len(b) < icmpEchoLen || b[0] != want {
		return nil
	}
	return b
}

// pingInbound gives an echo reply to the client, under the identifier that the
// client knows.
func (e *sockets) pingInbound(peer netip.Addr, client netip.AddrPort, msg []byte) {
	if e.policy.verdict(peer) != egressAllow {
		e.count.pingStray.Add(1)
		return
	}
	hl := ipHeaderLen(client.Addr())
	if hl+len(msg) > e.cfg.MTU {
		e.count.pingOversize.Add(1)
		return
	}
	out := egressOuts.Get().(*egressOut)
	defer egressOuts.Put(out)
	n := e.cfg.Headroom + hl + len(msg) + e.cfg.Tailroom
	b := out.buf[:n:n]
	pkt := b[e.cfg.Headroom : e.cfg.Headroom+hl+len(msg)]
	copy(pkt[hl:], msg)
	reply := pkt[hl:]
	binary.BigEndian.PutUint16(reply[4:], client.Port())
	if client.Addr().Is4() {
		putIPHeader(pkt, peer, client.Addr(), protoICMP)
		putICMPChecksum(reply, 0)
	} else {
		putIPHeader(pkt, peer, client.Addr(), protoICMPv6)
		putICMPChecksum(reply, packet.PseudoSum(peer, client.Addr(), protoICMPv6, len(reply)))
	}
	out.pkts = append(out.pkts, b)
	e.flush(out)
	e.count.pingIn.Add(1)
}

// putICMPChecksum sets the checksum of a message; pseudo is the sum of what
// else it covers.
func putICMPChecksum(msg []byte, pseudo uint16) {
	msg[2], msg[3] = 0, 0
	binary.BigEndian.PutUint16(msg[2:], packet.Checksum(msg, pseudo))
}
