package wire

import (
	"encoding/binary"
	"net/netip"
)

// Control is the first byte of the plaintext of a data message that carries no
// packet: its upper nibble is 0, where an IP packet has its version
// (PROTOCOL.md 6).
type Control byte

// Control messages.
const (
	ControlKeepAlive Control = 1 // section 6.1
	ControlAlive     Control = 2 // section 6.2
	ControlClose     Control = 3 // section 6.3

	ControlPortsRequest Control = 4 // section 6.4
	ControlPorts        Control = 5 // section 6.5
)

// IsControl says whether the plaintext p is a control message.
func IsControl(p []byte) bool { return len(p) > 0 && p[0]>>4 == 0 }

// Sizes of the control messages, in bytes.
const (
	KeepAliveLen = 12
	AliveLen     = 4 + 8 + 16 + 2
	CloseLen     = 2

	PortsRequestLen = 10
	portsLen        = 2 + 8 + 4 + 1 // without the blocks
	portBlockLen    = 2 + 2 + 4
)

// KeepAlive asks the other end for a sign of life (PROTOCOL.md 6.1).
//
//	1, 0 | interval (2) | token (8)
type KeepAlive struct {
	Interval uint16 // seconds, the agreed interval
	Token    uint64 // repeated in the answer
}

// AppendKeepAlive appends a keep-alive message.
func AppendKeepAlive(b []byte, m KeepAlive) []byte {
	b = append(b, byte(ControlKeepAlive), 0)
	b = binary.BigEndian.AppendUint16(b, m.Interval)
	return binary.BigEndian.AppendUint64(b, m.Token)
}

// ParseKeepAlive reads a keep-alive message.
func ParseKeepAlive(b []byte) (m KeepAlive, err error) {
	if len(b) < KeepAliveLen {
		return m, ErrShort
	}
	if Control(b[0]) != ControlKeepAlive {
		return m, ErrType
	}
	m.Interval = binary.BigEndian.Uint16(b[2:])
	m.Token = binary.BigEndian.Uint64(b[4:])
	return m, nil
}

// Alive answers a KeepAlive (PROTOCOL.md 6.2).
//
//	2, 0 | server (2) | token (8) | observed address (16) | observed port (2)
type Alive struct {
	Server   uint16         // the answering server
	Token    uint64         // of the message that is answered
	Observed netip.AddrPort // the client's outer endpoint, as the server sees it
}

// AppendAlive appends the answer to a keep-alive.
func AppendAlive(b []byte, m Alive) []byte {
	b = append(b, byte(ControlAlive), 0)
	b = binary.BigEndian.AppendUint16(b, m.Server)
	b = binary.BigEndian.AppendUint64(b, m.Token)
	var a [16]byte
	if m.Observed.Addr().IsValid() {
		a = m.Observed.Addr().As16()
	}
	b = append(b, a[:]...)
	return binary.BigEndian.AppendUint16(b, m.Observed.Port())
}

// ParseAlive reads the answer to a keep-alive.
func ParseAlive(b []byte) (m Alive, err error) {
	if len(b) < AliveLen {
		return m, ErrShort
	}
	if Control(b[0]) != ControlAlive {
		return m, ErrType
	}
	m.Server = binary.BigEndian.Uint16(b[2:])
	m.Token = binary.BigEndian.Uint64(b[4:])
	m.Observed = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[12:28])).Unmap(), binary.BigEndian.Uint16(b[28:]))
	return m, nil
}

// CloseReason says why an end leaves (PROTOCOL.md 6.3).
type CloseReason byte

// Reasons to close.
const (
	CloseLeaving CloseReason = 0 // the client ends; forget where it was
	CloseUnknown CloseReason = 1 // the server no longer knows this client
)

// AppendClose appends a close message.
func AppendClose(b []byte, r CloseReason) []byte {
	return append(b, byte(ControlClose), byte(r))
}

// ParseClose reads a close message.
func ParseClose(b []byte) (CloseReason, error) {
	if len(b) < CloseLen {
		return 0, ErrShort
	}
	if Control(b[0]) != ControlClose {
		return 0, ErrType
	}
	return CloseReason(b[1]), nil
}
