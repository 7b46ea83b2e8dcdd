package session

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
)

// MaxClient is the largest client number: inner IPv4 addresses have 22 bits for
// it (PROTOCOL.md 3.5).
const MaxClient = 1<<22 - 1

// inner4 is 100.64.0.0.
const inner4 = 100<<24 | 64<<16

// Gateway is the client number of the servers themselves.
const Gateway = 0

// Inner computes inner addresses of one cluster (PROTOCOL.md 3.5): IPv4 is
// 100.64.0.0/10 (RFC 6598) plus the client number; IPv6 is the host ::1 of a
// /64 from a ULA prefix (RFC 4193): fd, 34 bits from the cluster's key, 22 bits
// of client number.
type Inner struct {
	prefix uint64 // upper 64 bits of number 0's /64
}

// NewInner returns the addressing of the cluster with the given key.
func NewInner(cluster PublicKey) Inner {
	h := sha256.Sum256(append([]byte("anytun 1 inner ipv6\x00"), cluster[:]...))
	bits := binary.BigEndian.Uint64(h[:]) >> (64 - 34)
	return Inner{prefix: 0xfd<<56 | bits<<22}
}

// IPv4 returns the inner IPv4 address of a client.
func (Inner) IPv4(client uint32) netip.Addr {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], inner4|client&MaxClient)
	return netip.AddrFrom4(a)
}

// IPv6 returns the inner IPv6 address of a client.
func (in Inner) IPv6(client uint32) netip.Addr {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:], in.prefix|uint64(client&MaxClient))
	a[15] = 1
	return netip.AddrFrom16(a)
}

// Prefixes returns the ranges that hold all inner addresses of the cluster.
func (in Inner) Prefixes() [2]netip.Prefix {
	return [2]netip.Prefix{
		netip.PrefixFrom(in.IPv4(0), 10),
		netip.PrefixFrom(in.IPv6(0), 42).Masked(),
	}
}

// Client returns the number an inner address belongs to, and whether it is an
// inner address at all. Of a client's /64 only the host ::1 counts.
func (in Inner) Client(a netip.Addr) (uint32, bool) {
	if a.Is4() {
		b := a.As4()
		n := binary.BigEndian.Uint32(b[:])
		return n & MaxClient, n&^MaxClient == inner4
	}
	b := a.As16()
	hi := binary.BigEndian.Uint64(b[:])
	return uint32(hi & MaxClient), hi&^MaxClient == in.prefix && binary.BigEndian.Uint64(b[8:]) == 1
}
