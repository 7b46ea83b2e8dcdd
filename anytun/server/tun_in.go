package server

import (
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// inBatch is what readLoop works with.
type inBatch struct {
	view, quote packet.View
	flows       flowMemory
	acks        thinner
	packets     uint64   // for clients
	bytes       uint64   // of those
	out         [][]byte // to clients
	replies     [][]byte // back to the kernel
}

// inward finds the client that a packet from outside is for. buf has the
// tunnel's room around the packet.
func (e *tunEgress) inward(b *inBatch, buf []byte) {
	var flow *translation
	key, protocol, l4 := plain(inside(buf))
	if l4 > 0 && len(inside(buf)) <= e.MTU {
		var known bool
		if flow, known = b.flows.slot(key, protocol); known {
			flow.apply(inside(buf))
			b.take(buf, protocol, l4)
			return
		}
		flow.note(key, protocol, l4)
	}
	v := &b.view
	if v.Parse(inside(buf)) != packet.OK {
		e.count.drop(TunDropMalformed)
		return
	}
	if v.Fragmented {
		whole, why := e.inFragments.Add(v, time.Now())
		if whole == nil {
			e.count.fragment(why)
			return
		}
		e.count.reassembled.Add(1)
		buf = room(len(whole))
		copy(inside(buf), whole)
		if v.Parse(inside(buf)) != packet.OK {
			e.count.drop(TunDropMalformed)
			return
		}
	}
	if e.echo(b, v) {
		return
	}
	if why := e.translateIn(v, &b.quote); why != tunPass {
		e.count.drop(why)
		return
	}
	if flow != nil {
		flow.learn(b.flows.batch, v.Bytes, false)
		b.take(buf, protocol, l4)
		return
	}
	b.packets++
	b.bytes += uint64(len(v.Bytes))
	b.out = e.appendInner(b.out, buf, v)
}

// take adds a plain packet for a client to the batch.
func (b *inBatch) take(buf []byte, protocol packet.Protocol, l4 int) {
	b.packets++
	b.bytes += uint64(len(inside(buf)))
	b.out = append(b.out, buf)
	if protocol == packet.TCP {
		b.acks.add(b.out, l4)
	}
}

// appendInner appends the buffer of a packet for a client to list, or those of
// its fragments if it is larger than the tunnel's MTU.
func (e *tunEgress) appendInner(list [][]byte, buf []byte, v *packet.View) [][]byte {
	if len(v.Bytes) <= e.MTU {
		return append(list, buf)
	}
	v.FillChecksums()
	mark := len(list)
	if !packet.Fragment(v.Bytes, e.MTU, e.fragmentID.Add(1), func(n int) []byte {
		f := room(n)
		list = append(list, f)
		return inside(f)
	}) {
		e.count.drop(TunDropFragment)
		return list[:mark]
	}
	return list
}

// translateIn gives a packet the inner address, and port, of the client that its
// destination belongs to.
func (e *tunEgress) translateIn(v, q *packet.View) TunDrop {
	if v.IsICMPError() {
		return e.translateErrorIn(v, q)
	}
	if !v.HasPorts {
		return TunDropProtocol
	}
	client, ok := e.Plan.Inward(v.Destination, v.DestinationPort, e.Leases)
	if !ok {
		return TunDropNobody
	}
	if e.AnyPort(client) {
		port, ok := e.nat.Inward(client, v.Protocol, v.DestinationPort, v.TCPFlags)
		if !ok {
			return TunDropNobody
		}
		v.SetDestinationPort(port)
	}
	v.SetDestination(e.innerAddress(client, v.Version))
	e.clamp(v)
	if v.Protocol == packet.ICMPv6 {
		v.FillChecksums()
	}
	return tunPass
}

// translateErrorIn does the same to an ICMP error and to the client's packet
// that it quotes, which is how path-MTU discovery and traceroute work.
func (e *tunEgress) translateErrorIn(v, q *packet.View) TunDrop {
	if v.Quoted(q) != packet.OK || !q.HasPorts || q.Source != v.Destination {
		return TunDropQuote
	}
	client, ok := e.Plan.Inward(q.Source, q.SourcePort, e.Leases)
	if !ok {
		return TunDropNobody
	}
	port := q.SourcePort
	if e.AnyPort(client) {
		if port, ok = e.nat.Inward(client, q.Protocol, port, 0); !ok {
			return TunDropNobody
		}
	}
	inner := e.innerAddress(client, v.Version)
	v.SetDestination(inner)
	if !v.SetQuotedSource(q, inner, port) {
		return TunDropQuote
	}
	v.FillChecksums()
	e.count.errorsIn.Add(1)
	return tunPass
}

// echo answers pings to the egress addresses, which otherwise nobody has. It
// says whether v was one.
func (e *tunEgress) echo(b *inBatch, v *packet.View) bool {
	var reply byte
	switch {
	case v.Protocol == packet.ICMPv4 && v.Version == 4 && v.ICMPType == icmpEchoRequest:
		reply = icmpEchoReply
	case v.Protocol == packet.ICMPv6 && v.Version == 6 && v.ICMPType == icmpv6EchoRequest:
		reply = icmpv6EchoReply
	default:
		return false
	}
	ok := e.Plan.Contains(v.Destination)
	if ok {
		e.echoMu.Lock()
		ok = e.echoes.Take(time.Now(), echoRate, echoBurst)
		e.echoMu.Unlock()
	}
	if !ok {
		e.count.drop(TunDropNobody)
		return true
	}
	// An answer begins a way of its own, whatever the question's was like.
	if v.Version == 4 {
		v.Bytes[8] = egressTTL
	} else {
		v.Bytes[7] = egressTTL
	}
	source, destination := v.Source, v.Destination
	v.SetSource(destination)
	v.SetDestination(source)
	v.Upper()[0] = reply
	v.FillChecksums()
	b.replies = append(b.replies, v.Bytes)
	e.count.echoes.Add(1)
	return true
}
