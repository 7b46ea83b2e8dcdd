package session

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

// KeyLen is the size of X25519 keys, in bytes.
const KeyLen = 32

// PublicKey is an X25519 public key.
type PublicKey [KeyLen]byte

// PrivateKey is an X25519 private key. It prints as "redacted" so that it can't
// slip into a log; Text gives the key itself.
type PrivateKey [KeyLen]byte

// ErrKey says that a text isn't a key.
var ErrKey = errors.New("a key is 32 bytes in base64 (44 characters)")

// NewPrivateKey makes a key from the system's random source.
func NewPrivateKey() (PrivateKey, error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("generate key: %w", err)
	}
	return PrivateKey(k.Bytes()), nil
}

// Public returns the public half.
func (k PrivateKey) Public() PublicKey {
	p, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		panic("session: internal error: " + err.Error()) // the length is right by type
	}
	return PublicKey(p.PublicKey().Bytes())
}

// String hides the key.
func (PrivateKey) String() string { return "redacted" }

// GoString hides the key from %#v.
func (PrivateKey) GoString() string { return "session.PrivateKey(redacted)" }

// Format hides the key from every verb of package fmt, %x among them.
func (PrivateKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("redacted")) }

// Text returns the key in base64, for the file it is kept in.
func (k PrivateKey) Text() string { return base64.StdEncoding.EncodeToString(k[:]) }

// String returns the key in base64.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// ParsePublicKey reads a key in base64, standard or URL alphabet, padded or not.
func ParsePublicKey(s string) (PublicKey, error) {
	b, err := parseKey(s)
	return PublicKey(b), err
}

// ParsePrivateKey is ParsePublicKey for private keys.
func ParsePrivateKey(s string) (PrivateKey, error) {
	b, err := parseKey(s)
	return PrivateKey(b), err
}

func parseKey(s string) (k [KeyLen]byte, err error) {
	s = strings.TrimRight(strings.TrimSpace(s), "=")
	s = strings.NewReplacer("-", "+", "_", "/").Replace(s)
	b, err := base64.RawStdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != KeyLen {
		return k, ErrKey
	}
	return [KeyLen]byte(b), nil
}
