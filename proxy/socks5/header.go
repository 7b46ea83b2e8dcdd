package socks5

import (
	"encoding/binary"
	"net/netip"

	"github.com/things-go/go-socks5/statute"

	"github.com/anytun-go/anytun/proxy"
)

// header is the head of a UDP datagram between application and proxy, RFC 1928 section 7:
//
//	RSV(2)=0 FRAG(1) ATYP(1) DST.ADDR(4, 16 or 1+length) DST.PORT(2) DATA
//
// Package statute's Datagram is not used: it allocates for every datagram, and refuses an empty payload behind an IPv6
// address or a name.
type header struct {
	addr netip.Addr // not valid for a name
	name []byte     // part of the datagram
	port uint16
}

// parseHeader takes a datagram apart without allocating; what it returns points into b. ok is false with the reason.
func parseHeader(b []byte) (h header, payload []byte, why proxy.Drop, ok bool) {
	if len(b) < 5 { // RSV is ignored
		return h, nil, proxy.DropMalformed, false
	}
	if b[2] != 0 {
		return h, nil, proxy.DropFragment, false
	}
	rest := b[4:]
	switch b[3] {
	case statute.ATYPIPv4:
		if len(rest) < 4+2 {
			return h, nil, proxy.DropMalformed, false
		}
		h.addr, rest = netip.AddrFrom4([4]byte(rest)), rest[4:]
	case statute.ATYPIPv6:
		if len(rest) < 16+2 {
			return h, nil, proxy.DropMalformed, false
		}
		h.addr, rest = netip.AddrFrom16([16]byte(rest)).Unmap(), rest[16:]
	case statute.ATYPDomain:
		n := int(rest[0])
		if n == 0 || len(rest) < 1+n+2 {
			return h, nil, proxy.DropMalformed, false
		}
		h.name, rest = rest[1:1+n], rest[1+n:]
	default:
		return h, nil, proxy.DropMalformed, false
	}
	h.port = binary.BigEndian.Uint16(rest)
	return h, rest[2:], 0, true
}

// maxHeaderBytes is the longest header the proxy writes: an IPv6 address.
const maxHeaderBytes = 4 + 16 + 2

// headerBytes is the length of the header for an address.
func headerBytes(a netip.Addr) int {
	if a.Is4() {
		return 4 + 4 + 2
	}
	return maxHeaderBytes
}

// appendHeader writes the header of a datagram that came from an address.
func appendHeader(b []byte, from netip.AddrPort) []byte {
	return appendAddrPort(append(b, 0, 0, 0), from)
}

// appendAddrPort writes ATYP, address and port. An address that is not valid becomes 0.0.0.0.
func appendAddrPort(b []byte, a netip.AddrPort) []byte {
	switch addr := a.Addr(); {
	case addr.Is4():
		ip := addr.As4()
		b = append(append(b, statute.ATYPIPv4), ip[:]...)
	case addr.Is6():
		ip := addr.As16()
		b = append(append(b, statute.ATYPIPv6), ip[:]...)
	default:
		b = append(b, statute.ATYPIPv4, 0, 0, 0, 0)
	}
	return binary.BigEndian.AppendUint16(b, a.Port())
}
