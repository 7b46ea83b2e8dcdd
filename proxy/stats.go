package proxy

import "sync/atomic"

// Kind is what an application asked for.
type Kind uint8

// The kinds of request.
const (
	KindSOCKS5Connect Kind = iota
	KindSOCKS5Bind
	KindSOCKS5Associate
	KindSOCKS5Resolve
	KindSOCKS5ResolvePTR
	KindSOCKS4Connect
	KindSOCKS4Bind
	KindHTTPConnect
	KindHTTPForward
	KindHTTPLocal // the proxy's own pages
	kindCount
)

var kindNames = [kindCount]string{
	"socks5_connect", "socks5_bind", "socks5_associate", "socks5_resolve", "socks5_resolve_ptr",
	"socks4_connect", "socks4_bind", "http_connect", "http_forward", "http_local",
}

// String is the kind's name in metrics and logs.
func (k Kind) String() string { return kindNames[k] }

// Drop says why a datagram of a UDP association went no further.
type Drop uint8

// The reasons for dropping a datagram.
const (
	DropMalformed Drop = iota // no readable SOCKS UDP header
	DropFragment              // FRAG was not 0, RFC 1928 section 7
	DropStranger              // not from the address that opened the association
	DropNoClient              // from the network, before the application's port is known
	DropName                  // the destination's name could not be looked up
	DropQueue                 // too many datagrams or look-ups wait for names
	DropTooBig                // larger than a datagram with its header may be
	DropSend                  // the network or the application's socket would not take it
	dropCount
)

var dropNames = [dropCount]string{
	"malformed", "fragment", "stranger", "no_client", "name", "queue", "too_big", "send",
}

// String is the drop's name in metrics.
func (d Drop) String() string { return dropNames[d] }

// Counters are the live numbers of a Server; handlers count into them.
type Counters struct {
	openConns, openTunnels, openAssociations     atomic.Int64
	accepted, limitWaits, acceptErrors           atomic.Uint64
	bytesOut, bytesIn, datagramsOut, datagramsIn atomic.Uint64
	idleTunnels, idleAssociations, bindStrangers atomic.Uint64
	requests                                     [kindCount]atomic.Uint64
	failures                                     [reasonCount]atomic.Uint64
	drops                                        [dropCount]atomic.Uint64
}

// Request counts a complete request.
func (c *Counters) Request(k Kind) { c.requests[k].Add(1) }

// Failure counts a failed request or handshake.
func (c *Counters) Failure(r Reason) { c.failures[r].Add(1) }

// Drop counts dropped datagrams.
func (c *Counters) Drop(d Drop, n int) { c.drops[d].Add(uint64(n)) }

// DatagramsOut counts datagrams sent to the network for an application.
func (c *Counters) DatagramsOut(n int) { c.datagramsOut.Add(uint64(n)) }

// DatagramsIn counts datagrams given to an application.
func (c *Counters) DatagramsIn(n int) { c.datagramsIn.Add(uint64(n)) }

// BindStranger counts a connection to a BIND listener from an address other than the declared one.
func (c *Counters) BindStranger() { c.bindStrangers.Add(1) }

// AssociationIdle counts an association ended for lack of datagrams.
func (c *Counters) AssociationIdle() { c.idleAssociations.Add(1) }

// OpenAssociations is the gauge of open UDP associations; the handler adds and subtracts.
func (c *Counters) OpenAssociations() *atomic.Int64 { return &c.openAssociations }

// Stats is a snapshot of a Server's counters. Each number is exact; the set is not taken at one instant.
type Stats struct {
	OpenConns        int64 // accepted and not yet closed
	OpenTunnels      int64 // of those, relaying bytes
	OpenAssociations int64 // of those, UDP associations

	Accepted         uint64 // connections accepted
	LimitWaits       uint64 // times a connection had to wait because MaxConns were open
	AcceptErrors     uint64 // failed accepts that were tried again (out of file descriptors)
	BytesOut         uint64 // relayed from applications to the network (SOCKS, HTTP CONNECT)
	BytesIn          uint64 // relayed from the network to applications
	DatagramsOut     uint64 // UDP datagrams from applications to the network
	DatagramsIn      uint64 // UDP datagrams from the network to applications
	IdleTunnels      uint64 // tunnels ended because nothing moved
	IdleAssociations uint64 // UDP associations ended because nothing moved
	BindStrangers    uint64 // connections to a BIND listener that were not the declared peer

	Requests map[string]uint64 // by Kind
	Failures map[string]uint64 // by Reason
	Drops    map[string]uint64 // datagrams dropped, by Drop
}

func (c *Counters) snapshot() Stats {
	s := Stats{
		OpenConns:        c.openConns.Load(),
		OpenTunnels:      c.openTunnels.Load(),
		OpenAssociations: c.openAssociations.Load(),
		Accepted:         c.accepted.Load(),
		LimitWaits:       c.limitWaits.Load(),
		AcceptErrors:     c.acceptErrors.Load(),
		BytesOut:         c.bytesOut.Load(),
		BytesIn:          c.bytesIn.Load(),
		DatagramsOut:     c.datagramsOut.Load(),
		DatagramsIn:      c.datagramsIn.Load(),
		IdleTunnels:      c.idleTunnels.Load(),
		IdleAssociations: c.idleAssociations.Load(),
		BindStrangers:    c.bindStrangers.Load(),
		Requests:         make(map[string]uint64, kindCount),
		Failures:         make(map[string]uint64, reasonCount),
		Drops:            make(map[string]uint64, dropCount),
	}
	for k := range kindCount {
		s.Requests[k.String()] = c.requests[k].Load()
	}
	for r := ReasonNone + 1; r < reasonCount; r++ {
		s.Failures[r.String()] = c.failures[r].Load()
	}
	for d := range dropCount {
		s.Drops[d.String()] = c.drops[d].Load()
	}
	return s
}
