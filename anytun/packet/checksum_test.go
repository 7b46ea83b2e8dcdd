package packet

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// twinSum is RFC 1071 section 4.1, byte by byte.
func twinSum(b []byte, initial uint16) uint16 {
	sum := uint32(initial)
	for i, c := range b {
		if i%2 == 0 {
			sum += uint32(c) << 8
		} else {
			sum += uint32(c)
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
	}
	return uint16(sum)
}

func TestSum(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 3000)
	for n := range len(buf) {
		for i := range buf[:n] {
			buf[i] = byte(rng.Uint32())
		}
		offset := 0
		if n > 8 {
			offset = n % 8 // unaligned
		}
		b, initial := buf[offset:n], uint16(rng.Uint32())
		got := Sum(b, initial)
		if want := twinSum(b, initial); got != want {
			t.Fatalf("%d bytes: %#x, want %#x", len(b), got, want)
		}
		if want := checksum.Checksum(b, initial); got != want {
			t.Fatalf("%d bytes: %#x, gVisor says %#x", len(b), got, want)
		}
		if Checksum(b, initial) != ^got {
			t.Fatal("Checksum is not Sum's complement")
		}
	}
}

// TestSumExtremes: where carries are most and where there are none.
func TestSumExtremes(t *testing.T) {
	for _, c := range []byte{0, 0xff} {
		b := make([]byte, 1<<16)
		for i := range b {
			b[i] = c
		}
		for _, n := range []int{0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 40, 65535, 65536} {
			for _, initial := range []uint16{0, 1, 0xfffe, 0xffff} {
				if got, want := Sum(b[:n], initial), twinSum(b[:n], initial); got != want {
					t.Errorf("%d × %#x and %#x: %#x, want %#x", n, c, initial, got, want)
				}
			}
		}
	}
}

// TestSumCarries folds to 0x1ffff on the way, which takes one round more than most.
func TestSumCarries(t *testing.T) {
	b := []byte{0xff, 0xff, 0x00, 0x80, 0x00, 0x00, 0x00, 0x80}
	if got, want := Sum(b, 0), twinSum(b, 0); got != want {
		t.Errorf("%#x, want %#x", got, want)
	}
}

// TestRFC1071 is the example of RFC 1071 section 3.
func TestRFC1071(t *testing.T) {
	if s := Sum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0); s != 0xddf2 {
		t.Errorf("%#x, want 0xddf2", s)
	}
}

// TestRFC1624 is the example of RFC 1624 section 4, where the older equation fails.
func TestRFC1624(t *testing.T) {
	if s := UpdateChecksum(0xdd2f, 0x5555, 0x3285); s != 0x0000 {
		t.Errorf("%#x, want 0", s)
	}
}

func TestUpdateChecksum(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	values := []uint16{0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff}
	for range 20_000 {
		b := make([]byte, 22)
		b[0] = 0x45 // no header is all zero
		for i := 2; i < len(b); i++ {
			b[i] = byte(rng.Uint32())
		}
		if rng.IntN(2) == 0 {
			binary.BigEndian.PutUint16(b[4:], values[rng.IntN(len(values))])
		}
		binary.BigEndian.PutUint16(b[20:], 0)
		sum := Checksum(b, 0)
		old, new := binary.BigEndian.Uint16(b[4:]), uint16(rng.Uint32())
		if rng.IntN(2) == 0 {
			new = values[rng.IntN(len(values))]
		}
		binary.BigEndian.PutUint16(b[4:], new)
		if got, want := UpdateChecksum(sum, old, new), ^twinSum(b, 0); got != want {
			t.Fatalf("%#x to %#x: %#x, want %#x", old, new, got, want)
		}
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add([]byte{0xff}, uint16(0xffff))
	f.Add(make([]byte, 41), uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, initial uint16) {
		if got, want := Sum(b, initial), twinSum(b, initial); got != want {
			t.Errorf("%#x, want %#x", got, want)
		}
	})
}
