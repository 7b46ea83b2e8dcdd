package packet

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Sum is the Internet checksum's sum (RFC 1071), not yet complemented, of initial
// and of b as big-endian 16-bit words, padded with a zero byte. To sum something in
// parts, all but the last must be of even length.
func Sum(b []byte, initial uint16) uint16 {
	// The sum doesn't care about byte order or word size as long as carries come
	// round, so it is done eight bytes at a time, in the order that is cheapest.
	var s, carry uint64
	for len(b) >= 32 {
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[8:]), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[16:]), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 8 {
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b), carry)
		b = b[8:]
	}
	var tail uint64
	for i, c := range b {
		tail |= uint64(c) << (8 * i)
	}
	s, carry = bits.Add64(s, tail, carry)
	s, carry = bits.Add64(s, uint64(bits.ReverseBytes16(initial)), carry)
	s += carry // can't overflow: initial is short
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return bits.ReverseBytes16(uint16(s))
}

// Checksum is what goes into a header's checksum field if that is zero in b.
func Checksum(b []byte, initial uint16) uint16 { return ^Sum(b, initial) }

// PseudoSum is the sum of the pseudo header (RFC 9293 section 3.1, RFC 8200
// section 8.1) of a packet with length bytes of upper-layer header and data,
// below 64 KiB.
func PseudoSum(src, dst netip.Addr, p Protocol, length int) uint16 {
	s := addrSum(src, uint16(p))
	s = addrSum(dst, s)
	return add(s, uint16(length))
}

func addrSum(a netip.Addr, initial uint16) uint16 {
	if a.Is4() {
		b := a.As4()
		return Sum(b[:], initial)
	}
	b := a.As16()
	return Sum(b[:], initial)
}

// add is addition in ones' complement.
func add(a, b uint16) uint16 {
	s := uint32(a) + uint32(b)
	return uint16(s) + uint16(s>>16)
}

// UpdateChecksum returns the checksum of a header in which a 16-bit word changed
// from old to new: equation 3 of RFC 1624, HC' = ~(~HC + ~m + m').
func UpdateChecksum(checksum, old, new uint16) uint16 {
	return ^add(add(^checksum, ^old), new)
}
