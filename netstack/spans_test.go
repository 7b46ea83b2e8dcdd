package netstack

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Ranges against a twin that remembers every byte.
func TestSpansAgainstTwin(t *testing.T) {
	const size, most = 200, 8
	rng := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		base := -rng.Uint32N(2 * size) // about to wrap
		var twin [size]bool
		var s spans
		for range 40 {
			from := rng.IntN(size - 1)
			to := from + 1 + rng.IntN(min(size-from-1, 20))
			if rng.IntN(5) == 0 {
				s.cut(base + uint32(from))
				clear(twin[:from])
			} else if s.add(span{base + uint32(from), base + uint32(to)}, most) {
				for i := from; i < to; i++ {
					twin[i] = true
				}
			} else if len(s) < most {
				t.Fatalf("no room for [%d, %d) in %v", from, to, s)
			}
			var want spans
			for i := range twin {
				switch at := base + uint32(i); {
				case !twin[i]:
				case i > 0 && twin[i-1]:
					want[len(want)-1].end = at + 1
				default:
					want = append(want, span{at, at + 1})
				}
			}
			if !slices.Equal(s, want) {
				t.Fatalf("from %#x: %v, want %v", base, s, want)
			}
		}
	}
}
