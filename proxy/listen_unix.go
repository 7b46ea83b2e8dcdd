//go:build unix

package proxy

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// What the kernel calls a busy port, a foreign address, a privileged port and a socket without a listener.
const (
	errInUse        = syscall.EADDRINUSE
	errNotAvailable = syscall.EADDRNOTAVAIL
	errForbidden    = syscall.EACCES
	errRefused      = syscall.ECONNREFUSED
)

// limitSocketMode sets the mode before the socket has a name, so that nobody else gets in first. Linux takes the file's
// mode from there; elsewhere it may fail, and the chmod that follows has to do.
func limitSocketMode(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = unix.Fchmod(int(fd), socketMode) })
}

func isListening(fd uintptr) bool {
	v, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && v != 0
}
