//go:build !unix || solaris || illumos || aix

package udp

import (
	"errors"
	"syscall"
)

func setReusePort(syscall.RawConn) error { return errors.ErrUnsupported }
