package udp

import (
	"errors"
	"syscall"
)

// dropReasonOf says whether err concerns one datagram only, and why that one is
// lost.
func dropReasonOf(err error) (DropReason, bool) {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return 0, false
	}
	return dropReason(errno)
}
