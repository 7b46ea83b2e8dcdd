package udp

import "sync/atomic"

// DropReason says why a datagram was lost at the socket.
type DropReason uint8

// The reasons. The first group concerns sending; an ICMP message may show up
// while receiving too, and is counted under the same name.
const (
	// DropTooBig is EMSGSIZE: longer than UDP or the path can carry.
	DropTooBig DropReason = iota
	// DropUnreachable is EHOSTUNREACH, ENETUNREACH and their kin: no route.
	DropUnreachable
	// DropRefused is ECONNREFUSED: nobody listens there.
	DropRefused
	// DropDenied is EPERM or EACCES: a firewall of this host said no.
	DropDenied
	// DropQueueFull is ENOBUFS or ENOMEM: no room in a queue of this host.
	DropQueueFull
	// DropBadAddress is EINVAL, EADDRNOTAVAIL or EAFNOSUPPORT: this socket
	// can't send to that endpoint or from that local address.
	DropBadAddress
	// DropTruncated is a received message that did not fit its buffer.
	DropTruncated
	// DropBacklog is a received datagram that the kernel threw away because
	// the socket's receive buffer was full (Linux only).
	DropBacklog

	// NumDropReasons is the number of reasons above.
	NumDropReasons = iota
)

var dropNames = [NumDropReasons]string{
	DropTooBig:      "too_big",
	DropUnreachable: "unreachable",
	DropRefused:     "refused",
	DropDenied:      "denied",
	DropQueueFull:   "queue_full",
	DropBadAddress:  "bad_address",
	DropTruncated:   "truncated",
	DropBacklog:     "backlog",
}

// String is the reason's name as a metrics label.
func (r DropReason) String() string {
	if int(r) < len(dropNames) {
		return dropNames[r]
	}
	return "unknown"
}

// Traffic counts one direction of a socket.
type Traffic struct {
	Datagrams uint64 // UDP datagrams
	Bytes     uint64 // their payload
	Messages  uint64 // what the kernel was given or gave: one or many datagrams
	Calls     uint64 // system calls that moved at least one message
}

// Stats is a snapshot of a socket's counters.
type Stats struct {
	Received, Sent Traffic

	// Drops is indexed by DropReason.
	Drops [NumDropReasons]uint64

	// Resent counts messages whose segmentation the kernel refused and that
	// went out datagram by datagram instead.
	Resent uint64

	// RecvBuffer and SendBuffer are the sizes in bytes that the kernel
	// granted; less than asked means that the operator should raise
	// net.core.rmem_max and wmem_max. 0 where the system doesn't tell.
	RecvBuffer, SendBuffer int

	// SendOffload and RecvOffload say whether UDP_SEGMENT and UDP_GRO are in
	// use now.
	SendOffload, RecvOffload bool
}

// StatsReader is implemented by every Conn that Listen returns.
type StatsReader interface {
	Stats() Stats
}

// counters are Stats in the making.
type counters struct {
	received, sent direction
	drops          [NumDropReasons]atomic.Uint64
	resent         atomic.Uint64
}

type direction struct {
	datagrams, bytes, messages, calls atomic.Uint64
}

func (d *direction) add(datagrams, bytes, messages int) {
	d.datagrams.Add(uint64(datagrams))
	d.bytes.Add(uint64(bytes))
	d.messages.Add(uint64(messages))
	d.calls.Add(1)
}

func (d *direction) load() Traffic {
	return Traffic{
		Datagrams: d.datagrams.Load(),
		Bytes:     d.bytes.Load(),
		Messages:  d.messages.Load(),
		Calls:     d.calls.Load(),
	}
}

func (c *counters) drop(r DropReason, n int) { c.drops[r].Add(uint64(n)) }

func (c *counters) snapshot() Stats {
	s := Stats{Received: c.received.load(), Sent: c.sent.load(), Resent: c.resent.Load()}
	for i := range s.Drops {
		s.Drops[i] = c.drops[i].Load()
	}
	return s
}
