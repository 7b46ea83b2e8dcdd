//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

const (
	socksConnect   = 1
	socksAssociate = 3
	socksPatience  = time.Minute
)

// socksRequest is a SOCKS5 client without authentication. It returns the
// connection and the address of the reply.
func socksRequest(proxy string, command byte, to netip.AddrPort) (net.Conn, netip.AddrPort, error) {
	c, err := net.DialTimeout("tcp", proxy, socksPatience)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	bound, err := socksHandshake(c, command, to)
	if err != nil {
		c.Close()
		return nil, netip.AddrPort{}, err
	}
	return c, bound, nil
}

func socksHandshake(c net.Conn, command byte, to netip.AddrPort) (bound netip.AddrPort, err error) {
	if err := c.SetDeadline(time.Now().Add(socksPatience)); err != nil {
		return bound, err
	}
	if _, err := c.Write(appendSOCKSAddress([]byte{5, 1, 0, 5, command, 0}, to)); err != nil {
		return bound, err
	}
	reply := make([]byte, 2+4)
	if _, err := io.ReadFull(c, reply); err != nil {
		return bound, err
	}
	if reply[1] != 0 {
		return bound, errors.New("the proxy wants a password")
	}
	if reply[3] != 0 {
		return bound, fmt.Errorf("reply %d", reply[3])
	}
	rest := make([]byte, map[byte]int{1: 4 + 2, 4: 16 + 2}[reply[5]])
	if _, err := io.ReadFull(c, rest); err != nil {
		return bound, err
	}
	if len(rest) == 0 {
		return bound, fmt.Errorf("address type %d in the reply", reply[5])
	}
	n := len(rest) - 2
	a, _ := netip.AddrFromSlice(rest[:n])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(rest[n:])), c.SetDeadline(time.Time{})
}

// appendSOCKSAddress appends type, address and port.
func appendSOCKSAddress(b []byte, a netip.AddrPort) []byte {
	kind := byte(1)
	if a.Addr().Is6() {
		kind = 4
	}
	b = append(append(b, kind), a.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}
