//go:build !linux

package server

import (
	"errors"
	"fmt"
)

// openPingSocket says that pings don't leave through this system yet.
func openPingSocket(_, _ bool) (*egressUDPSocket, error) {
	return nil, fmt.Errorf("ICMP sockets: %w", errors.ErrUnsupported)
}
