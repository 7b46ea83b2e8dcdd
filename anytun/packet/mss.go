package packet

import "encoding/binary"

// ClampMSS lowers the maximum segment size that a SYN or SYN-ACK announces to mss
// bytes, and adjusts the checksum. It returns whether it did: not if the packet is
// no such segment, names a smaller size, or none (which means 536 over IPv4 and
// 1220 over IPv6, RFC 9293 section 3.7.1, and every path takes those).
func (v *View) ClampMSS(mss uint16) bool {
	if v.Protocol != TCP || !v.HasPorts || v.TCPFlags&SYN == 0 || v.quoted {
		return false
	}
	const endOfList, noOperation, maxSegmentSize = 0, 1, 2
	for at := v.transport + tcpHeaderLen; at < v.payload; {
		b := v.Bytes[at:v.payload]
		switch {
		case b[0] == endOfList:
			return false
		case b[0] == noOperation:
			at++
			continue
		case len(b) < 2 || b[1] < 2 || int(b[1]) > len(b):
			return false
		case b[0] == maxSegmentSize && b[1] == 4:
			return v.lowerWord(at+2, mss)
		}
		at += int(b[1])
	}
	return false
}

// lowerWord writes word at an index of Bytes within the upper layer if less than
// what is there.
func (v *View) lowerWord(at int, word uint16) bool {
	old := binary.BigEndian.Uint16(v.Bytes[at:])
	if old <= word {
		return false
	}
	binary.BigEndian.PutUint16(v.Bytes[at:], word)
	if (at-v.transport)%2 != 0 {
		// Across two words of the sum: the same with the bytes swapped (RFC 1071
		// section 2 B).
		old, word = old<<8|old>>8, word<<8|word>>8
	}
	v.updateTransport(old, word)
	return true
}
