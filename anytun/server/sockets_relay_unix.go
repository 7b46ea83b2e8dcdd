//go:build unix

package server

import (
	"errors"
	"syscall"
)

// endOfStream judges a failed CloseWrite: an end that is not connected any
// more needs no end of stream, and what it was closed by shows in the other
// direction.
func endOfStream(err error) error {
	if errors.Is(err, syscall.ENOTCONN) {
		return nil
	}
	return err
}
