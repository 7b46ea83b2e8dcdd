package splice

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/anytun-go/anytun/anytun/nowait"
)

// calls are the system calls that move a stream's bytes.
type calls struct {
	caller nowait.Caller
	queued int32 // the answer to waiting: a variable of its own would be allocated each time
}

// read is unix.Read.
func (c *calls) read(fd uintptr, p []byte) (int, error) { return c.move(unix.SYS_READ, fd, p, 0) }

// write is unix.Write, or if more follows unix.Send with MSG_MORE, which saves a segment, and a wake-up of its receiver.
func (c *calls) write(fd uintptr, p []byte, more bool) (int, error) {
	if more {
		return c.move(unix.SYS_SENDTO, fd, p, unix.MSG_MORE|unix.MSG_NOSIGNAL)
	}
	return c.move(unix.SYS_WRITE, fd, p, 0)
}

func (c *calls) move(trap, fd uintptr, p []byte, flags uintptr) (int, error) {
	n, errno := c.caller.Syscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// waiting is how many bytes can be read at once.
func (c *calls) waiting(fd uintptr) int {
	c.queued = 0
	if _, errno := c.caller.Syscall(unix.SYS_IOCTL, fd, unix.SIOCINQ, uintptr(unsafe.Pointer(&c.queued)), 0, 0, 0); errno != 0 {
		return 0
	}
	return int(c.queued)
}
