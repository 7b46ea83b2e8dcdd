//go:build unix

package splice

import (
	"errors"

	"golang.org/x/sys/unix"
)

// rawReads says that a socket may be read through its file descriptor.
const rawReads = true

func (c *calls) tryRead(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err = c.read(fd, p)
		switch {
		case err == nil:
			return n, false, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}

// tryWrite writes at most p; again means that the socket takes nothing for now. more: something follows at once, be it the
// end of the stream, with which p may leave.
func (c *calls) tryWrite(fd uintptr, p []byte, more bool) (n int, again bool, err error) {
	for {
		n, err = c.write(fd, p, more)
		switch {
		case err == nil:
			return n, false, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}

// readable is for RawConn.Read: it asks the kernel without taking anything from the socket.
func readable(fd uintptr) bool {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0 || err != nil // after an error the read that follows says what is wrong
	}
}
