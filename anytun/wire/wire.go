package wire

import "errors"

// Version is the protocol version in every handshake message (PROTOCOL.md 2).
const Version = 1

// Type is the first byte of every datagram (PROTOCOL.md 2).
type Type byte

// Datagram types. Values outside this list are dropped by every receiver.
const (
	TypeInitiation Type = 1 // client to server, section 4.1
	TypeResponse   Type = 2 // server to client, section 4.2
	TypeCookie     Type = 3 // server to client, section 4.3
	TypeData       Type = 4 // either way, section 5
)

// Errors of the parsers. A receiver drops the datagram and counts it.
var (
	// ErrShort says that a message ends before its fields do.
	ErrShort = errors.New("message too short")
	// ErrType says that the first byte isn't the type that was asked for.
	ErrType = errors.New("wrong message type")
	// ErrVersion says that the peer speaks another version of the protocol.
	ErrVersion = errors.New("unknown protocol version")
	// ErrLength says that a message of fixed size has another size.
	ErrLength = errors.New("wrong message length")
	// ErrValue says that a field holds a value that the protocol forbids.
	ErrValue = errors.New("forbidden field value")
)

// TypeOf returns the type of datagram b, or 0 when b is empty.
func TypeOf(b []byte) Type {
	if len(b) == 0 {
		return 0
	}
	return Type(b[0])
}
