package netstack

import (
	"errors"
	"net"
	"time"
)

// Conn is a TCP connection of a Stack. It implements net.Conn, and like a
// net.TCPConn it is safe for concurrent use. Errors are *net.OpError values;
// what they wrap is
//
//   - a syscall.Errno in an *os.SyscallError for what TCP reports: ECONNRESET,
//     ETIMEDOUT, EPIPE, EHOSTUNREACH, …
//   - os.ErrDeadlineExceeded when a deadline has passed,
//   - net.ErrClosed after Close or Abort of this end.
//
// Read returns a plain io.EOF, and only after the peer's FIN: never for a
// reset, an Abort or a CloseRead.
type Conn struct{}

// Read reads what has arrived, waiting if nothing has.
func (c *Conn) Read(b []byte) (int, error) { return 0, errors.ErrUnsupported }

// Write writes all of b, waiting while the send buffer is full.
func (c *Conn) Write(b []byte) (int, error) { return 0, errors.ErrUnsupported }

// WaitReadable blocks until Read would return at once, be it data, io.EOF or
// an error, and returns nil then. It returns an error when the read deadline
// passes or the connection is closed by this end. No buffer is held meanwhile.
func (c *Conn) WaitReadable() error { return errors.ErrUnsupported }

// CloseRead ends reading: reads fail with net.ErrClosed. What the peer still
// sends is taken and thrown away.
func (c *Conn) CloseRead() error { return errors.ErrUnsupported }

// CloseWrite sends a FIN after what has been written.
func (c *Conn) CloseWrite() error { return errors.ErrUnsupported }

// Close closes both directions. What has been written is still delivered, and
// then a FIN, unless received data lies unread: then, as with a kernel's
// socket, the peer gets a reset instead.
func (c *Conn) Close() error { return errors.ErrUnsupported }

// Abort sends a RST and drops whatever was not yet delivered.
func (c *Conn) Abort() error { return errors.ErrUnsupported }

// LocalAddr returns the local *net.TCPAddr.
func (c *Conn) LocalAddr() net.Addr { return nil }

// RemoteAddr returns the peer's *net.TCPAddr.
func (c *Conn) RemoteAddr() net.Addr { return nil }

// SetDeadline sets both deadlines; the zero time means none.
func (c *Conn) SetDeadline(t time.Time) error { return errors.ErrUnsupported }

// SetReadDeadline sets the deadline of Read and WaitReadable.
func (c *Conn) SetReadDeadline(t time.Time) error { return errors.ErrUnsupported }

// SetWriteDeadline sets the deadline of Write.
func (c *Conn) SetWriteDeadline(t time.Time) error { return errors.ErrUnsupported }
