package portblock

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
)

// MaxPrefixBits is the longest IPv6 prefix from which every client can have an
// address of its own: client numbers have 22 bits.
const MaxPrefixBits = 128 - 22

// Plan says which public addresses and ports are whose:
//
//	v4       egress IPv4 addresses, divided into blocks
//	v6       egress IPv6 addresses, divided the same way, or
//	prefix6  a prefix from which client n has the address prefix + n, all ports of it
//
// Block n is client n's own, unless [Leases] say otherwise. A Plan is arithmetic and
// never changes, so it is safe for concurrent use and may be copied. The zero
// value has no egress addresses. All servers of a cluster must have the same one.
type Plan struct {
	blocks Blocks
	v4, v6 []netip.Addr
	// index is where an address stands in v4 or v6.
	index   map[netip.Addr]int
	prefix6 netip.Prefix
}

// Place is a block's public addresses and ports. An address is the zero Addr where
// there is none of that family.
type Place struct {
	IPv4, IPv6  netip.Addr
	First, Last uint16
}

// NewPlan makes a plan of egress addresses, in the order that all servers agree on.
// Either of v6 and prefix6 may be given, or neither. If v6 is shorter than v4, the
// clients beyond its end have no public IPv6 address.
func NewPlan(blocks Blocks, v4, v6 []netip.Addr, prefix6 netip.Prefix) (Plan, error) {
	p := Plan{blocks: blocks, index: make(map[netip.Addr]int, len(v4)+len(v6))}
	for _, list := range []struct {
		from []netip.Addr
		to   *[]netip.Addr
		is4  bool
	}{{v4, &p.v4, true}, {v6, &p.v6, false}} {
		if uint64(len(list.from)) > math.MaxUint32/uint64(blocks.perAddress()) {
			return Plan{}, fmt.Errorf("%d egress addresses: too many", len(list.from))
		}
		for i, a := range list.from {
			switch {
			case a.Is4() != list.is4 || a.Is4In6() || a.Zone() != "" || !a.IsValid():
				return Plan{}, fmt.Errorf("egress address %v: wrong family", a)
			case a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
				return Plan{}, fmt.Errorf("egress address %v: not a unicast address", a)
			}
			if _, twice := p.index[a]; twice {
				return Plan{}, fmt.Errorf("egress address %v: given twice", a)
			}
			p.index[a] = i
			*list.to = append(*list.to, a)
		}
	}
	if prefix6 == (netip.Prefix{}) {
		return p, nil
	}
	switch a := prefix6.Addr(); {
	case len(v6) > 0:
		return Plan{}, fmt.Errorf("egress prefix %v: there are IPv6 egress addresses already", prefix6)
	case !prefix6.IsValid() || !a.Is6() || a.Is4In6():
		return Plan{}, fmt.Errorf("egress prefix %v: not IPv6", prefix6)
	case prefix6.Bits() > MaxPrefixBits:
		return Plan{}, fmt.Errorf("egress prefix %v: too small for all clients, must be /%d or shorter", prefix6, MaxPrefixBits)
	case prefix6 != prefix6.Masked():
		return Plan{}, fmt.Errorf("egress prefix %v: has bits behind its length, meant is perhaps %v", prefix6, prefix6.Masked())
	case a.IsMulticast():
		return Plan{}, fmt.Errorf("egress prefix %v: not unicast", prefix6)
	}
	p.prefix6 = prefix6
	return p, nil
}

// Clients is the highest client number that has a block, which is also the highest
// block: IPv4's if there are IPv4 addresses, else IPv6's; 0 if there are none.
func (p *Plan) Clients() uint32 {
	switch {
	case len(p.v4) > 0:
		return uint32(len(p.v4)) * p.blocks.perAddress()
	case len(p.v6) > 0:
		return uint32(len(p.v6)) * p.blocks.perAddress()
	}
	return p.prefixClients()
}

// prefixClients is the highest client number that has an address in prefix6.
func (p *Plan) prefixClients() uint32 {
	if !p.prefix6.IsValid() {
		return 0
	}
	return uint32(min(uint64(1)<<min(128-p.prefix6.Bits(), 32)-1, math.MaxUint32))
}

// Of is the place of a client: its own block, and its own IPv6 address if there is
// a prefix. If there is nothing but a prefix, the ports are all from FirstPort up.
func (p *Plan) Of(client uint32) (Place, bool) {
	place, ok := p.Block(client)
	if client > 0 && client <= p.prefixClients() {
		place.IPv6 = p.fromPrefix(client)
		if !ok && len(p.v4) == 0 {
			place.First, place.Last, ok = FirstPort, math.MaxUint16, true
		}
	}
	if !ok {
		return Place{}, false
	}
	return place, true
}

// Block is the place of a block, whoever has it. A plan with a prefix has no IPv6
// address there: an IPv6 address of such a plan has only one client.
func (p *Plan) Block(block uint32) (Place, bool) {
	i, first, last := p.blocks.Of(block)
	if i < 0 {
		return Place{}, false
	}
	place := Place{First: first, Last: last}
	if i < len(p.v4) {
		place.IPv4 = p.v4[i]
	}
	if i < len(p.v6) {
		place.IPv6 = p.v6[i]
	}
	if i >= len(p.v4) && (i >= len(p.v6) || len(p.v4) > 0) {
		return Place{}, false
	}
	return place, true
}

// Owner is the block that a port of an egress address belongs to; in a prefix, the
// client that the address belongs to.
func (p *Plan) Owner(dst netip.Addr, port uint16) (block uint32, ok bool) {
	if i, listed := p.index[dst]; listed {
		block, ok = p.blocks.Client(i, port)
		if block > p.Clients() {
			return 0, false // more IPv6 addresses than IPv4 ones need
		}
		return block, ok
	}
	if !p.prefix6.Contains(dst) {
		return 0, false
	}
	return p.inPrefix(dst)
}

// Contains says whether a is an egress address.
func (p *Plan) Contains(a netip.Addr) bool {
	if _, ok := p.index[a]; ok {
		return true
	}
	return p.prefix6.Contains(a)
}

// Outward is the public address for a packet that a client sends from an inner
// port, which stays as it is. It is false if the port is not the client's.
func (p *Plan) Outward(client uint32, port uint16, v6 bool, l *Leases) (netip.Addr, bool) {
	if v6 && p.prefix6.IsValid() {
		if client == 0 || client > p.prefixClients() {
			return netip.Addr{}, false
		}
		return p.fromPrefix(client), true
	}
	if port < FirstPort || client == 0 {
		return netip.Addr{}, false
	}
	position := (uint32(port) - FirstPort) / p.blocks.size()
	if position >= p.blocks.perAddress() {
		return netip.Addr{}, false
	}
	// Which of the client's blocks has its ports there?
	block := client
	if p.position(client) != position || l.othersBlock(client) {
		var leased bool
		if block, leased = l.at(client, position, p.blocks.perAddress()); !leased {
			return netip.Addr{}, false
		}
	}
	if block > p.Clients() {
		return netip.Addr{}, false
	}
	list := p.v4
	if v6 {
		list = p.v6
	}
	i := (block - 1) / p.blocks.perAddress()
	if uint64(i) >= uint64(len(list)) {
		return netip.Addr{}, false
	}
	return list[i], true
}

// Inward is the client that a packet to a public address and port is for: the
// number is computed, whether such a client is enrolled is for the caller to know.
func (p *Plan) Inward(dst netip.Addr, port uint16, l *Leases) (client uint32, ok bool) {
	if i, listed := p.index[dst]; listed {
		block, ok := p.blocks.Client(i, port)
		if !ok || block > p.Clients() {
			return 0, false
		}
		if client, leased := l.Client(block); leased {
			return client, true
		}
		return block, true
	}
	if !p.prefix6.Contains(dst) {
		return 0, false
	}
	return p.inPrefix(dst)
}

// position is which of an address's blocks a block is, from 0.
func (p *Plan) position(block uint32) uint32 { return (block - 1) % p.blocks.perAddress() }

func (p *Plan) fromPrefix(client uint32) netip.Addr {
	a := p.prefix6.Addr().As16()
	low := binary.BigEndian.Uint32(a[12:])
	binary.BigEndian.PutUint32(a[12:], low|client)
	return netip.AddrFrom16(a)
}

// inPrefix is fromPrefix's inverse for an address of the prefix. Addresses beyond
// the last client's number are nobody's.
func (p *Plan) inPrefix(a netip.Addr) (client uint32, ok bool) {
	b, base := a.As16(), p.prefix6.Addr().As16()
	client = binary.BigEndian.Uint32(b[12:]) - binary.BigEndian.Uint32(base[12:])
	if client == 0 || client > p.prefixClients() || a.Zone() != "" || [12]byte(b[:12]) != [12]byte(base[:12]) {
		return 0, false
	}
	return client, true
}
