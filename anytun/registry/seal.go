package registry

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// A sealed message, so that nobody on the bus moves clients or learns where
// they are:
//
//	version(1, 1) | nonce(24): time(8, ns since 1970) random(16) | XChaCha20-Poly1305 of the message, tag(16)
//
// Associated data is the version and what the caller names, such as a key's
// name. The time in the nonce bounds how long a recorded message can be played
// again; within that it does little, since counters order everything.
const (
	sealVersion = 1
	sealHeader  = 1 + chacha20poly1305.NonceSizeX

	// SealOverhead is what a Sealer adds to a message, in bytes.
	SealOverhead = sealHeader + chacha20poly1305.Overhead

	// Fresh is how far apart the clocks of two servers may be, message
	// included.
	Fresh = 15 * time.Minute
)

var (
	// ErrForged says that a message isn't of this cluster, or damaged.
	ErrForged = errors.New("forged registry message")
	// ErrStale says that an authentic message is too old, or from the future.
	ErrStale = errors.New("stale registry message")
)

// Sealer seals and opens messages with the cluster's key. Safe for concurrent
// use.
type Sealer struct{ aead cipher.AEAD }

// NewSealer derives the key from the cluster's secret (any length, but
// unguessable).
func NewSealer(secret []byte) (*Sealer, error) {
	key, err := DeriveKey(secret, "messages", chacha20poly1305.KeySize)
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, err
	}
	return &Sealer{aead: aead}, nil
}

// DeriveKey returns n bytes for one purpose, from which neither the secret nor
// those for another purpose can be told.
func DeriveKey(secret []byte, purpose string, n int) ([]byte, error) {
	if len(secret) == 0 {
		return nil, errors.New("registry without a secret")
	}
	return hkdf.Key(sha256.New, secret, nil, "anytun 1 registry "+purpose, n)
}

// Seal appends the sealed message to dst.
func (s *Sealer) Seal(dst, message []byte, context string, now time.Time) []byte {
	start := len(dst)
	dst = append(dst, sealVersion)
	dst = binary.BigEndian.AppendUint64(dst, uint64(now.UnixNano()))
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand
	dst = append(dst, random[:]...)
	nonce := dst[start+1 : start+sealHeader]
	return s.aead.Seal(dst, nonce, message, associated(context))
}

// Open appends the message to dst and returns it with the time when it was
// sealed, without judging that. The error is ErrForged.
func (s *Sealer) Open(dst, sealed []byte, context string) ([]byte, time.Time, error) {
	if len(sealed) < SealOverhead || sealed[0] != sealVersion {
		return dst, time.Time{}, ErrForged
	}
	out, err := s.aead.Open(dst, sealed[1:sealHeader], sealed[sealHeader:], associated(context))
	if err != nil {
		return dst, time.Time{}, ErrForged
	}
	return out, time.Unix(0, int64(binary.BigEndian.Uint64(sealed[1:]))), nil
}

// OpenFresh is Open for messages that must be from about now (Fresh). The error
// is ErrForged or ErrStale.
func (s *Sealer) OpenFresh(dst, sealed []byte, context string, now time.Time) ([]byte, error) {
	out, at, err := s.Open(dst, sealed, context)
	if err == nil && now.Sub(at).Abs() > Fresh {
		return dst, ErrStale
	}
	return out, err
}

func associated(context string) []byte {
	return append([]byte{sealVersion}, context...)
}
