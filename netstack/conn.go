package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

var (
	errFull  = io.ErrShortWrite // the caller's slice is full
	errEmpty = io.EOF           // the caller's slice is used up
)

// Conn is a TCP connection of a Stack. It implements net.Conn, and like a
// net.TCPConn it is safe for concurrent use. It owns no goroutine and no
// buffer. Errors are *net.OpError values; what they wrap is
//
//   - a syscall.Errno in an *os.SyscallError for what TCP reports: ECONNRESET,
//     ETIMEDOUT, EPIPE, EHOSTUNREACH, …
//   - os.ErrDeadlineExceeded when a deadline has passed,
//   - net.ErrClosed after Close, Abort or, for Read, CloseRead of this end.
//
// Read returns a plain io.EOF, and only after the peer's FIN: never for a
// reset, an Abort or a CloseRead.
type Conn struct {
	s             *Stack
	ep            tcpip.Endpoint
	local, remote netip.AddrPort
	key           flowKey
	gates         gates

	closed, readClosed atomic.Bool
	failed             atomic.Uint64 // the errno that ended the connection, or 0

	readMu sync.Mutex // held while reading; guards what follows
	in     sliceWriter
	window receiveWindow

	writeMu sync.Mutex // held while writing; guards what follows
	out     outgoing
	room    sendWindow
	written int // since the last look at the path
}

// newConn wraps a connected endpoint.
func (s *Stack) newConn(ep tcpip.Endpoint, wq *waiter.Queue) *Conn {
	c := &Conn{s: s, ep: ep}
	c.gates.init(wq)
	c.begin()
	return c
}

// begin sets what every connection has, once it is connected.
func (c *Conn) begin() {
	// GetRemoteAddress would fail if the peer has reset the connection already.
	if info, ok := c.ep.Info().(*stack.TransportEndpointInfo); ok {
		c.local = netip.AddrPortFrom(netipAddr(info.ID.LocalAddress), info.ID.LocalPort)
		c.remote = netip.AddrPortFrom(netipAddr(info.ID.RemoteAddress), info.ID.RemotePort)
		c.key = connKey(c.local, c.remote)
	}
	c.out.most = chunk(c.s.dev.mtu, c.remote.Addr())
	// None of these can fail on a TCP endpoint.
	idle, interval := tcpip.KeepaliveIdleOption(keepAliveIdle), tcpip.KeepaliveIntervalOption(keepAliveInterval)
	_ = c.ep.SetSockOpt(&idle)
	_ = c.ep.SetSockOpt(&interval)
	_ = c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	c.ep.SocketOptions().SetKeepAlive(true)
}

// Read reads what has arrived, waiting if nothing has.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	for {
		if err := c.readable(); err != nil {
			return 0, c.opError("read", err)
		}
		c.in = sliceWriter{b: b}
		_, err := c.ep.Read(&c.in, tcpip.ReadOptions{})
		n := c.in.n
		c.in.b = nil
		if n > 0 {
			c.ep.ModerateRecvBuf(n)
			c.window.hasRead(&c.s.windows.in, c.ep, n)
			return n, nil
		}
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			<-c.gates.read.ch
		default:
			return 0, c.readError(err)
		}
	}
}

// WaitReadable blocks until Read would return at once, be it data, io.EOF or
// an error, and returns nil then. It returns an error when the read deadline
// passes or the connection is closed by this end. No buffer is held meanwhile.
func (c *Conn) WaitReadable() error {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	for {
		if err := c.readable(); err != nil {
			return c.opError("read", err)
		}
		if c.ep.Readiness(readEvents) != 0 {
			return nil
		}
		<-c.gates.read.ch
	}
}

// readable says why this end doesn't read any more.
func (c *Conn) readable() error {
	switch {
	case c.closed.Load(), c.readClosed.Load():
		return net.ErrClosed
	case c.gates.read.isExpired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// readError says what a failed read of the endpoint means. gVisor uses
// ErrClosedForReceive both for the end of the stream and, after it has told
// the reason once, for a broken connection.
func (c *Conn) readError(err tcpip.Error) error {
	if e := c.readable(); errors.Is(e, net.ErrClosed) {
		return c.opError("read", e)
	}
	n := c.failure(err)
	if n == 0 {
		return io.EOF
	}
	return c.opError("read", os.NewSyscallError("read", n))
}

// failure returns the errno that has broken the connection, or 0 if it isn't
// broken. gVisor tells the reason to the first who asks, so it is kept.
func (c *Conn) failure(err tcpip.Error) syscall.Errno {
	switch err.(type) {
	case *tcpip.ErrClosedForReceive, *tcpip.ErrClosedForSend:
		if n := c.failed.Load(); n != 0 {
			return syscall.Errno(n)
		}
		if tcp.EndpointState(c.ep.State()) != tcp.StateError {
			return 0
		}
		// A concurrent call has been told and is about to note it.
		return syscall.ECONNRESET
	}
	n := errnoOf(err)
	c.failed.CompareAndSwap(0, uint64(n))
	return n
}

// Ended reports whether the peer's FIN has arrived, so that what can be read now is all
// that there will be.
func (c *Conn) Ended() bool {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing, tcp.StateTimeWait:
		return true
	default:
		return false
	}
}

// ReadTo passes what has arrived to w without copying it: w is given the stack's
// own buffers, which it must not keep. It returns the number of bytes that w has
// taken. It doesn't wait: where nothing has arrived, or w has taken nothing, that
// is 0 and no error (see WaitReadable). A w that takes less than it is given must
// say so by an error, which ends the call but isn't returned; what it hasn't taken
// stays. The connection is locked meanwhile, so w must neither block nor use it.
func (c *Conn) ReadTo(w io.Writer) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if err := c.readable(); err != nil {
		return 0, c.opError("read", err)
	}
	r, err := c.ep.Read(w, tcpip.ReadOptions{})
	if r.Count > 0 {
		c.ep.ModerateRecvBuf(r.Count)
		c.window.hasRead(&c.s.windows.in, c.ep, r.Count)
		return r.Count, nil
	}
	switch err.(type) {
	case nil, *tcpip.ErrWouldBlock, *tcpip.ErrBadBuffer: // the last means that w took nothing
		return 0, nil
	default:
		return 0, c.readError(err)
	}
}

// Write writes all of b, waiting while the send buffer is full.
func (c *Conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	done := 0
	for {
		if err := c.writable(); err != nil {
			return done, c.opError("write", err)
		}
		if done == len(b) {
			return done, nil
		}
		c.out.b = b[done:]
		n, err := c.ep.Write(&c.out, tcpip.WriteOptions{})
		c.out.b = nil
		done += int(n)
		c.room.hasWritten(&c.s.windows.out, &c.s.dev.flows, &c.key, c.ep, int(n))
		c.wrote(int(n))
		switch err.(type) {
		case nil:
			if done == len(b) {
				return done, nil
			}
		case *tcpip.ErrWouldBlock:
			<-c.gates.write.ch
		default:
			return done, c.writeError(err)
		}
	}
}

// Source is what WriteFrom reads: Len says how many bytes it has.
type Source = interface {
	io.Reader
	Len() int
}

// WriteFrom lets r fill the stack's own buffers: with r.Len() bytes, or as many as
// the send buffer has room for and one super-segment holds (some 60 KB), and sends
// that. It returns the number of bytes taken. r must give all that it has promised
// by Len, since nothing is sent if it fails. WriteFrom doesn't wait: where there is
// no room, or Len is 0, it returns 0 and no error (see WaitWritable). The
// connection is locked meanwhile, so r must neither block nor use it.
func (c *Conn) WriteFrom(r Source) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if err := c.writable(); err != nil {
		return 0, c.opError("write", err)
	}
	c.out.from = r
	// Atomic: what r has given must not be truncated for want of room.
	n, err := c.ep.Write(&c.out, tcpip.WriteOptions{Atomic: true})
	c.out.from = nil
	c.room.hasWritten(&c.s.windows.out, &c.s.dev.flows, &c.key, c.ep, int(n))
	c.wrote(int(n))
	switch err.(type) {
	case nil, *tcpip.ErrWouldBlock:
		return int(n), nil
	case *tcpip.ErrBadBuffer:
		return 0, c.opError("write", io.ErrUnexpectedEOF)
	default:
		return 0, c.writeError(err)
	}
}

// wrote counts what was written. writeMu is held.
func (c *Conn) wrote(n int) {
	if c.written += n; c.written >= checkPath {
		c.written = 0
		reviewCongestionControl(c.ep)
	}
}

// WaitWritable blocks until the send buffer has room or the connection has failed,
// and returns nil then. It returns an error when the write deadline passes or the
// connection is closed by this end.
func (c *Conn) WaitWritable() error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	for {
		if err := c.writable(); err != nil {
			return c.opError("write", err)
		}
		if c.ep.Readiness(writeEvents) != 0 {
			return nil
		}
		<-c.gates.write.ch
	}
}

// writable says why this end doesn't write any more.
func (c *Conn) writable() error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case c.gates.write.isExpired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// writeError says what a failed write to the endpoint means.
func (c *Conn) writeError(err tcpip.Error) error {
	if c.closed.Load() {
		return c.opError("write", net.ErrClosed)
	}
	e := c.failure(err)
	if e == 0 {
		e = syscall.EPIPE
	}
	return c.opError("write", os.NewSyscallError("write", e))
}

// CloseRead ends reading: reads fail with net.ErrClosed. As with a kernel's
// socket the peer isn't told, and what it sends fills the window.
func (c *Conn) CloseRead() error {
	if c.closed.Load() {
		return c.opError("close", net.ErrClosed)
	}
	c.readClosed.Store(true)
	err := c.shutdown(tcpip.ShutdownRead)
	c.gates.read.wake()
	return err
}

// CloseWrite sends a FIN after what has been written.
func (c *Conn) CloseWrite() error {
	if c.closed.Load() {
		return c.opError("close", net.ErrClosed)
	}
	return c.shutdown(tcpip.ShutdownWrite)
}

func (c *Conn) shutdown(f tcpip.ShutdownFlags) error {
	switch err := c.ep.Shutdown(f); err.(type) {
	case nil:
		return nil
	default:
		return c.opError("close", sysError("shutdown", err))
	}
}

// Close closes both directions. What has been written is still delivered, and
// then a FIN, unless received data lies unread: then, as with a kernel's
// socket, the peer gets a reset instead. A peer that doesn't acknowledge for
// 15 minutes is given up. Close is idempotent.
func (c *Conn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	timeout := tcpip.TCPUserTimeoutOption(orphanTimeout)
	_ = c.ep.SetSockOpt(&timeout) // can't fail
	c.ep.Close()
	c.gates.close()
	return nil
}

// Abort sends a RST and drops whatever was not yet delivered, also when the
// connection was closed before but has not yet ended.
func (c *Conn) Abort() error {
	c.closed.Store(true)
	c.ep.Abort()
	c.gates.close()
	return nil
}

// LocalAddr returns the local *net.TCPAddr.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr returns the peer's *net.TCPAddr.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline sets both deadlines; the zero time means none.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline sets the deadline of Read and WaitReadable.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.gates.read, t) }

// SetWriteDeadline sets the deadline of Write.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.gates.write, t) }

func (c *Conn) setDeadline(g *gate, t time.Time) error {
	if c.closed.Load() {
		return c.opError("set", net.ErrClosed)
	}
	g.setDeadline(t)
	return nil
}

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
