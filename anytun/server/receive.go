package server

import (
	"errors"
	"net"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// The road in, all of it in one receiveLoop per socket:
//
//	ReadBatch   what the kernel has, datagrams of one endpoint together
//	open        find or derive the session, once per run of its packets; decrypt
//	            in place; drop what is forged, replayed or nobody's
//	route       spoofed, service, egress or another client
//	deliver     the whole batch at once to the egress; packets for other
//	            clients are sealed again where they lie
//	poll        what the tun device has by now, for the other direction
//
// Handshakes go to handshakeLoop through a bounded queue (handshake.go).

// receiver is the state of one receiveLoop.
type receiver struct {
	*Server
	conn   udp.Conn
	egress [][]byte // inner packets on their way out
	peers  [][]byte // whole datagrams whose packets go to other clients
	ctl    [][]byte // control messages of the run in hand
	lost   [][]byte // packets of the run in hand that can't reach anybody
	way    beaten   // of the run in hand, out
	now    time.Time
}

func (s *Server) receiveLoop(conn udp.Conn) error {
	r := &receiver{Server: s, conn: conn}
	device, _ := s.egress.(*tunEgress)
	for {
		groups, err := conn.ReadBatch()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		r.now = time.Now()
		r.egress, r.peers = r.egress[:0], r.peers[:0]
		for i := range groups {
			r.group(&groups[i])
		}
		if len(r.egress) > 0 {
			s.egress.Input(r.egress)
		}
		if len(r.peers) > 0 {
			s.output(r.peers)
		}
		if device != nil {
			device.poll()
		}
	}
}

// group handles the datagrams of one endpoint, run by run.
func (r *receiver) group(g *udp.Group) {
	for rest := g.Packets; len(rest) > 0; {
		if wire.TypeOf(rest[0]) != wire.TypeData {
			r.handshake(rest[0], g.From)
			rest = rest[1:]
			continue
		}
		h, err := wire.ParseData(rest[0])
		if err != nil {
			r.counters.drops[DropMalformed].Add(1)
			rest = rest[1:]
			continue
		}
		a, known, why := r.sessionOf(h, r.now)
		if a == nil {
			r.counters.drops[why].Add(1)
			rest = rest[1:]
			continue
		}
		rest = r.run(a, known, h, rest, g.From)
	}
}

// run opens the datagrams at the head of list that belong to session a; h is
// the header of the first. It returns what is left.
func (r *receiver) run(a *association, known bool, h wire.DataHeader, list [][]byte, from udp.Endpoint) [][]byte {
	var top, packets, bytes uint64
	r.ctl, r.lost = r.ctl[:0], r.lost[:0]
	r.way.length = 0 // another client's, perhaps
	a.mu.Lock()
	for {
		b := list[0]
		p, err := a.Open(b, h)
		switch {
		case err != nil:
			why := DropForged
			if errors.Is(err, session.ErrReplay) {
				why = DropReplay
			}
			r.counters.drops[why].Add(1)
		default:
			if !known {
				// The packet authenticates, so the session exists.
				mine := a
				a.mu.Unlock()
				a = r.enter(a, r.now)
				a.mu.Lock()
				known = true
				if a != mine && !a.Note(h) { // another reader has had it
					r.counters.drops[DropReplay].Add(1)
					break
				}
			}
			top = max(top, h.Counter)
			packets++
			bytes += uint64(len(p))
			r.packet(a, b, p)
		}
		list = list[1:]
		if len(list) == 0 || !known {
			break
		}
		next, err := wire.ParseData(list[0])
		if err != nil || next.SessionID != a.key.id || next.Epoch != a.key.epoch {
			break // group looks at it again
		}
		h = next
	}
	a.mu.Unlock()
	if packets == 0 {
		return list
	}
	r.counters.receivedPackets.Add(packets)
	r.counters.receivedBytes.Add(bytes)
	a.heard.Store(r.now.UnixNano())
	a.peer.heard.Store(r.now.UnixNano())
	if m := a.moved(top, from, r.conn, r.cfg.Number); m.changed {
		if m.roamed {
			r.counters.roamed.Add(1)
		}
		if m.news {
			r.publish(a.peer, r.now)
		}
		r.log.Debug("client is at", "client", a.Client, "endpoint", from.Addr)
	}
	for _, p := range r.ctl {
		r.control(a, p, top, from)
	}
	for _, p := range r.lost {
		r.reject(&path{association: a, to: from, conn: r.conn}, p, packet.HostUnreachable, r.now)
	}
	return list
}

// packet sorts one opened packet. b is the datagram it lies in.
func (r *receiver) packet(a *association, b, p []byte) {
	if r.way.leads(p) {
		r.egress = append(r.egress, p)
		return
	}
	if wire.IsControl(p) {
		r.ctl = append(r.ctl, p)
		return
	}
	v, to, why := route(p, a.Client, r.inner)
	if v == toClient && r.pathTo(to) == nil {
		v, why = toNowhere, DropOffline
	}
	switch v {
	case toEgress:
		r.egress = append(r.egress, p)
		r.way.note(p)
	case toClient:
		r.peers = append(r.peers, b)
	case toNowhere:
		r.counters.drops[why].Add(1)
		if why == DropOffline || why == DropNoRoute {
			r.lost = append(r.lost, p)
		}
	}
}

// control handles a control message of a run whose highest counter is top; answers
// go to where it came from.
func (r *receiver) control(a *association, p []byte, top uint64, from udp.Endpoint) {
	switch wire.Control(p[0]) {
	case wire.ControlKeepAlive:
		m, err := wire.ParseKeepAlive(p)
		if err != nil {
			r.counters.drops[DropMalformed].Add(1)
			return
		}
		r.sendControl(&path{association: a, to: from, conn: r.conn}, wire.AppendAlive(nil, wire.Alive{
			Server: r.cfg.Number, Token: m.Token, Observed: from.Addr,
		}))
	case wire.ControlAlive: // a sign of life is all it is
	case wire.ControlClose:
		if _, err := wire.ParseClose(p); err != nil {
			r.counters.drops[DropMalformed].Add(1)
			return
		}
		r.left(a, top, r.now)
	case wire.ControlPortsRequest:
		m, err := wire.ParsePortsRequest(p)
		if err != nil {
			r.counters.drops[DropMalformed].Add(1)
			return
		}
		r.requestPorts(&path{association: a, to: from, conn: r.conn}, m, r.now)
	default: // a later version's
		r.counters.drops[DropUnknownControl].Add(1)
	}
}
