package server

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/anytun-go/anytun/anytun/nat"
	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/session"
)

// outBatch is what one call of Input works with.
type outBatch struct {
	view, quote packet.View
	flows       flowMemory
	packets     uint64   // to the device
	bytes       uint64   // of those
	services    [][]byte // for the servers' own addresses
	out         [][]byte // to the device
	hairpin     [][]byte // whole datagrams for other clients, by their public ports
	now         time.Time
}

// Input implements Egress.
func (e *tunEgress) Input(pkts [][]byte) {
	b := e.scratch.Get().(*outBatch)
	b.now = time.Now()
	b.packets, b.bytes = 0, 0
	b.flows.begin()
	for _, p := range pkts {
		e.outward(b, p)
	}
	e.count.packetsOut.Add(b.packets)
	e.count.bytesOut.Add(b.bytes)
	if len(b.services) > 0 {
		e.Services.Input(b.services)
	}
	if len(b.out) > 0 {
		e.Device.WriteBatch(b.out)
	}
	if len(b.hairpin) > 0 {
		e.Output(b.hairpin)
	}
	clear(b.services)
	clear(b.out)
	clear(b.hairpin)
	b.services, b.out, b.hairpin = b.services[:0], b.out[:0], b.hairpin[:0]
	e.scratch.Put(b)
}

// outward sorts one packet of a client.
func (e *tunEgress) outward(b *outBatch, p []byte) {
	var flow *translation
	if key, protocol, l4 := plain(p); l4 > 0 {
		var known bool
		if flow, known = b.flows.slot(key, protocol); known {
			flow.apply(p)
			b.take(p)
			return
		}
		flow.note(key, protocol, l4)
	}
	v := &b.view
	if v.Parse(p) != packet.OK {
		e.count.drop(TunDropMalformed)
		return
	}
	if n, inner := e.Inner.Client(v.Destination); inner && n == session.Gateway {
		b.services = append(b.services, v.Bytes)
		return
	}
	client, ok := e.Inner.Client(v.Source)
	if !ok {
		e.count.drop(TunDropMalformed) // receive has checked it
		return
	}
	if e.Policy.verdict(v.Destination) != egressAllow {
		e.count.drop(TunDropForbidden)
		e.Reject(client, v.Bytes, packet.AdminProhibited)
		return
	}
	fragmented := v.Fragmented
	if fragmented {
		whole, why := e.outFragments.Add(v, b.now)
		if whole == nil {
			e.count.fragment(why)
			return
		}
		e.count.reassembled.Add(1)
		// What is put together has no checksum yet that the world would take.
		if v.Parse(whole) != packet.OK {
			e.count.drop(TunDropMalformed)
			return
		}
	}
	if why := e.translateOut(v, &b.quote, client); why != tunPass {
		e.count.drop(why)
		if why == TunDropPort || why == TunDropNAT {
			e.Reject(client, p, packet.AdminProhibited)
		}
		return
	}
	switch {
	case e.Plan.Contains(v.Destination):
		e.turn(b, v)
	case fragmented:
		// The identification must be one that nobody else behind this address
		// uses now; the client's may be.
		id := e.fragmentID.Add(1)
		if v.Version == 4 {
			binary.BigEndian.PutUint16(v.Bytes[4:], uint16(id))
		}
		v.FillChecksums() // the device can't do it for pieces
		mark := len(b.out)
		if !packet.Fragment(v.Bytes, e.MTU, id, func(n int) []byte {
			f := make([]byte, n)
			b.out = append(b.out, f)
			return f
		}) {
			b.out = b.out[:mark]
			e.count.drop(TunDropFragment)
			return
		}
		b.packets++
		b.bytes += uint64(len(v.Bytes))
	default:
		if flow != nil {
			flow.learn(b.flows.batch, v.Bytes, true)
		}
		b.take(v.Bytes)
	}
}

// take adds a packet for the device to the batch.
func (b *outBatch) take(p []byte) {
	b.packets++
	b.bytes += uint64(len(p))
	b.out = append(b.out, p)
}

// translateOut gives a packet the client's public address as its source, and
// for any-port clients a port of their block.
func (e *tunEgress) translateOut(v, q *packet.View, client uint32) TunDrop {
	if v.IsICMPError() {
		return e.translateErrorOut(v, q, client)
	}
	if !v.HasPorts || v.SourcePort == 0 && v.Protocol != packet.ICMPv4 && v.Protocol != packet.ICMPv6 {
		return TunDropProtocol
	}
	if e.isReply(v) {
		return TunDropProtocol // nobody outside can ask a client
	}
	inner := v.SourcePort
	port := inner
	if e.AnyPort(client) {
		public, ok := e.mapPort(client, v)
		if !ok {
			return TunDropNAT
		}
		v.SetSourcePort(public)
		port = public
	}
	address, ok := e.Plan.Outward(client, port, v.Version == 6, e.Leases)
	if !ok {
		if port != inner { // mapped to a block whose lease has ended
			e.nat.Forget(client, port, port)
		}
		return TunDropPort
	}
	if v.Protocol == packet.UDP && slices.Contains(e.Service, netip.AddrPortFrom(address, port)) {
		return TunDropPort // the answers would come to the servers
	}
	v.SetSource(address)
	e.clamp(v)
	if v.Protocol == packet.ICMPv4 || v.Protocol == packet.ICMPv6 {
		v.FillChecksums()
	}
	return tunPass
}

// mapPort finds the public port of an any-port client's packet, in its own block
// or else in those it has leased.
func (e *tunEgress) mapPort(client uint32, v *packet.View) (public uint16, ok bool) {
	place, ok := e.Plan.Of(client)
	if !ok {
		return 0, false
	}
	public, why := e.nat.Outward(client, v.Protocol, v.SourcePort, v.TCPFlags, place.First, place.Last)
	if why == nat.NoPorts {
		for _, block := range e.Leases.Blocks(client) {
			if place, ok = e.Plan.Block(block); !ok {
				continue
			}
			if public, why = e.nat.Outward(client, v.Protocol, v.SourcePort, v.TCPFlags, place.First, place.Last); why != nat.NoPorts {
				break
			}
		}
	}
	return public, why == nat.Mapped
}

// translateErrorOut does the same to an ICMP error of a client and to the packet
// from outside that it quotes.
func (e *tunEgress) translateErrorOut(v, q *packet.View, client uint32) TunDrop {
	// Errors go to whom the quoted packet came from; and no client is a router,
	// which could redirect.
	if v.Quoted(q) != packet.OK || !q.HasPorts || q.Destination != v.Source || q.Source != v.Destination ||
		v.Version == 4 && v.ICMPType == icmpRedirect {
		return TunDropQuote
	}
	port := q.DestinationPort
	if e.AnyPort(client) {
		var ok bool
		if port, ok = e.nat.Public(client, q.Protocol, port); !ok {
			return TunDropQuote
		}
	}
	address, ok := e.Plan.Outward(client, port, v.Version == 6, e.Leases)
	if !ok {
		return TunDropPort
	}
	v.SetSource(address)
	if !v.SetQuotedDestination(q, address, port) {
		return TunDropQuote
	}
	v.FillChecksums()
	e.count.errorsOut.Add(1)
	return tunPass
}

// turn takes a packet that a client sends to an egress address back in: the port
// is another client's, or its own.
func (e *tunEgress) turn(b *outBatch, v *packet.View) {
	buf := room(len(v.Bytes))
	copy(inside(buf), v.Bytes)
	if v.Parse(inside(buf)) != packet.OK {
		e.count.drop(TunDropMalformed)
		return
	}
	if why := e.translateIn(v, &b.quote); why != tunPass {
		e.count.drop(why)
		return
	}
	e.count.hairpinned.Add(1)
	b.hairpin = e.appendInner(b.hairpin, buf, v)
}

// clamp lowers the segment size that a SYN offers to what the tunnel carries.
func (e *tunEgress) clamp(v *packet.View) {
	if v.Protocol != packet.TCP || v.TCPFlags&packet.SYN == 0 {
		return
	}
	headers := 40
	if v.Version == 6 {
		headers = 60
	}
	v.ClampMSS(uint16(e.MTU - headers))
}

// isReply says whether v answers an echo request or the like, whose identifier is
// not the client's, even if it is 0.
func (*tunEgress) isReply(v *packet.View) bool {
	return v.Protocol == packet.ICMPv4 && (v.ICMPType == icmpEchoReply || v.ICMPType == icmpTimestampReply) ||
		v.Protocol == packet.ICMPv6 && v.ICMPType == icmpv6EchoReply
}
