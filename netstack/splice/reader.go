package splice

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// waiter is a connection that can say when there is something to read (netstack's).
type waiter interface {
	WaitReadable() error
}

// Reader reads from a connection and holds no buffer while there is nothing to read: ten thousand idle
// connections then cost no buffers at all. A kernel socket is read inside RawConn.Read, which parks the goroutine after
// EAGAIN; a waiter is asked to wait first; for anything else a buffer is held. Not safe for concurrent use.
type Reader struct {
	conn net.Conn
	wait waiter
	raw  syscall.RawConn

	calls calls

	// The result of attempt. try is the method value, made once since making it allocates.
	try func(fd uintptr) bool
	buf *Buffer
	n   int
	err error
}

// NewReader returns a Reader of conn.
func NewReader(conn net.Conn) *Reader {
	r := &Reader{conn: conn}
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

// Next returns a buffer with n > 0 bytes, which the caller gives back with Put, or an error and no buffer.
func (r *Reader) Next() (*Buffer, int, error) {
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
			Put(b)
		}
		return nil, 0, err
	}
	if r.wait != nil {
		if err := r.wait.WaitReadable(); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
	}
	b := Get()
	for range 100 { // an io.Reader may return 0, nil; one that does so for ever is broken
		n, err := r.conn.Read(b[:])
		if n > 0 {
			return b, n, nil // an error that came along comes again
		}
		if err != nil {
			Put(b)
			return nil, 0, err
		}
	}
	Put(b)
	return nil, 0, io.ErrNoProgress
}

// attempt reads once from the file descriptor; false makes RawConn.Read wait until the socket is readable.
func (r *Reader) attempt(fd uintptr) bool {
	if r.buf == nil {
		r.buf = Get()
	}
	n, again, err := r.calls.tryRead(fd, r.buf[:])
	if again {
		Put(r.buf)
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
