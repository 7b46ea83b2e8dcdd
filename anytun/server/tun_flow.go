package server

import (
	"bytes"
	"encoding/binary"

	"github.com/anytun-go/anytun/anytun/packet"
)

// Most packets of a batch are of a few flows, and what happens to the first of
// a flow happens to all that look like it: the same checks, the same new address
// and port. So the first goes the long way, and for the others it is enough that
// what the checks looked at is the same.

// flowSlots is how many flows of a batch are remembered. Two in the same slot
// take turns.
const flowSlots = 16

// flowMemory remembers translations during one batch, while nobody asks the
// plan, the leases, the policy or the mappings again.
type flowMemory struct {
	batch uint32
	slots [flowSlots]translation
}

// translation is what is done to the packets of a flow: the address, and perhaps
// the port, of one side change.
type translation struct {
	batch    uint32 // in which it was learned; another one: it is void
	protocol packet.Protocol
	key      [36]byte // addresses and ports before
	keyLen   int

	at, port           int // where the address and the port to be replaced stand
	address            [16]byte
	addressLen         int
	oldPort, newPort   uint16
	oldSum, newSum     uint16 // of the addresses
	transport, checked int    // offsets of the transport header and of its checksum
}

func (m *flowMemory) begin() { m.batch++ }

// plain looks at a packet that may have a translation: TCP in the midst of a
// connection, or UDP, neither in fragments nor with options or extension headers,
// and with lengths that agree. It returns the addresses and ports, and the offset
// of the transport header, 0 for all others.
func plain(p []byte) (key []byte, protocol packet.Protocol, l4 int) {
	switch {
	case len(p) >= 28 && p[0] == 0x45:
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || binary.BigEndian.Uint16(p[6:])&0x3fff != 0 {
			return nil, 0, 0
		}
		key, protocol, l4 = p[12:24], packet.Protocol(p[9]), 20
	case len(p) >= 48 && p[0]>>4 == 6:
		if int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) {
			return nil, 0, 0
		}
		key, protocol, l4 = p[8:44], packet.Protocol(p[6]), 40
	default:
		return nil, 0, 0
	}
	t := p[l4:]
	switch protocol {
	case packet.TCP:
		if len(t) < 20 || t[12] < 5<<4 || int(t[12]>>4)*4 > len(t) || t[13]&(packet.SYN|packet.FIN|packet.RST) != 0 {
			return nil, 0, 0
		}
	case packet.UDP:
		if n := int(binary.BigEndian.Uint16(t[4:])); n < 8 || n > len(t) {
			return nil, 0, 0
		}
	default:
		return nil, 0, 0
	}
	return key, protocol, l4
}

// slot is where the translation of a plain packet's flow is, if it is known, and
// where it belongs if not.
func (m *flowMemory) slot(key []byte, protocol packet.Protocol) (t *translation, known bool) {
	ports := key[len(key)-4:]
	t = &m.slots[(ports[0]^ports[1]^ports[2]^ports[3])%flowSlots]
	return t, t.batch == m.batch && t.protocol == protocol && bytes.Equal(t.key[:t.keyLen], key)
}

// note begins to learn from a packet before it is translated. What stood in the
// slot is void.
func (t *translation) note(key []byte, protocol packet.Protocol, l4 int) {
	t.batch = 0
	t.protocol, t.keyLen, t.transport = protocol, copy(t.key[:], key), l4
	t.checked = l4 + 16
	if protocol == packet.UDP {
		t.checked = l4 + 6
	}
}

// learn ends it with the translated packet, of which the source is new, or
// else the destination.
func (t *translation) learn(batch uint32, p []byte, source bool) {
	t.addressLen = (t.keyLen - 4) / 2
	first := t.transport - 2*t.addressLen
	t.at, t.port = first, t.transport
	if !source {
		t.at, t.port = t.at+t.addressLen, t.port+2
	}
	copy(t.address[:], p[t.at:t.at+t.addressLen])
	t.newPort = binary.BigEndian.Uint16(p[t.port:])
	old := t.key[t.at-first:]
	t.oldPort = binary.BigEndian.Uint16(t.key[t.port-first:])
	t.oldSum, t.newSum = packet.Sum(old[:t.addressLen], 0), packet.Sum(t.address[:t.addressLen], 0)
	t.batch = batch
}

// apply does to a packet what was done to the first.
func (t *translation) apply(p []byte) {
	if t.newPort != t.oldPort {
		binary.BigEndian.PutUint16(p[t.port:], t.newPort)
		t.update(p, t.oldPort, t.newPort)
	}
	if t.addressLen == 4 {
		copy(p[t.at:t.at+4], t.address[:4])
		binary.BigEndian.PutUint16(p[10:], packet.UpdateChecksum(binary.BigEndian.Uint16(p[10:]), t.oldSum, t.newSum))
	} else {
		copy(p[t.at:t.at+16], t.address[:])
	}
	t.update(p, t.oldSum, t.newSum)
}

// update adjusts the transport's checksum. For UDP, 0 means that there is none, so
// 0 is written as 0xffff (RFC 768).
func (t *translation) update(p []byte, from, to uint16) {
	field := p[t.checked:]
	sum := binary.BigEndian.Uint16(field)
	if t.protocol == packet.UDP && sum == 0 {
		return
	}
	if sum = packet.UpdateChecksum(sum, from, to); t.protocol == packet.UDP && sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(field, sum)
}
