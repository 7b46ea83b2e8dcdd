//go:build unix && !solaris && !illumos && !aix

package udp

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func setReusePort(c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}); cerr != nil {
		return cerr
	}
	return err
}
