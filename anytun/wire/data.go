package wire

import "encoding/binary"

// Sizes of a data message, in bytes (PROTOCOL.md 5).
const (
	DataHeaderLen = 20
	TagLen        = 16
	// Overhead is what a data message adds to the packet it carries.
	Overhead = DataHeaderLen + TagLen
)

// ClientSender is the sender number of every client; servers have the numbers
// from 1 (PROTOCOL.md 5.2).
const ClientSender uint16 = 0

// DataHeader is the clear part of a data message (PROTOCOL.md 5):
//
//	 0       1       2               4
//	+-------+-------+---------------+
//	| type 4| epoch |    sender     |
//	+-------+-------+---------------+
//	|          session id           |
//	|                               |
//	+-------------------------------+
//	|            counter            |
//	|                               |
//	+-------------------------------+
//
// All of it is the AEAD's associated data.
type DataHeader struct {
	Epoch     byte   // the session's epoch number, low 8 bits
	Sender    uint16 // ClientSender, or the server's number
	SessionID uint64 // encrypted (client number, salt), see section 3.3
	Counter   uint64 // never repeated by one sender within a session
}

// ParseData reads the header of a data message. The sealed packet follows at
// DataHeaderLen. Messages too short to hold a tag and one byte are refused.
func ParseData(b []byte) (h DataHeader, err error) {
	if len(b) <= Overhead {
		return h, ErrShort
	}
	if Type(b[0]) != TypeData {
		return h, ErrType
	}
	h.Epoch = b[1]
	h.Sender = binary.BigEndian.Uint16(b[2:])
	h.SessionID = binary.BigEndian.Uint64(b[4:])
	h.Counter = binary.BigEndian.Uint64(b[12:])
	return h, nil
}

// PutData writes the header to the first DataHeaderLen bytes of b, which must
// have them.
func PutData(b []byte, h DataHeader) {
	_ = b[DataHeaderLen-1]
	b[0] = byte(TypeData)
	b[1] = h.Epoch
	binary.BigEndian.PutUint16(b[2:], h.Sender)
	binary.BigEndian.PutUint64(b[4:], h.SessionID)
	binary.BigEndian.PutUint64(b[12:], h.Counter)
}
