package session

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/anytun-go/anytun/anytun/wire"
)

// An initiation carries two MACs, after WireGuard (Donenfeld, "WireGuard: Next
// Generation Kernel Network Tunnel", sections 5.3 and 5.4.4): the first proves
// knowledge of the server's public key and keeps servers silent towards
// strangers; the second, asked for under load only, proves that the sender
// receives at its address. The cookie's key follows from the epoch secret, so
// any server of the cluster checks the cookies of any other (PROTOCOL.md 4.3).

// cookieSlot is how long a cookie's value stays the same; it is accepted for
// one slot more.
const cookieSlot = 2 * time.Minute

func labelKey(label string, server PublicKey) []byte {
	h := blake2s.Sum256(append([]byte("anytun 1 "+label+"\x00"), server[:]...))
	return h[:]
}

func mac1Key(server PublicKey) []byte { return labelKey("mac1", server) }

func mac(key []byte, parts ...[]byte) []byte {
	h, err := blake2s.New128(key)
	if err != nil {
		panic("session: internal error: " + err.Error()) // keys are 16 or 32 bytes
	}
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// Verifier checks the MACs of initiations for a server. Safe for concurrent use.
type Verifier struct {
	cluster *Cluster
	key     []byte
	seal    []byte
}

// Verifier returns the cluster's check of initiations.
func (c *Cluster) Verifier() *Verifier {
	return &Verifier{cluster: c, key: mac1Key(c.public), seal: labelKey("cookie", c.public)}
}

// MAC1 says whether the sender knows the cluster's public key.
func (v *Verifier) MAC1(m wire.Initiation) bool {
	return subtle.ConstantTimeCompare(mac(v.key, m.Covered1), m.MAC1) == 1
}

// MAC2 says whether the sender has a cookie for the address it sends from.
func (v *Verifier) MAC2(m wire.Initiation, from netip.AddrPort, now time.Time) bool {
	ok := 0
	set := v.cluster.set.Load()
	for i := range set.accept { // a cookie may be from just before the epoch's end
		e := &set.accept[i]
		if e.id == nil {
			continue
		}
		for _, t := range [2]time.Time{now, now.Add(-cookieSlot)} {
			c := cookieValue(e, from, t)
			ok |= subtle.ConstantTimeCompare(mac(c, m.Covered2), m.MAC2)
		}
	}
	return ok == 1
}

func cookieValue(e *epoch, from netip.AddrPort, t time.Time) []byte {
	var b [8 + 16 + 2]byte
	binary.BigEndian.PutUint64(b[:], uint64(t.Unix())/uint64(cookieSlot/time.Second))
	a := from.Addr().As16()
	copy(b[8:], a[:])
	binary.BigEndian.PutUint16(b[24:], from.Port())
	return mac(e.cookie[:], b[:])
}

// AppendCookie appends the cookie message that answers m.
func (v *Verifier) AppendCookie(b []byte, m wire.Initiation, from netip.AddrPort, now time.Time) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(v.seal)
	if err != nil {
		return nil, err
	}
	var nonce [wire.CookieNonceLen]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, fmt.Errorf("random nonce: %w", err)
	}
	c := cookieValue(&v.cluster.set.Load().accept[1], from, now)
	return wire.AppendCookie(b, wire.Cookie{
		Exchange: m.Exchange, Nonce: nonce[:], Sealed: aead.Seal(nil, nonce[:], c, m.MAC1),
	}), nil
}

// ClientCookie is a cookie that a client holds. It serves until it is two
// minutes old, from the address it was given to.
type ClientCookie struct {
	value  [wire.CookieLen]byte
	server PublicKey
	at     time.Time
}

func (c *ClientCookie) usable(server PublicKey, now time.Time) bool {
	return c != nil && c.server == server && now.Sub(c.at) < cookieSlot
}

func openCookie(server PublicKey, m wire.Cookie, mac1 []byte, now time.Time) (*ClientCookie, error) {
	aead, err := chacha20poly1305.NewX(labelKey("cookie", server))
	if err != nil {
		return nil, err
	}
	v, err := aead.Open(nil, m.Nonce, m.Sealed, mac1)
	if err != nil {
		return nil, ErrHandshake
	}
	return &ClientCookie{value: [wire.CookieLen]byte(v), server: server, at: now}, nil
}

// Bucket is a token bucket: rate tokens a second, at most burst at once. The
// zero time of last means full. Not safe for concurrent use.
type Bucket struct {
	tokens float64
	last   time.Time
}

// Take takes a token and says whether there was one.
func (b *Bucket) Take(now time.Time, rate, burst float64) bool {
	if b.last.IsZero() {
		b.tokens = burst
	} else if d := now.Sub(b.last).Seconds(); d > 0 {
		b.tokens = min(burst, b.tokens+d*rate)
	}
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// Full says whether nothing was taken for so long that forgetting the bucket
// changes nothing.
func (b *Bucket) Full(now time.Time, rate, burst float64) bool {
	return b.tokens+now.Sub(b.last).Seconds()*rate >= burst
}
