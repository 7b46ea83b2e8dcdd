//go:build !unix

package splice

type calls struct{}

// rawReads is false where the runtime's sockets don't work by readiness (Windows): a buffer is held while idle.
const rawReads = false

func (*calls) tryRead(uintptr, []byte) (n int, again bool, err error) {
	panic("not reached: rawReads is false")
}

func (*calls) tryWrite(uintptr, []byte, bool) (n int, again bool, err error) {
	panic("not reached: rawReads is false")
}

func readable(uintptr) bool { return true }
