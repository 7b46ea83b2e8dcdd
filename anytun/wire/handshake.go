package wire

import "encoding/binary"

// Sizes of the handshake messages, in bytes (PROTOCOL.md 4).
const (
	ExchangeLen = 8
	MACLen      = 16
	// prefixLen is type, version, two reserved bytes and the exchange id.
	prefixLen = 4 + ExchangeLen

	// InitiationLen is the size of every initiation: padded, so that a response
	// is never larger than the datagram that asked for it.
	InitiationLen = 384
	// noiseOneLen is the first Noise IK message: e, encrypted s, sealed payload.
	noiseOneLen = InitiationLen - prefixLen - 2*MACLen
	// OfferLen is the size of the plaintext payload of an initiation.
	OfferLen = noiseOneLen - 32 - (32 + TagLen) - TagLen

	// MaxResponseLen is the largest response.
	MaxResponseLen = InitiationLen
	minNoiseTwoLen = 32 + TagLen + grantLen

	CookieLen      = 16
	CookieNonceLen = 24
	// CookieMessageLen is the size of a cookie message.
	CookieMessageLen = prefixLen + CookieNonceLen + CookieLen + TagLen
)

// Exchange identifies one attempt at a handshake: chosen at random by the
// client, repeated in the response or cookie (PROTOCOL.md 4).
type Exchange [ExchangeLen]byte

func appendPrefix(b []byte, t Type, x Exchange) []byte {
	b = append(b, byte(t), Version, 0, 0)
	return append(b, x[:]...)
}

func parsePrefix(b []byte, t Type) (x Exchange, err error) {
	if len(b) < prefixLen {
		return x, ErrShort
	}
	if Type(b[0]) != t {
		return x, ErrType
	}
	if b[1] != Version {
		return x, ErrVersion
	}
	if b[2] != 0 || b[3] != 0 {
		return x, ErrValue
	}
	copy(x[:], b[4:])
	return x, nil
}

// Initiation is the client's first message (PROTOCOL.md 4.1). Its slices point
// into the datagram it was parsed from.
//
//	type 1, version, 0, 0 | exchange (8) | Noise message 1 (340) | mac1 (16) | mac2 (16)
type Initiation struct {
	Exchange Exchange
	Prefix   []byte // the clear bytes before the Noise message: the prologue
	Noise    []byte
	MAC1     []byte // over everything before it
	MAC2     []byte // over everything before it; zero without a cookie
	Covered1 []byte // what MAC1 covers
	Covered2 []byte // what MAC2 covers
}

// ParseInitiation checks the form of an initiation, none of its MACs.
func ParseInitiation(b []byte) (m Initiation, err error) {
	if m.Exchange, err = parsePrefix(b, TypeInitiation); err != nil {
		return m, err
	}
	if len(b) != InitiationLen {
		return m, ErrLength
	}
	m.Prefix = b[:prefixLen]
	m.Noise = b[prefixLen : prefixLen+noiseOneLen]
	m.Covered1 = b[:InitiationLen-2*MACLen]
	m.MAC1 = b[InitiationLen-2*MACLen : InitiationLen-MACLen]
	m.Covered2 = b[:InitiationLen-MACLen]
	m.MAC2 = b[InitiationLen-MACLen:]
	return m, nil
}

// AppendInitiationPrefix appends what stands before the Noise message.
func AppendInitiationPrefix(b []byte, x Exchange) []byte {
	return appendPrefix(b, TypeInitiation, x)
}

// Response is the server's answer (PROTOCOL.md 4.2).
//
//	type 2, version, 0, 0 | exchange (8) | Noise message 2
type Response struct {
	Exchange Exchange
	Noise    []byte
}

// ParseResponse checks the form of a response.
func ParseResponse(b []byte) (m Response, err error) {
	if m.Exchange, err = parsePrefix(b, TypeResponse); err != nil {
		return m, err
	}
	if len(b) < prefixLen+minNoiseTwoLen {
		return m, ErrShort
	}
	if len(b) > MaxResponseLen {
		return m, ErrLength
	}
	m.Noise = b[prefixLen:]
	return m, nil
}

// AppendResponsePrefix appends what stands before the Noise message.
func AppendResponsePrefix(b []byte, x Exchange) []byte {
	return appendPrefix(b, TypeResponse, x)
}

// Cookie is the answer of a server under load (PROTOCOL.md 4.3).
//
//	type 3, version, 0, 0 | exchange (8) | nonce (24) | sealed cookie (32)
type Cookie struct {
	Exchange Exchange
	Nonce    []byte
	Sealed   []byte
}

// ParseCookie checks the form of a cookie message.
func ParseCookie(b []byte) (m Cookie, err error) {
	if m.Exchange, err = parsePrefix(b, TypeCookie); err != nil {
		return m, err
	}
	if len(b) != CookieMessageLen {
		return m, ErrLength
	}
	m.Nonce = b[prefixLen : prefixLen+CookieNonceLen]
	m.Sealed = b[prefixLen+CookieNonceLen:]
	return m, nil
}

// AppendCookie appends a cookie message.
func AppendCookie(b []byte, m Cookie) []byte {
	b = appendPrefix(b, TypeCookie, m.Exchange)
	b = append(b, m.Nonce...)
	return append(b, m.Sealed...)
}

// Cipher names the AEAD of a session (PROTOCOL.md 3.4).
type Cipher byte

// The two AEADs. They are also bits of Offer.Ciphers, as 1<<Cipher.
const (
	AES128GCM        Cipher = 0
	ChaCha20Poly1305 Cipher = 1
)

func (c Cipher) String() string {
	switch c {
	case AES128GCM:
		return "AES-128-GCM"
	case ChaCha20Poly1305:
		return "ChaCha20-Poly1305"
	}
	return "unknown"
}

// Offer is the payload of an initiation (PROTOCOL.md 4.1).
type Offer struct {
	Timestamp uint64 // nanoseconds since 1970, UTC; must grow with each initiation of one client
	KeepAlive uint16 // seconds; 0 leaves it to the server
	MTU       uint16 // largest inner packet, bytes; 0 leaves it to the server
	Ciphers   byte   // bit 1<<c for every Cipher c the client knows
	FastAES   bool   // the client's CPU has AES instructions
}

const offerFlagFastAES = 1

// AppendOffer appends the payload, padded with zeros to OfferLen.
func AppendOffer(b []byte, o Offer) []byte {
	n := len(b)
	b = binary.BigEndian.AppendUint64(b, o.Timestamp)
	b = binary.BigEndian.AppendUint16(b, o.KeepAlive)
	b = binary.BigEndian.AppendUint16(b, o.MTU)
	var flags byte
	if o.FastAES {
		flags |= offerFlagFastAES
	}
	b = append(b, o.Ciphers, flags)
	return append(b, make([]byte, OfferLen-(len(b)-n))...)
}

// ParseOffer reads the payload of an initiation. What follows the known fields
// is ignored, for later versions to use.
func ParseOffer(b []byte) (o Offer, err error) {
	if len(b) != OfferLen {
		return o, ErrLength
	}
	o.Timestamp = binary.BigEndian.Uint64(b)
	o.KeepAlive = binary.BigEndian.Uint16(b[8:])
	o.MTU = binary.BigEndian.Uint16(b[10:])
	o.Ciphers = b[12]
	o.FastAES = b[13]&offerFlagFastAES != 0
	if o.MTU != 0 && o.MTU < MinMTU {
		return o, ErrValue
	}
	return o, nil
}

// MinMTU is the smallest inner MTU, that of IPv6 (RFC 8200, section 5).
const MinMTU = 1280

// Grant is the payload of a response: everything that a client needs to use its
// session (PROTOCOL.md 4.2).
type Grant struct {
	Time       uint64 // the server's clock, nanoseconds since 1970, UTC
	Epoch      uint32 // number of the epoch the session belongs to
	Lifetime   uint32 // seconds after which no server accepts the session
	SessionID  uint64
	Secret     [32]byte // sessionSecret, section 3.2
	Client     uint32   // client number
	Server     uint16   // number of the answering server
	KeepAlive  uint16   // agreed interval, seconds
	MTU        uint16   // agreed inner MTU, bytes
	FirstPort  uint16   // the client's ports, both ends included
	LastPort   uint16
	Cipher     Cipher
	PublicPort bool     // the Internet can reach the client's ports
	IPv4       [4]byte  // inner addresses of the client
	IPv6       [16]byte //
	Gateway4   [4]byte  // inner addresses of the servers: gateway, DNS
	Gateway6   [16]byte
	Public4    [4]byte  // egress addresses: what the world sees of the client;
	Public6    [16]byte // zero where there is none of its own
}

const (
	// grantLen is what the first servers sent; grantPublicLen follows it.
	grantLen            = 8 + 4 + 4 + 8 + 32 + 4 + 2 + 2 + 2 + 2 + 2 + 1 + 1 + 4 + 16 + 4 + 16
	grantPublicLen      = 4 + 16
	grantFlagPublicPort = 1
)

// AppendGrant appends the payload of a response.
func AppendGrant(b []byte, g Grant) []byte {
	b = binary.BigEndian.AppendUint64(b, g.Time)
	b = binary.BigEndian.AppendUint32(b, g.Epoch)
	b = binary.BigEndian.AppendUint32(b, g.Lifetime)
	b = binary.BigEndian.AppendUint64(b, g.SessionID)
	b = append(b, g.Secret[:]...)
	b = binary.BigEndian.AppendUint32(b, g.Client)
	b = binary.BigEndian.AppendUint16(b, g.Server)
	b = binary.BigEndian.AppendUint16(b, g.KeepAlive)
	b = binary.BigEndian.AppendUint16(b, g.MTU)
	b = binary.BigEndian.AppendUint16(b, g.FirstPort)
	b = binary.BigEndian.AppendUint16(b, g.LastPort)
	var flags byte
	if g.PublicPort {
		flags |= grantFlagPublicPort
	}
	b = append(b, byte(g.Cipher), flags)
	b = append(b, g.IPv4[:]...)
	b = append(b, g.IPv6[:]...)
	b = append(b, g.Gateway4[:]...)
	b = append(b, g.Gateway6[:]...)
	b = append(b, g.Public4[:]...)
	return append(b, g.Public6[:]...)
}

// ParseGrant reads the payload of a response. The public addresses are zero
// when the server is too old to send them. Bytes behind the known fields are
// ignored, for later versions to use.
func ParseGrant(b []byte) (g Grant, err error) {
	if len(b) < grantLen {
		return g, ErrShort
	}
	g.Time = binary.BigEndian.Uint64(b)
	g.Epoch = binary.BigEndian.Uint32(b[8:])
	g.Lifetime = binary.BigEndian.Uint32(b[12:])
	g.SessionID = binary.BigEndian.Uint64(b[16:])
	copy(g.Secret[:], b[24:])
	b = b[56:]
	g.Client = binary.BigEndian.Uint32(b)
	g.Server = binary.BigEndian.Uint16(b[4:])
	g.KeepAlive = binary.BigEndian.Uint16(b[6:])
	g.MTU = binary.BigEndian.Uint16(b[8:])
	g.FirstPort = binary.BigEndian.Uint16(b[10:])
	g.LastPort = binary.BigEndian.Uint16(b[12:])
	g.Cipher = Cipher(b[14])
	g.PublicPort = b[15]&grantFlagPublicPort != 0
	copy(g.IPv4[:], b[16:])
	copy(g.IPv6[:], b[20:])
	copy(g.Gateway4[:], b[36:])
	copy(g.Gateway6[:], b[40:])
	if b = b[56:]; len(b) >= grantPublicLen {
		copy(g.Public4[:], b)
		copy(g.Public6[:], b[4:])
	}
	switch {
	case g.Server == ClientSender, g.KeepAlive == 0, g.MTU < MinMTU,
		g.FirstPort == 0, g.LastPort < g.FirstPort, g.Lifetime == 0,
		g.Cipher > ChaCha20Poly1305:
		return g, ErrValue
	}
	return g, nil
}
