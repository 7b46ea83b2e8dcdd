package session

import (
	"crypto/cipher"
	"encoding/binary"
)

// The session id in a data header is the pair (client number, salt), 32 bits
// each, under a permutation keyed from the epoch secret: a Feistel network of
// four passes with AES-128 as the round function, after the scheme of QUIC-LB
// (draft-ietf-quic-load-balancers, section 5.4.2). An observer sees no relation
// between two sessions of a client; any server of the cluster undoes it with
// one key per epoch (PROTOCOL.md 3.3).

func idRound(b cipher.Block, half uint32, pass byte) uint32 {
	var x [16]byte
	binary.BigEndian.PutUint32(x[:], half)
	x[14], x[15] = 8, pass // the length of the id in bytes, and the pass
	b.Encrypt(x[:], x[:])
	return binary.BigEndian.Uint32(x[:])
}

func encryptID(b cipher.Block, client, salt uint32) uint64 {
	l, r := client, salt
	r ^= idRound(b, l, 1)
	l ^= idRound(b, r, 2)
	r ^= idRound(b, l, 3)
	l ^= idRound(b, r, 4)
	return uint64(l)<<32 | uint64(r)
}

func decryptID(b cipher.Block, id uint64) (client, salt uint32) {
	l, r := uint32(id>>32), uint32(id)
	l ^= idRound(b, r, 4)
	r ^= idRound(b, l, 3)
	l ^= idRound(b, r, 2)
	r ^= idRound(b, l, 1)
	return l, r
}
