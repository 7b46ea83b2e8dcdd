package proxy

import "golang.org/x/sys/unix"

// waiting is how many bytes of a stream can be read at once.
func waiting(fd uintptr) int {
	n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
	if err != nil {
		return 0
	}
	return n
}
