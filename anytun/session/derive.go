package session

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/cpu"

	"github.com/anytun-go/anytun/anytun/wire"
)

// expand is HKDF-Expand with SHA-256 (RFC 5869) for a label and a context.
func expand(secret []byte, label string, context []byte, n int) []byte {
	out, err := hkdf.Expand(sha256.New, secret, "anytun 1 "+label+"\x00"+string(context), n)
	if err != nil {
		panic("session: internal error: " + err.Error()) // only for n > 255*32
	}
	return out
}

// ratchet is the step from one epoch's secret to the next one's (PROTOCOL.md 3.1).
func ratchet(s [32]byte) [32]byte { return [32]byte(expand(s[:], "ratchet", nil, 32)) }

// saltCipher is the bit of a salt that names the session's AEAD.
const saltCipher = 1 << 31

func cipherOf(salt uint32) wire.Cipher {
	if salt&saltCipher != 0 {
		return wire.ChaCha20Poly1305
	}
	return wire.AES128GCM
}

// sessionSecret follows from epoch secret, client number and salt (PROTOCOL.md 3.2).
func sessionSecret(epoch [32]byte, client, salt uint32) [32]byte {
	var c [8]byte
	binary.BigEndian.PutUint32(c[:], client)
	binary.BigEndian.PutUint32(c[4:], salt)
	return [32]byte(expand(epoch[:], "session", c[:], 32))
}

// direction tells the two keys of a session apart.
type direction string

const (
	toServer direction = "client to server"
	toClient direction = "server to client"
)

// newAEAD derives one direction's key and makes its AEAD (PROTOCOL.md 3.4).
func newAEAD(c wire.Cipher, secret [32]byte, d direction) (cipher.AEAD, error) {
	switch c {
	case wire.AES128GCM:
		b, err := aes.NewCipher(expand(secret[:], string(d), []byte{byte(c)}, 16))
		if err != nil {
			return nil, err
		}
		return cipher.NewGCM(b)
	case wire.ChaCha20Poly1305:
		return chacha20poly1305.New(expand(secret[:], string(d), []byte{byte(c)}, chacha20poly1305.KeySize))
	}
	return nil, wire.ErrValue
}

// FastAES says whether this machine's CPU has the instructions that make
// AES-GCM the faster of the two AEADs.
func FastAES() bool {
	return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ ||
		cpu.ARM64.HasAES && cpu.ARM64.HasPMULL ||
		cpu.S390X.HasAES && cpu.S390X.HasAESGCM
}

// chooseCipher picks the AEAD that both CPUs do well.
func chooseCipher(o wire.Offer, fastAES bool) (wire.Cipher, error) {
	has := func(c wire.Cipher) bool { return o.Ciphers&(1<<c) != 0 }
	switch {
	case has(wire.AES128GCM) && o.FastAES && fastAES:
		return wire.AES128GCM, nil
	case has(wire.ChaCha20Poly1305):
		return wire.ChaCha20Poly1305, nil
	case has(wire.AES128GCM):
		return wire.AES128GCM, nil
	}
	return 0, ErrCipher
}
