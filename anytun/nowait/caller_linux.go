package nowait

import (
	"sync/atomic"
	"syscall"
)

const (
	// lull is after how many packets, each alone, the road is taken for idle.
	lull = 8

	// told is of how many calls the scheduler hears of one: of some, since nobody
	// interrupts a goroutine that always finds something to do, and nobody asks the
	// network for others, while its monitor sleeps; of few, since to wake it up costs
	// more than a call. It takes milliseconds where calls follow each other.
	told = 256
)

// Caller makes the system calls of a socket or a device. The zero value is ready;
// it is safe for concurrent use.
type Caller struct {
	alone atomic.Int32  // packets that came alone, since several came at once; to lull
	calls atomic.Uint32 // made
}

// Came is told how many packets were received at once.
func (c *Caller) Came(n int) {
	switch alone := c.alone.Load(); {
	case n > 1 && alone != 0:
		c.alone.Store(0)
	case n == 1 && alone < lull:
		c.alone.Store(alone + 1)
	}
}

// Idle reports whether packets come one by one, so that the scheduler is told of
// the calls.
func (c *Caller) Idle() bool { return c.alone.Load() >= lull }

// Syscall makes a call that doesn't wait. Pointers may be passed as with
// syscall.Syscall6.
//
//go:uintptrescapes
func (c *Caller) Syscall(trap, a1, a2, a3, a4, a5, a6 uintptr) (uintptr, syscall.Errno) {
	if c.Idle() || c.calls.Add(1)%told == 0 {
		r, _, errno := syscall.Syscall6(trap, a1, a2, a3, a4, a5, a6)
		return r, errno
	}
	r, _, errno := syscall.RawSyscall6(trap, a1, a2, a3, a4, a5, a6)
	return r, errno
}
