package server

import (
	"encoding/binary"
	"net/netip"

	"github.com/anytun-go/anytun/anytun/session"
)

// verdict is where an inner packet goes.
type verdict int

const (
	toEgress  verdict = iota // out, or to a service of the servers
	toClient                 // to another client of the cluster
	toNowhere                // dropped, with a reason
)

// route decides about a packet that client from sent through an authentic data
// message. It is pure: packet, sender and addressing decide alone.
func route(p []byte, from uint32, in session.Inner) (v verdict, to uint32, why Drop) {
	src, dst, ok := addresses(p)
	if !ok {
		return toNowhere, 0, DropMalformedInner
	}
	// Anti-spoofing: a client speaks for its own addresses alone.
	if n, inner := in.Client(src); !inner || n != from {
		return toNowhere, 0, DropSpoofed
	}
	if n, inner := in.Client(dst); inner {
		switch n {
		case session.Gateway:
			return toEgress, 0, 0
		case from:
			return toNowhere, 0, DropLoop
		}
		return toClient, n, 0
	}
	if dst.IsMulticast() {
		return toNowhere, 0, DropNoRoute // groups are a later version's
	}
	for _, r := range in.Prefixes() {
		if r.Contains(dst) {
			return toNowhere, 0, DropNoRoute // inside, but nobody's address
		}
	}
	return toEgress, 0, 0
}

// beaten is the way of the packet before, which the next one most often takes, too:
// route decides by addresses, and those are compared faster than looked up.
type beaten struct {
	key    [32]byte // source and destination, IPv4's at the head
	length int      // of both; 0: there is none
}

// note remembers that a packet with the addresses of p went to the egress.
func (w *beaten) note(p []byte) {
	if p[0]>>4 == 4 {
		w.length = copy(w.key[:], p[12:20])
	} else {
		w.length = copy(w.key[:], p[8:40])
	}
}

// leads says whether p is a well-formed packet with the same addresses.
func (w *beaten) leads(p []byte) bool {
	switch {
	case w.length == 8 && len(p) >= 20 && p[0]>>4 == 4:
		hl := int(p[0]&15) * 4
		return hl >= 20 && hl <= len(p) && int(binary.BigEndian.Uint16(p[2:])) == len(p) &&
			binary.NativeEndian.Uint64(p[12:]) == binary.NativeEndian.Uint64(w.key[:])
	case w.length == 32 && len(p) >= 40 && p[0]>>4 == 6:
		return int(binary.BigEndian.Uint16(p[4:]))+40 == len(p) && [32]byte(p[8:40]) == w.key
	}
	return false
}

// addresses reads the addresses of a well-formed IPv4 or IPv6 packet.
func addresses(p []byte) (src, dst netip.Addr, ok bool) {
	if len(p) < 20 {
		return src, dst, false
	}
	switch p[0] >> 4 {
	case 4:
		hl := int(p[0]&15) * 4
		if hl < 20 || hl > len(p) || int(binary.BigEndian.Uint16(p[2:])) != len(p) {
			return src, dst, false
		}
		return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), true
	case 6:
		if len(p) < 40 || int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) {
			return src, dst, false
		}
		return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), true
	}
	return src, dst, false
}
