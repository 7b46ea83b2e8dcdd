package udp

import (
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of recvmmsg(2); Go pads it as C does.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

func (c *kernelConn) callRecvmmsg(fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
	n, errno := c.calls.Syscall(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)),
		unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

func (c *kernelConn) callSendmmsg(fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
	n, errno := c.calls.Syscall(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

// backlogDrops is the socket's own count of datagrams that found its receive
// buffer full (SK_MEMINFO_DROPS of linux/sock_diag.h).
func backlogDrops(fd uintptr) uint64 {
	const drops = 8
	var info [drops + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := syscall.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 || size < uint32(unsafe.Sizeof(info)) {
		return 0
	}
	return uint64(info[drops])
}

// sockaddr has room for both families.
type sockaddr = unix.RawSockaddrInet6

// addrPort reads the address that the kernel wrote.
func (z *zones) addrPort(sa *sockaddr) netip.AddrPort {
	p := (*[2]byte)(unsafe.Pointer(&sa.Port))
	port := uint16(p[0])<<8 | uint16(p[1])
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), port)
	case unix.AF_INET6:
		addr := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.Scope_id != 0 && addr.Is6() {
			addr = addr.WithZone(z.name(sa.Scope_id))
		}
		return netip.AddrPortFrom(addr, port)
	}
	return netip.AddrPort{}
}

// putAddrPort writes a for a socket of the given family and returns the length
// in bytes, 0 if such a socket has no way to a.
func (z *zones) putAddrPort(sa *sockaddr, a netip.AddrPort, is6 bool) uint32 {
	addr, port := a.Addr(), a.Port()
	p := (*[2]byte)(unsafe.Pointer(&sa.Port))
	p[0], p[1] = byte(port>>8), byte(port)
	if is6 {
		if !addr.IsValid() {
			return 0
		}
		sa.Family, sa.Flowinfo = unix.AF_INET6, 0
		sa.Addr, sa.Scope_id = addr.As16(), z.index(addr.Zone())
		return unix.SizeofSockaddrInet6
	}
	if addr = addr.Unmap(); !addr.Is4() {
		return 0
	}
	sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
	sa4.Family, sa4.Addr = unix.AF_INET, addr.As4()
	return unix.SizeofSockaddrInet4
}

// zones translates the scope of link-local addresses. Only those get here, so
// the lock is off the usual road. The maps can't outgrow the host's
// interfaces.
type zones struct {
	mu      sync.Mutex // guards the maps; held while asking the kernel for a name, at most once per interface
	names   map[uint32]string
	indexes map[string]uint32
}

func (z *zones) name(index uint32) string {
	z.mu.Lock()
	defer z.mu.Unlock()
	if name, ok := z.names[index]; ok {
		return name
	}
	ifi, err := net.InterfaceByIndex(int(index))
	if err != nil {
		return strconv.FormatUint(uint64(index), 10) // index understands it, too
	}
	z.learnLocked(ifi)
	return ifi.Name
}

func (z *zones) index(name string) uint32 {
	if name == "" {
		return 0
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if index, ok := z.indexes[name]; ok {
		return index
	}
	if index, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(index)
	}
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return 0 // the kernel will refuse the datagram, and it is counted
	}
	z.learnLocked(ifi)
	return uint32(ifi.Index)
}

func (z *zones) learnLocked(ifi *net.Interface) {
	if z.names == nil {
		z.names, z.indexes = make(map[uint32]string), make(map[string]uint32)
	}
	z.names[uint32(ifi.Index)] = ifi.Name
	z.indexes[ifi.Name] = uint32(ifi.Index)
}
