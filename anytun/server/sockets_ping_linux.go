package server

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// icmpFilter is ICMP_FILTER of linux/icmp.h, which x/sys lacks.
const icmpFilter = 1

// openPingSocket opens an ICMP socket for echo requests and their replies.
func openPingSocket(v6, raw bool) (*egressUDPSocket, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var at unix.Sockaddr = &unix.SockaddrInet4{}
	if v6 {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
		at = &unix.SockaddrInet6{}
	}
	kind := unix.SOCK_DGRAM
	if raw {
		kind = unix.SOCK_RAW
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "icmp")
	defer f.Close()
	if raw {
		if v6 {
			var filter unix.ICMPv6Filter
			for i := range filter.Data {
				filter.Data[i] = ^uint32(0)
			}
			filter.Data[icmpv6EchoReply>>5] &^= 1 << (icmpv6EchoReply & 31)
			err = unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, &filter)
		} else {
			err = unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1 << icmpEchoReply))
		}
		if err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	// A ping socket chooses its identifier now.
	if err := unix.Bind(fd, at); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	rc, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		c.Close()
		return nil, err
	}
	return &egressUDPSocket{c: c, raw: rc}, nil
}
