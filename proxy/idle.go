package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// waiter is a connection that can say when there is something to read (netstack's).
type waiter interface {
	WaitReadable() error
}

// idleReader reads from a connection and holds no buffer while there is nothing to read: ten thousand idle
// connections then cost no buffers at all. A kernel socket is read inside RawConn.Read, which parks the goroutine after
// EAGAIN; a waiter is asked to wait first; for anything else a buffer is held. Not safe for concurrent use.
type idleReader struct {
	conn net.Conn
	wait waiter
	raw  syscall.RawConn

	// The result of attempt. try is the method value, made once since making it allocates.
	try func(fd uintptr) bool
	buf *buffer
	n   int
	err error
}

func newIdleReader(conn net.Conn) *idleReader {
	r := &idleReader{conn: conn}
	if w, ok := conn.(waiter); ok {
		r.wait = w
		return r
	}
	if !rawReads {
		return r
	}
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			r.raw = raw
			r.try = r.attempt
		}
	}
	return r
}

// next returns a buffer with n > 0 bytes, which the caller gives back with putBuffer, or an error and no buffer.
func (r *idleReader) next() (*buffer, int, error) {
	if r.raw != nil {
		err := r.raw.Read(r.try)
		b, n, readErr := r.buf, r.n, r.err
		r.buf, r.n, r.err = nil, 0, nil
		switch {
		case err != nil: // closed, or the deadline passed
		case readErr != nil:
			err = &net.OpError{
				Op: "read", Net: r.conn.LocalAddr().Network(), Source: r.conn.LocalAddr(), Addr: r.conn.RemoteAddr(),
				Err: os.NewSyscallError("read", readErr),
			}
		case n == 0:
			err = io.EOF
		default:
			return b, n, nil
		}
		if b != nil {
			putBuffer(b)
		}
		return nil, 0, err
	}
	if r.wait != nil {
		if err := r.wait.WaitReadable(); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
	}
	b := getBuffer()
	for range 100 { // an io.Reader may return 0, nil; one that does so for ever is broken
		n, err := r.conn.Read(b[:])
		if n > 0 {
			return b, n, nil // an error that came along comes again
		}
		if err != nil {
			putBuffer(b)
			return nil, 0, err
		}
	}
	putBuffer(b)
	return nil, 0, io.ErrNoProgress
}

// attempt reads once from the file descriptor; false makes RawConn.Read wait until the socket is readable.
func (r *idleReader) attempt(fd uintptr) bool {
	if r.buf == nil {
		r.buf = getBuffer()
	}
	n, again, err := tryRead(fd, r.buf[:])
	if again {
		putBuffer(r.buf)
		r.buf = nil
		return false
	}
	r.n, r.err = n, err
	return true
}

// WaitReadable blocks until a read from conn (a net.Conn or PacketConn) would not, without holding a buffer. It returns
// nil at once where it can't tell.
func WaitReadable(conn any) error {
	if w, ok := conn.(waiter); ok {
		return w.WaitReadable()
	}
	if !rawReads {
		return nil
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(readable)
}

// IdleTimer calls expire once progress has not changed for limit (a quarter more at most). It reads no clock on the
// data path.
type IdleTimer struct {
	progress func() uint64
	expire   func()
	step     time.Duration

	mu      sync.Mutex // guards what follows
	timer   *time.Timer
	stopped bool
	last    uint64
	quiet   int // steps without progress
}

const idleSteps = 4

// NewIdleTimer starts a timer. Stop it in the end.
func NewIdleTimer(limit time.Duration, progress func() uint64, expire func()) *IdleTimer {
	t := &IdleTimer{progress: progress, expire: expire, step: max(limit/idleSteps, 1), last: progress()}
	t.mu.Lock() // the callback may run before AfterFunc has returned
	defer t.mu.Unlock()
	t.timer = time.AfterFunc(t.step, t.check)
	return t
}

func (t *IdleTimer) check() {
	if t.advance() {
		t.expire()
	}
}

// advance takes one step and says whether the time is over.
func (t *IdleTimer) advance() bool {
	p := t.progress()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return false
	}
	if p != t.last {
		t.last, t.quiet = p, 0
	} else if t.quiet++; t.quiet >= idleSteps {
		t.stopped = true
		return true
	}
	t.timer.Reset(t.step)
	return false
}

// Stop ends the timer: expire is not called afterwards, but a call that has begun may still be under way.
func (t *IdleTimer) Stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	t.timer.Stop()
}
