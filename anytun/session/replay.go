package session

// WindowLen is how far behind the highest counter a packet may arrive, in
// packets.
const WindowLen = 8192

// One word more than WindowLen needs, so that a whole word can be cleared when
// the window moves on (the ring of RFC 6479).
const windowWords = WindowLen/64 + 1

// Window remembers which counters of one sender were seen. The zero value is
// ready: the first counter opens it, wherever it starts. Not safe for
// concurrent use.
type Window struct {
	top  uint64 // highest counter seen; 0 before the first
	bits [windowWords]uint64
}

// Fresh says whether counter c could still be accepted: not seen, not older
// than the window.
func (w *Window) Fresh(c uint64) bool {
	if c > w.top {
		return true
	}
	return w.top-c < WindowLen && w.bits[c/64%windowWords]&(1<<(c%64)) == 0
}

// Mark notes that counter c was seen; Fresh(c) must have been true.
func (w *Window) Mark(c uint64) {
	if c > w.top {
		last := c / 64
		if last-w.top/64 >= windowWords { // also when the window was empty
			clear(w.bits[:])
		}
		for i := w.top/64 + 1; i <= last && i-w.top/64 < windowWords; i++ {
			w.bits[i%windowWords] = 0
		}
		w.top = c
	}
	w.bits[c/64%windowWords] |= 1 << (c % 64)
}
