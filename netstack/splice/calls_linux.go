package splice

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls that move bytes, on sockets that never make them wait, so Go's scheduler isn't told (see anytun/nowait).

// sysRead is unix.Read.
func sysRead(fd uintptr, p []byte) (int, error) { return rawCall(unix.SYS_READ, fd, p) }

// sysWrite is unix.Write.
func sysWrite(fd uintptr, p []byte) (int, error) { return rawCall(unix.SYS_WRITE, fd, p) }

func rawCall(trap, fd uintptr, p []byte) (int, error) {
	n, _, errno := unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// waiting is how many bytes of a stream can be read at once.
func waiting(fd uintptr) int {
	var n int32
	if _, _, errno := unix.RawSyscall(unix.SYS_IOCTL, fd, unix.SIOCINQ, uintptr(unsafe.Pointer(&n))); errno != 0 {
		return 0
	}
	return int(n)
}
