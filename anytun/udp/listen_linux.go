package udp

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/anytun-go/anytun/anytun/nowait"
)

// kernelConn is the Conn of Linux. The road of a batch is in read_linux.go and
// write_linux.go.
type kernelConn struct {
	uc    *net.UDPConn
	rc    syscall.RawConn
	local netip.AddrPort
	// is6 says that the socket's family is AF_INET6, so IPv4 addresses are
	// mapped on their way into the kernel.
	is6 bool
	// wildcard says that the socket is bound to no particular address, so the
	// kernel tells and is told the local address of each message.
	wildcard bool

	recvOffload bool
	sendOffload atomic.Bool // turned off when a device can't do it
	recvBuffer  int
	sendBuffer  int
	counters    counters

	reader   *reader // nil while a socket that shares has none
	share    bool
	messages int
	receive  func(fd uintptr) bool // the method receiveMessages, bound once
	free     chan *sendBatch       // idle scratch of WriteBatch
	zones    zones

	// The system calls, so that tests can be the kernel.
	calls    nowait.Caller
	recvmmsg func(fd uintptr, msgs []mmsghdr) (int, syscall.Errno)
	sendmmsg func(fd uintptr, msgs []mmsghdr) (int, syscall.Errno)

	closeOnce sync.Once
	closeErr  error
}

var (
	_ countedConn = (*kernelConn)(nil)
	_ StatsReader = (*kernelConn)(nil)
)

// idleBatches is how many send scratches (about 16 KiB each) a socket keeps; a
// WriteBatch that finds none makes one, so this bounds memory at rest, not the
// number of writers.
const idleBatches = 8

func listen(addr netip.AddrPort, o Options) (Conn, error) { return listenKernel(addr, o) }

func listenKernel(addr netip.AddrPort, o Options) (*kernelConn, error) {
	o = o.withDefaults()
	c := &kernelConn{
		free:     make(chan *sendBatch, idleBatches),
		share:    o.ShareBuffers,
		messages: o.Messages,
	}
	c.receive, c.recvmmsg, c.sendmmsg = c.receiveMessages, c.callRecvmmsg, c.callSendmmsg
	control := o.Control
	o.Control = func(network, address string, rc syscall.RawConn) error {
		// Before bind, so that the first datagram finds everything set.
		if err := c.prepare(network, address, rc, o); err != nil {
			return err
		}
		if control != nil {
			return control(network, address, rc)
		}
		return nil
	}
	uc, err := listenUDP(addr, o)
	if err != nil {
		return nil, err
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		uc.Close()
		return nil, fmt.Errorf("listen on udp %s: %w", addr, err)
	}
	c.uc, c.rc = uc, rc
	c.local = localAddr(uc)
	if !c.share {
		c.reader = newReader(c.messages, smallMessages)
	}
	return c, nil
}

// prepare sets the socket's options. All are improvements that a kernel may
// lack, except the local address of a message, without which an anycast server
// would answer from the wrong address.
func (c *kernelConn) prepare(network, address string, rc syscall.RawConn, o Options) error {
	c.is6 = network == "udp6"
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	c.wildcard = at.Addr().IsUnspecified()
	cerr := rc.Control(func(ufd uintptr) {
		fd := int(ufd)
		if err = c.askForLocal(fd); err != nil {
			err = fmt.Errorf("ask for local addresses: %w", err)
			return
		}
		allowFragments(fd, c.is6)
		c.recvBuffer = setBuffer(fd, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, o.RecvBuffer)
		c.sendBuffer = setBuffer(fd, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE, o.SendBuffer)
		if o.NoOffload {
			return
		}
		// Kernels since 4.18 know UDP_SEGMENT, since 5.0 UDP_GRO.
		_, serr := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		c.sendOffload.Store(serr == nil)
		c.recvOffload = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	})
	if cerr != nil {
		return cerr
	}
	return err
}

// askForLocal makes the kernel tell the local address of each message, unless
// there is only one.
func (c *kernelConn) askForLocal(fd int) error {
	switch {
	case !c.wildcard:
		return nil
	case c.is6:
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	default:
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
}

// allowFragments chooses the path MTU policy that the package comment explains.
// A kernel or sandbox without the option keeps its default, which is no
// worse than any other program's.
func allowFragments(fd int, is6 bool) {
	if unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_OMIT) != nil {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	}
	if is6 {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT)
	}
}

// setBuffer raises a socket buffer to size bytes, past the system's limit where
// this process may (CAP_NET_ADMIN), and returns what it is now. The kernel
// stores and tells double of what is asked, for its own overhead.
func setBuffer(fd, opt, force, size int) int {
	now, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
	if err != nil {
		return 0
	}
	if now/2 >= size { // always, if size is negative
		return now / 2
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, size)
	}
	now, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
	return now / 2
}

// LocalAddr implements Conn.
func (c *kernelConn) LocalAddr() netip.AddrPort { return c.local }

// Close implements Conn.
func (c *kernelConn) Close() error {
	c.closeOnce.Do(func() { c.closeErr = c.uc.Close() })
	return c.closeErr
}

// Stats implements StatsReader.
func (c *kernelConn) Stats() Stats {
	s := c.counters.snapshot()
	s.RecvBuffer, s.SendBuffer = c.recvBuffer, c.sendBuffer
	s.SendOffload, s.RecvOffload = c.sendOffload.Load(), c.recvOffload
	// An error means that the socket is closed or the kernel older than 4.12.
	_ = c.rc.Control(func(fd uintptr) { s.Drops[DropBacklog] = backlogDrops(fd) })
	return s
}
