package registry

// Bytes. A message is its type (1 byte), then records of one size, big endian:
//
//	Location  client(4) session(8) epoch(1) counter(8) endpoint(18) local(18) server(2) flags(1)
//	Seen      client(4) counter(8)
//	Mapping   client(4) protocol(1) inner(2) public(2) since(8)
//	Claim     kind(1) index(4) owner(4) until(8, ns since 1970)
//	Hello     peer(8) age(4, s)
//
// An endpoint is an address (16; IPv4 in the first 4) and a port; flags say of
// which family each is: bit 0 left, bits 1-2 endpoint, bits 3-4 local (0 none,
// 1 IPv4, 2 IPv6). What isn't used is zero. There is exactly one encoding of
// everything. Versions are the seal's part (seal.go).

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"
)

// Type is the type of a message.
type Type byte

// The types. A zero Type is no message.
const (
	TypeLocation Type = 1 + iota
	TypeSeen
	TypeMapping
	TypeClaim   // somebody got or renewed it
	TypeRelease // somebody gave it back
	TypeHello   // a server is alive
	TypeAsk     // for all that a server knows; no records
	TypeAskOwn  // for what it heard itself; no records
	TypeDone    // what was asked for is whole; no records

	// NumTypes is the number of types, 0 included.
	NumTypes = iota + 1
)

var typeNames = [NumTypes]string{"none", "location", "seen", "mapping", "claim", "release", "hello", "ask", "ask_own", "snapshot"}

// String is the type's name as a metrics label.
func (t Type) String() string {
	if int(t) < len(typeNames) {
		return typeNames[t]
	}
	return "unknown"
}

// Sizes of records in bytes.
const (
	LocationSize = 60
	SeenSize     = 12
	MappingSize  = 17
	ClaimSize    = 17
	HelloSize    = 12
)

// ErrMalformed says that bytes aren't a message.
var ErrMalformed = errors.New("malformed registry message")

// Hello is what servers tell each other all the time.
type Hello struct {
	Peer uint64 // random, new at each start
	Age  uint32 // seconds since then
}

// Message is a parsed message; only what Type says is filled.
type Message struct {
	Type      Type
	Locations []Location
	Seen      []Seen
	Mappings  []Mapping
	Claims    []Claim // of TypeClaim and TypeRelease
	Hello     Hello
}

// Records is how many records the message has.
func (m *Message) Records() int {
	switch m.Type {
	case TypeLocation:
		return len(m.Locations)
	case TypeSeen:
		return len(m.Seen)
	case TypeMapping:
		return len(m.Mappings)
	case TypeClaim, TypeRelease:
		return len(m.Claims)
	case TypeHello:
		return 1
	default:
		return 0
	}
}

// Deliver hands the message's records to the handler.
func (m *Message) Deliver(h Handler) {
	switch m.Type {
	case TypeLocation:
		for _, l := range m.Locations {
			h.Location(l)
		}
	case TypeSeen:
		h.Seen(m.Seen)
	case TypeMapping:
		for _, p := range m.Mappings {
			h.Mapping(p)
		}
	case TypeClaim:
		for _, c := range m.Claims {
			h.Claimed(c)
		}
	case TypeRelease:
		for _, c := range m.Claims {
			h.Released(c)
		}
	default:
	}
}

// Append appends the message's bytes to b.
func (m *Message) Append(b []byte) []byte {
	b = append(b, byte(m.Type))
	switch m.Type {
	case TypeLocation:
		for i := range m.Locations {
			b = appendLocation(b, &m.Locations[i])
		}
	case TypeSeen:
		for _, s := range m.Seen {
			b = binary.BigEndian.AppendUint32(b, s.Client)
			b = binary.BigEndian.AppendUint64(b, s.Counter)
		}
	case TypeMapping:
		for _, p := range m.Mappings {
			b = append(binary.BigEndian.AppendUint32(b, p.Client), p.Protocol)
			b = binary.BigEndian.AppendUint16(b, p.Inner)
			b = binary.BigEndian.AppendUint16(b, p.Public)
			b = binary.BigEndian.AppendUint64(b, p.Since)
		}
	case TypeClaim, TypeRelease:
		for _, c := range m.Claims {
			b = append(b, byte(c.Kind))
			b = binary.BigEndian.AppendUint32(b, c.Index)
			b = binary.BigEndian.AppendUint32(b, c.Owner)
			b = binary.BigEndian.AppendUint64(b, uint64(c.Until.UnixNano()))
		}
	case TypeHello:
		b = binary.BigEndian.AppendUint64(b, m.Hello.Peer)
		b = binary.BigEndian.AppendUint32(b, m.Hello.Age)
	default:
	}
	return b
}

// Parse fills m from all of b, reusing its slices. The error is ErrMalformed.
func (m *Message) Parse(b []byte) error {
	m.Type = 0
	m.Locations, m.Seen, m.Mappings, m.Claims = m.Locations[:0], m.Seen[:0], m.Mappings[:0], m.Claims[:0]
	if len(b) == 0 || b[0] == 0 || b[0] >= NumTypes {
		return ErrMalformed
	}
	t, b := Type(b[0]), b[1:]
	size := t.recordSize()
	if size == 0 && len(b) > 0 || size > 0 && (len(b) == 0 || len(b)%size != 0) || t == TypeHello && len(b) != size {
		return ErrMalformed
	}
	for ; len(b) > 0; b = b[size:] {
		if !m.parseRecord(t, b[:size]) {
			return ErrMalformed
		}
	}
	m.Type = t
	return nil
}

func (t Type) recordSize() int {
	switch t {
	case TypeLocation:
		return LocationSize
	case TypeSeen:
		return SeenSize
	case TypeMapping:
		return MappingSize
	case TypeClaim, TypeRelease:
		return ClaimSize
	case TypeHello:
		return HelloSize
	default:
		return 0
	}
}

func (m *Message) parseRecord(t Type, b []byte) bool {
	be := binary.BigEndian
	switch t {
	case TypeLocation:
		l, ok := parseLocation(b)
		m.Locations = append(m.Locations, l)
		return ok
	case TypeSeen:
		m.Seen = append(m.Seen, Seen{Client: be.Uint32(b), Counter: be.Uint64(b[4:])})
	case TypeMapping:
		m.Mappings = append(m.Mappings, Mapping{
			Client: be.Uint32(b), Protocol: b[4], Inner: be.Uint16(b[5:]), Public: be.Uint16(b[7:]), Since: be.Uint64(b[9:]),
		})
	case TypeClaim, TypeRelease:
		c := Claim{Kind: Kind(b[0]), Index: be.Uint32(b[1:]), Owner: be.Uint32(b[5:]), Until: time.Unix(0, int64(be.Uint64(b[9:])))}
		m.Claims = append(m.Claims, c)
		return c.Kind == ClaimBlock || c.Kind == ClaimServer
	case TypeHello:
		m.Hello = Hello{Peer: be.Uint64(b), Age: be.Uint32(b[8:])}
	default:
	}
	return true
}

// Families of an endpoint in a Location's flags.
const (
	flagLeft       = 1
	endpointShift  = 1
	localShift     = 3
	familyMask     = 3
	flagsKnown     = flagLeft | familyMask<<endpointShift | familyMask<<localShift
	familyNone     = 0
	familyIPv4     = 1
	familyIPv6     = 2
	endpointSize   = 18
	endpointOffset = 21
	localOffset    = endpointOffset + endpointSize
	serverOffset   = localOffset + endpointSize
	flagsOffset    = serverOffset + 2
)

func appendLocation(b []byte, l *Location) []byte {
	var r [LocationSize]byte
	be := binary.BigEndian
	be.PutUint32(r[:], l.Client)
	be.PutUint64(r[4:], l.Session)
	r[12] = l.Epoch
	be.PutUint64(r[13:], l.Counter)
	flags := putEndpoint(r[endpointOffset:], l.Endpoint) << endpointShift
	flags |= putEndpoint(r[localOffset:], l.Local) << localShift
	be.PutUint16(r[serverOffset:], l.Server)
	if l.Left {
		flags |= flagLeft
	}
	r[flagsOffset] = flags
	return append(b, r[:]...)
}

func parseLocation(b []byte) (l Location, ok bool) {
	be := binary.BigEndian
	l.Client = be.Uint32(b)
	l.Session = be.Uint64(b[4:])
	l.Epoch = b[12]
	l.Counter = be.Uint64(b[13:])
	flags := b[flagsOffset]
	var okEndpoint, okLocal bool
	l.Endpoint, okEndpoint = endpoint(b[endpointOffset:localOffset], flags>>endpointShift&familyMask)
	l.Local, okLocal = endpoint(b[localOffset:serverOffset], flags>>localShift&familyMask)
	l.Server = be.Uint16(b[serverOffset:])
	l.Left = flags&flagLeft != 0
	return l, okEndpoint && okLocal && flags&^flagsKnown == 0
}

// putEndpoint returns the family. Zones are lost: they mean nothing elsewhere.
func putEndpoint(b []byte, a netip.AddrPort) (family byte) {
	switch {
	case !a.Addr().IsValid():
		return familyNone
	case a.Addr().Is4():
		v4 := a.Addr().As4()
		copy(b, v4[:])
		family = familyIPv4
	default:
		v6 := a.Addr().As16()
		copy(b, v6[:])
		family = familyIPv6
	}
	binary.BigEndian.PutUint16(b[16:], a.Port())
	return family
}

func endpoint(b []byte, family byte) (a netip.AddrPort, ok bool) {
	port := binary.BigEndian.Uint16(b[16:])
	switch family {
	case familyNone:
		return a, [endpointSize]byte(b) == [endpointSize]byte{}
	case familyIPv4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), port), [12]byte(b[4:]) == [12]byte{}
	case familyIPv6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)), port), true
	default:
		return a, false
	}
}
