package session

import (
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/flynn/noise"

	"github.com/anytun-go/anytun/anytun/wire"
)

// The handshake is Noise_IK_25519_ChaChaPoly_BLAKE2s (PROTOCOL.md 4). The
// client knows the cluster's key beforehand and sends its own sealed; one
// exchange of messages, nothing kept at the server.

// Errors of a handshake.
var (
	// ErrMAC says that an initiation's first MAC is wrong: a stranger, who gets
	// silence.
	ErrMAC = errors.New("wrong mac")
	// ErrHandshake says that a handshake message doesn't authenticate.
	ErrHandshake = errors.New("handshake doesn't authenticate")
	// ErrExchange says that a message answers another attempt.
	ErrExchange = errors.New("answer to another handshake")
)

var suite = noise.NewCipherSuite(noise.DH25519, noise.CipherChaChaPoly, noise.HashBLAKE2s)

func handshakeState(initiator bool, prefix []byte, key PrivateKey, pub, peer PublicKey) (*noise.HandshakeState, error) {
	c := noise.Config{
		CipherSuite:   suite,
		Pattern:       noise.HandshakeIK,
		Initiator:     initiator,
		Prologue:      append([]byte("anytun 1 handshake\x00"), prefix...),
		StaticKeypair: noise.DHKey{Private: key[:], Public: pub[:]},
	}
	if initiator {
		c.PeerStatic = peer[:]
	}
	return noise.NewHandshakeState(c)
}

// Initiator is one attempt of a client at a handshake.
type Initiator struct {
	server   PublicKey
	exchange wire.Exchange
	state    *noise.HandshakeState
	message  []byte
	started  time.Time
}

// NewInitiator makes an attempt; Message is what to send.
func NewInitiator(server PublicKey, key PrivateKey, o wire.Offer, cookie *ClientCookie, now time.Time) (*Initiator, error) {
	i := &Initiator{server: server, started: now}
	if _, err := rand.Read(i.exchange[:]); err != nil {
		return nil, fmt.Errorf("random exchange id: %w", err)
	}
	o.Timestamp = uint64(now.UnixNano())
	b := wire.AppendInitiationPrefix(make([]byte, 0, wire.InitiationLen), i.exchange)
	var err error
	if i.state, err = handshakeState(true, b, key, key.Public(), server); err != nil {
		return nil, err
	}
	if b, _, _, err = i.state.WriteMessage(b, wire.AppendOffer(nil, o)); err != nil {
		return nil, err
	}
	b = append(b, mac(mac1Key(server), b)...)
	b = append(b, make([]byte, wire.MACLen)...)
	i.message = b
	if cookie.usable(server, now) {
		i.seal(cookie)
	}
	return i, nil
}

func (i *Initiator) seal(c *ClientCookie) {
	n := len(i.message) - wire.MACLen
	copy(i.message[n:], mac(c.value[:], i.message[:n]))
}

// Message returns the initiation to send, valid until the next call of Cookie.
func (i *Initiator) Message() []byte { return i.message }

// Cookie takes a cookie message. The attempt's Message then carries the cookie
// and should be sent again; the returned cookie serves later attempts too.
func (i *Initiator) Cookie(b []byte, now time.Time) (*ClientCookie, error) {
	m, err := wire.ParseCookie(b)
	if err != nil {
		return nil, err
	}
	if m.Exchange != i.exchange {
		return nil, ErrExchange
	}
	init, err := wire.ParseInitiation(i.message)
	if err != nil {
		return nil, err
	}
	c, err := openCookie(i.server, m, init.MAC1, now)
	if err != nil {
		return nil, err
	}
	i.seal(c)
	return c, nil
}

// Granted is the client's side of a new session.
type Granted struct {
	wire.Grant
	Header wire.DataHeader // of the client's packets, all but the counter
	Made   time.Time       // what the Sealer's counters count from
	*Sealer
	*Opener
}

// Finish takes the server's response. A response that doesn't belong to this
// attempt leaves it as it was.
func (i *Initiator) Finish(b []byte, now time.Time) (*Granted, error) {
	m, err := wire.ParseResponse(b)
	if err != nil {
		return nil, err
	}
	if m.Exchange != i.exchange {
		return nil, ErrExchange
	}
	payload, _, _, err := i.state.ReadMessage(nil, m.Noise)
	if err != nil {
		return nil, ErrHandshake
	}
	g := &Granted{Made: now}
	if g.Grant, err = wire.ParseGrant(payload); err != nil {
		return nil, err
	}
	clear(payload)
	out, err := newAEAD(g.Cipher, g.Secret, toServer)
	if err != nil {
		return nil, err
	}
	in, err := newAEAD(g.Cipher, g.Secret, toClient)
	if err != nil {
		return nil, err
	}
	g.Secret = [32]byte{}
	g.Header = wire.DataHeader{Epoch: byte(g.Epoch), Sender: wire.ClientSender, SessionID: g.SessionID}
	g.Sealer = newSealer(out, g.Header, now)
	g.Opener = newOpener(in, onlyServer)
	return g, nil
}

// Accepted is an initiation that a server has opened: who asks for what.
type Accepted struct {
	Client   PublicKey
	Offer    wire.Offer
	exchange wire.Exchange
	state    *noise.HandshakeState
	cluster  *Cluster
}

// Accept opens an initiation whose MACs were checked. It keeps nothing: replays
// are the caller's to refuse, by Offer.Timestamp.
func (c *Cluster) Accept(m wire.Initiation) (*Accepted, error) {
	s, err := handshakeState(false, m.Prefix, c.key, c.public, PublicKey{})
	if err != nil {
		return nil, err
	}
	payload, _, _, err := s.ReadMessage(nil, m.Noise)
	if err != nil {
		return nil, ErrHandshake
	}
	o, err := wire.ParseOffer(payload)
	if err != nil {
		return nil, err
	}
	return &Accepted{Client: PublicKey(s.PeerStatic()), Offer: o, exchange: m.Exchange, state: s, cluster: c}, nil
}

// Respond makes a new session for the client and returns the response. Of g,
// the caller sets Client, Server, KeepAlive, MTU, ports and addresses; session,
// secret, cipher and times are filled in here.
func (a *Accepted) Respond(g wire.Grant, fastAES bool, now time.Time) ([]byte, error) {
	var err error
	if g.Cipher, err = chooseCipher(a.Offer, fastAES); err != nil {
		return nil, err
	}
	salt, err := randomSalt()
	if err != nil {
		return nil, err
	}
	a.cluster.newSession(&g, now, salt)
	b := wire.AppendResponsePrefix(make([]byte, 0, wire.MaxResponseLen), a.exchange)
	b, _, _, err = a.state.WriteMessage(b, wire.AppendGrant(nil, g))
	return b, err
}
