// Package deep saves a goroutine the growth of its stack.
//
// A goroutine starts with a stack of a few KB. What sends by gVisor needs between 8
// and 16 KB (tcp.sendTCP alone 3), so the runtime doubles the stack two or three times
// in the life of a short connection, each time in the depth of the calls, and walks all
// of their frames to adjust what points into the old stack: a tenth of what a short
// connection costs the client. Grown while there is nothing on it yet, the stack costs
// one allocation. Of a goroutine that waits the garbage collector takes it back, half at
// a time.
package deep

// frame is the size in bytes of a frame that makes any smaller stack grow to 16 KB.
const frame = 10 << 10

// Stack makes the stack of the calling goroutine large enough to send by gVisor. It is
// to be called first of all.
func Stack() { large(0) }

// large has a frame that the compiler can't leave out.
//
//go:noinline
func large(at uint) byte {
	var room [frame]byte
	return room[at%frame]
}
