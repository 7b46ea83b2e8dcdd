//go:build !unix

package splice

// rawReads is false where the runtime's sockets don't work by readiness (Windows): a buffer is held while idle.
const rawReads = false

func tryRead(uintptr, []byte) (n int, again bool, err error) { panic("not reached: rawReads is false") }

func tryWrite(uintptr, []byte) (n int, again bool, err error) {
	panic("not reached: rawReads is false")
}

func readable(uintptr) bool { return true }
