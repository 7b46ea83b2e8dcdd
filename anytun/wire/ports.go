package wire

import "encoding/binary"

// MaxPortBlocks bounds the further blocks of one client (PROTOCOL.md 6.5).
const MaxPortBlocks = 64

// PortsRequest asks for port blocks besides the client's own, and renews the
// leases of those it has (PROTOCOL.md 6.4). Wanting a number, not one more,
// makes it harmless that a request is repeated or answered by two servers.
//
//	4, blocks | token (8)
type PortsRequest struct {
	Blocks uint8  // how many further blocks the client wants to have in all; 0 only renews
	Token  uint64 // repeated in the answer
}

// AppendPortsRequest appends a request for port blocks.
func AppendPortsRequest(b []byte, m PortsRequest) []byte {
	b = append(b, byte(ControlPortsRequest), m.Blocks)
	return binary.BigEndian.AppendUint64(b, m.Token)
}

// ParsePortsRequest reads a request for port blocks.
func ParsePortsRequest(b []byte) (m PortsRequest, err error) {
	if len(b) < PortsRequestLen {
		return m, ErrShort
	}
	if Control(b[0]) != ControlPortsRequest {
		return m, ErrType
	}
	m.Blocks = b[1]
	m.Token = binary.BigEndian.Uint64(b[2:])
	return m, nil
}

// PortsStatus says whether a PortsRequest got what it wanted (PROTOCOL.md 6.5).
type PortsStatus byte

// Answers to a PortsRequest.
const (
	PortsOK           PortsStatus = 0
	PortsNoneFree     PortsStatus = 1 // every block that the client could have is taken
	PortsUnavailable  PortsStatus = 2 // the server can't lease now; another, or later, may
	PortsNotSupported PortsStatus = 3 // this cluster leases none
)

func (s PortsStatus) String() string {
	switch s {
	case PortsOK:
		return "ok"
	case PortsNoneFree:
		return "none free"
	case PortsUnavailable:
		return "unavailable"
	case PortsNotSupported:
		return "not supported"
	}
	return "unknown"
}

// PortBlock is a range of ports, both ends included, and the public address
// that packets from them have outside.
type PortBlock struct {
	First, Last uint16
	IPv4        [4]byte // zero if there is no egress IPv4 address
}

// Ports answers a PortsRequest with all further blocks of the client
// (PROTOCOL.md 6.5).
//
//	5, status | token (8) | lifetime (4) | n | n times: first (2) | last (2) | IPv4 (4)
type Ports struct {
	Status   PortsStatus
	Token    uint64 // of the message that is answered
	Lifetime uint32 // seconds until the leases end unless renewed; 0 without blocks
	Blocks   []PortBlock
}

// AppendPorts appends the answer to a PortsRequest. Blocks beyond MaxPortBlocks
// are left out.
func AppendPorts(b []byte, m Ports) []byte {
	blocks := m.Blocks[:min(len(m.Blocks), MaxPortBlocks)]
	b = append(b, byte(ControlPorts), byte(m.Status))
	b = binary.BigEndian.AppendUint64(b, m.Token)
	b = binary.BigEndian.AppendUint32(b, m.Lifetime)
	b = append(b, byte(len(blocks)))
	for _, p := range blocks {
		b = binary.BigEndian.AppendUint16(b, p.First)
		b = binary.BigEndian.AppendUint16(b, p.Last)
		b = append(b, p.IPv4[:]...)
	}
	return b
}

// ParsePorts reads the answer to a PortsRequest. The blocks are put into room,
// which must have MaxPortBlocks elements to spare an allocation and may be nil.
func ParsePorts(b []byte, room []PortBlock) (m Ports, err error) {
	if len(b) < portsLen {
		return m, ErrShort
	}
	if Control(b[0]) != ControlPorts {
		return m, ErrType
	}
	n := int(b[14])
	if n > MaxPortBlocks {
		return m, ErrValue
	}
	if len(b) < portsLen+n*portBlockLen {
		return m, ErrShort
	}
	m.Status = PortsStatus(b[1])
	m.Token = binary.BigEndian.Uint64(b[2:])
	m.Lifetime = binary.BigEndian.Uint32(b[10:])
	m.Blocks = room[:0]
	for b = b[portsLen:]; n > 0; n, b = n-1, b[portBlockLen:] {
		p := PortBlock{
			First: binary.BigEndian.Uint16(b), Last: binary.BigEndian.Uint16(b[2:]), IPv4: [4]byte(b[4:8]),
		}
		if p.First == 0 || p.Last < p.First {
			return Ports{}, ErrValue
		}
		m.Blocks = append(m.Blocks, p)
	}
	if len(m.Blocks) > 0 && m.Lifetime == 0 {
		return Ports{}, ErrValue
	}
	return m, nil
}
