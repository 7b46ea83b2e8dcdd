//go:build !windows

package udp

import "syscall"

// dropReason sorts the errors that a socket call makes of an ICMP message or of
// trouble with one datagram. What it doesn't know concerns the socket.
func dropReason(errno syscall.Errno) (DropReason, bool) {
	switch errno {
	case syscall.EMSGSIZE:
		return DropTooBig, true
	case syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN,
		syscall.EPROTO, syscall.EOPNOTSUPP:
		return DropUnreachable, true
	case syscall.ECONNREFUSED, syscall.ENOPROTOOPT, syscall.ECONNRESET:
		return DropRefused, true
	case syscall.EPERM, syscall.EACCES:
		return DropDenied, true
	case syscall.ENOBUFS, syscall.ENOMEM:
		return DropQueueFull, true
	case syscall.EINVAL, syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT, syscall.EDESTADDRREQ,
		syscall.ENODEV, syscall.ENXIO:
		return DropBadAddress, true
	}
	return 0, false
}
