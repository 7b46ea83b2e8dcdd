package server

import (
	"encoding/binary"
	"io"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/anytun-go/anytun/anytun/nowait"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/netstack/splice"
)

// egressUDPControl prepares a mapping's socket before it is bound.
func egressUDPControl(network, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		s := int(fd)
		// Go allows broadcast by default; clients may not, and the kernel
		// knows better than the policy which addresses are one.
		_ = unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
		// Errors of unconnected sockets, and trains of datagrams in one read.
		// Old kernels do without either.
		if network == "udp6" {
			_ = unix.SetsockoptInt(s, unix.SOL_IPV6, unix.IPV6_RECVERR, 1)
		} else {
			_ = unix.SetsockoptInt(s, unix.SOL_IP, unix.IP_RECVERR, 1)
		}
		_ = unix.SetsockoptInt(s, unix.SOL_UDP, unix.UDP_GRO, 1)
	})
}

// egressUDPSocket is a mapping's socket, for UDP or ICMP.
type egressUDPSocket struct {
	c     io.Closer
	raw   syscall.RawConn
	calls nowait.Caller
}

func openEgressUDP(v6 bool) (*egressUDPSocket, error) {
	c, err := listenEgressUDP(v6)
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		c.Close()
		return nil, err
	}
	return &egressUDPSocket{c: c, raw: raw}, nil
}

func (s *egressUDPSocket) close() { s.c.Close() }

// egressSender is the memory of one send.
type egressSender struct {
	name    unix.RawSockaddrInet6 // also holds the smaller IPv4 one
	nameLen uintptr
	payload []byte
	calls   *nowait.Caller
	errno   unix.Errno
	try     func(fd uintptr) bool
}

var egressSenders = sync.Pool{New: func() any {
	s := new(egressSender)
	s.try = s.trySend
	return s
}}

// trySend never asks to wait: Input serves all clients, and a datagram that
// finds the host's buffer full is lost as on any full link.
func (s *egressSender) trySend(fd uintptr) bool {
	for range 3 {
		_, s.errno = s.calls.Syscall(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.payload))),
			uintptr(len(s.payload)), unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&s.name)), s.nameLen)
		switch s.errno {
		case unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.EACCES, unix.EPROTO, unix.EMSGSIZE:
			// Perhaps the report about an earlier datagram, which is taken
			// off by being told; the reader finds its details.
			continue
		}
		break
	}
	return true
}

// send sends one datagram without waiting.
func (s *egressUDPSocket) send(payload []byte, to netip.AddrPort) error {
	w := egressSenders.Get().(*egressSender)
	w.payload, w.calls, w.errno = payload, &s.calls, 0
	if to.Addr().Is4() {
		in4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&w.name))
		*in4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
		w.nameLen = unix.SizeofSockaddrInet4
	} else {
		w.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: to.Addr().As16()}
		w.nameLen = unix.SizeofSockaddrInet6
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&w.name.Port))[:], to.Port())
	err := s.raw.Write(w.try)
	errno := w.errno
	w.payload, w.calls = nil, nil
	egressSenders.Put(w)
	switch {
	case err != nil:
		return err
	case errno == 0:
		return nil
	case errno == unix.EAGAIN, errno == unix.ENOBUFS:
		return errEgressFull
	}
	return errno
}

// egressUDPReader reads a socket with a buffer that is taken from the pool once
// there is something to read, one train of datagrams per system call.
type egressUDPReader struct {
	raw   syscall.RawConn
	calls *nowait.Caller
	try   func(fd uintptr) bool
	woken bool // the poller, not read, made this attempt
	wait  bool

	buf  *splice.Buffer
	hdr  unix.Msghdr
	iov  unix.Iovec
	name unix.RawSockaddrInet6 // also holds the smaller IPv4 one
	oob  [32]uint64            // control messages, aligned
	n    int
	got  egressRead
	err  error
}

func (s *egressUDPSocket) reader() *egressUDPReader {
	r := &egressUDPReader{raw: s.raw, calls: &s.calls}
	r.try = r.tryRead
	return r
}

// read returns the next datagrams or error report. Where there is nothing it waits,
// or returns nil.
func (r *egressUDPReader) read(wait bool) (*egressRead, error) {
	r.woken, r.wait = false, wait
	if err := r.raw.Read(r.try); err != nil {
		return nil, err
	}
	if r.err != nil || r.buf == nil {
		return nil, r.err
	}
	return &r.got, nil
}

// release gives the buffer of the last read back.
func (r *egressUDPReader) release() {
	splice.Put(r.buf)
	r.buf = nil
}

func (r *egressUDPReader) tryRead(fd uintptr) bool {
	r.buf, r.err = splice.Get(), nil
	for range 64 {
		errno := r.recvmsg(fd, 0)
		switch errno {
		case 0:
			r.datagrams()
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if !r.woken {
				r.woken = true
				r.release()
				return !r.wait
			}
			// Woken for nothing: a report whose error a send has taken.
		case unix.EBADF, unix.ENOTSOCK, unix.EFAULT, unix.EINVAL:
			r.release()
			r.err = os.NewSyscallError("recvmsg", errno)
			return true
		}
		switch r.recvmsg(fd, unix.MSG_ERRQUEUE) {
		case 0:
			if r.report() {
				return true
			}
		case unix.EAGAIN:
			if errno == unix.EAGAIN {
				r.release()
				return !r.wait
			}
		}
	}
	r.release()
	return !r.wait
}

// recvmsg reads into the reader's fields without allocating, which neither
// package net nor x/sys/unix does for unconnected sockets with control data.
func (r *egressUDPReader) recvmsg(fd uintptr, flags int) unix.Errno {
	r.iov.Base = &r.buf[0]
	r.iov.SetLen(len(r.buf))
	r.hdr = unix.Msghdr{
		Name:    (*byte)(unsafe.Pointer(&r.name)),
		Namelen: unix.SizeofSockaddrInet6,
		Iov:     &r.iov,
		Control: (*byte)(unsafe.Pointer(&r.oob)),
	}
	r.hdr.SetIovlen(1)
	r.hdr.SetControllen(int(unsafe.Sizeof(r.oob)))
	n, errno := r.calls.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.hdr)), uintptr(flags|unix.MSG_DONTWAIT), 0, 0, 0)
	r.n = int(n)
	return errno
}

// peer is the address that recvmsg has filled in.
func (r *egressUDPReader) peer() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&r.name.Port))[:])
	if r.name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&r.name)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(r.name.Addr), port)
}

// control returns the first control message of a level and type.
func (r *egressUDPReader) control(level, kind int32) []byte {
	//nolint:unconvert // Controllen is shorter on 32-bit systems
	b := unsafe.Slice((*byte)(unsafe.Pointer(&r.oob)), min(uint64(r.hdr.Controllen), uint64(unsafe.Sizeof(r.oob))))
	for len(b) >= unix.CmsgLen(0) {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return nil
		}
		if h.Level == level && h.Type == kind {
			return data
		}
		b = rest
	}
	return nil
}

// datagrams describes what a plain recvmsg has read.
func (r *egressUDPReader) datagrams() {
	r.got = egressRead{peer: r.peer(), data: r.buf[:r.n], size: max(r.n, 1)}
	if b := r.control(unix.SOL_UDP, unix.UDP_GRO); len(b) >= 4 {
		if size := int(binary.NativeEndian.Uint32(b)); size > 0 {
			r.got.size = size
		}
	}
}

// report describes what was read from the error queue, and reports whether a
// client is to hear about it.
func (r *egressUDPReader) report() bool {
	b := r.control(unix.SOL_IP, unix.IP_RECVERR)
	if b == nil {
		b = r.control(unix.SOL_IPV6, unix.IPV6_RECVERR)
	}
	// struct sock_extended_err: errno, origin, type, code, …
	if len(b) < 16 {
		return false
	}
	origin, kind, code := b[4], b[5], b[6]
	r.got = egressRead{peer: r.peer(), data: r.buf[:r.n], failed: true}
	switch {
	case origin == unix.SO_EE_ORIGIN_ICMP && kind == 3: // RFC 792, RFC 1812 section 5.2.7.1
		switch code {
		case 2, 3:
			r.got.code = netstack.UnreachablePort
		case 0, 6, 11:
			r.got.code = netstack.UnreachableNet
		case 4:
			return false // path MTU: the kernel has learned it
		case 9, 10, 13:
			r.got.code = netstack.UnreachableProhibited
		default:
			r.got.code = netstack.UnreachableHost
		}
	case origin == unix.SO_EE_ORIGIN_ICMP6 && kind == 1: // RFC 4443 section 3.1
		switch code {
		case 4:
			r.got.code = netstack.UnreachablePort
		case 0:
			r.got.code = netstack.UnreachableNet
		case 1, 5, 6:
			r.got.code = netstack.UnreachableProhibited
		default:
			r.got.code = netstack.UnreachableHost
		}
	default:
		return false
	}
	return true
}
