//go:build !unix

package proxy

import "syscall"

// What Windows calls a busy port, a foreign address, a reserved port and a socket without a listener. Package syscall's
// constants of the Unix names are inventions there that no system call returns.
const (
	errInUse        = syscall.Errno(10048)
	errNotAvailable = syscall.Errno(10049)
	errForbidden    = syscall.Errno(10013)
	errRefused      = syscall.Errno(10061)
)

// limitSocketMode does nothing: a Windows socket file has the rights of its directory.
func limitSocketMode(_, _ string, _ syscall.RawConn) error { return nil }

// isListening is false: Windows processes don't inherit sockets by number.
func isListening(uintptr) bool { return false }
