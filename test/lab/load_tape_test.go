//go:build linux

package lab

import "encoding/binary"

// A tape is an endless stream of bytes, each of which depends on the tape's key
// and on its position. A byte that is lost, doubled, moved or changed is seen
// by whoever knows the key and how far the stream has come.
type tape uint64

// word is the tape's bytes 8i to 8i+7 (splitmix64).
func (k tape) word(i uint64) uint64 {
	z := uint64(k) + (i+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// fill writes the bytes from position at on into b.
func (k tape) fill(b []byte, at uint64) {
	for len(b) > 0 {
		w, skip := k.word(at/8), at%8
		if skip == 0 && len(b) >= 8 {
			binary.LittleEndian.PutUint64(b, w)
			b, at = b[8:], at+8
			continue
		}
		b[0] = byte(w >> (8 * skip))
		b, at = b[1:], at+1
	}
}

// check returns the index of the first byte of b that isn't the tape's from
// position at on, or -1.
func (k tape) check(b []byte, at uint64) int {
	for i := 0; i < len(b); {
		p := at + uint64(i)
		w, skip := k.word(p/8), p%8
		if skip == 0 && len(b)-i >= 8 && binary.LittleEndian.Uint64(b[i:]) == w {
			i += 8
			continue
		}
		if b[i] != byte(w>>(8*skip)) {
			return i
		}
		i++
	}
	return -1
}
