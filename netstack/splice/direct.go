package splice

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// lender is a connection whose own buffers are read and filled in place (netstack's), so that bytes go between them and a
// kernel socket without a copy here. ReadTo and WriteFrom don't wait, WaitReadable and WaitWritable wait for them. Ended:
// ReadTo gives what has arrived, and no more will.
type lender interface {
	waiter
	ReadTo(w io.Writer) (int, error)
	Ended() bool
	WaitWritable() error
	WriteFrom(r interface {
		io.Reader
		Len() int
	}) (int, error)
}

const (
	// directBytes is what ReadTo may write at once: the lender is locked meanwhile, and what arrives has to queue up.
	directBytes = 256 << 10
	// directLeast is how many bytes must be there at a time for the way from the socket to stay direct.
	directLeast = len(Buffer{}) / 4
)

var errEnough = errors.New("enough for now")

// direct moves bytes between a lender and a kernel socket, in one direction. Its methods Write, Len and Read are for
// the lender, inside RawConn's callback. Not safe for concurrent use.
type direct struct {
	socket net.Conn
	raw    syscall.RawConn
	lender lender
	calls  calls
	try    func(fd uintptr) bool // a method value, made once since making it allocates

	// The state of one try.
	fd   uintptr
	last bool  // ReadTo: the end of the stream follows, so that nothing needs to leave before it
	left int   // ReadTo: bytes it may still write
	full bool  // the socket takes no more for now, or has nothing more
	n    int   // bytes moved
	err  error // the lender's
	bad  error // the socket's; io.EOF at its end
}

// newDirect returns nil if one of them can't do it.
func newDirect(socket, other net.Conn) *direct {
	l, ok := other.(lender)
	if !ok || !rawReads {
		return nil
	}
	sc, ok := socket.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return &direct{socket: socket, raw: raw, lender: l}
}

// toSocket waits until something has arrived at the lender and writes it, or a part of it, to the socket. It returns
// io.EOF at the end.
func (d *direct) toSocket() (int, error) {
	if err := d.lender.WaitReadable(); err != nil {
		return 0, err
	}
	if d.try == nil {
		d.try = d.tryWrite
	}
	d.n, d.err = 0, nil // try doesn't run on a closed socket
	err := d.raw.Write(d.try)
	switch {
	case err != nil: // closed, or the deadline passed
		return d.n, err
	case d.err != nil:
		return d.n, d.err
	case d.bad != nil:
		return d.n, d.opError("write")
	}
	return d.n, nil
}

// tryWrite is given to RawConn.Write: false means wait until the socket is writable.
func (d *direct) tryWrite(fd uintptr) bool {
	d.fd, d.last, d.left, d.full, d.bad = fd, d.lender.Ended(), directBytes, false, nil
	d.n, d.err = d.lender.ReadTo(d)
	return d.n > 0 || !d.full || d.err != nil || d.bad != nil
}

// Write is called by ReadTo.
func (d *direct) Write(p []byte) (int, error) {
	if d.left <= 0 {
		return 0, errEnough
	}
	n, again, err := d.calls.tryWrite(d.fd, p, d.last)
	switch {
	case again:
		d.full = true
		return 0, errEnough
	case err != nil:
		d.bad = err
		return 0, err
	}
	if d.left -= n; n < len(p) {
		d.full = true
		return n, errEnough
	}
	return n, nil
}

// fromSocket reads what the socket has into the lender, as much as that has room for. 0 bytes and no error mean that there
// is nothing, or the stream has ended: an ordinary read will tell.
func (d *direct) fromSocket() (int, error) {
	if err := d.lender.WaitWritable(); err != nil {
		return 0, err
	}
	if d.try == nil {
		d.try = d.tryRead
	}
	d.n, d.err = 0, nil
	err := d.raw.Read(d.try)
	switch {
	case err != nil: // closed, or the deadline passed
		return d.n, err
	case d.bad != nil:
		return d.n, d.opError("read")
	}
	return d.n, d.err
}

// tryRead is given to RawConn.Read, and never wants to wait.
func (d *direct) tryRead(fd uintptr) bool {
	d.fd, d.bad = fd, nil
	d.n, d.err = d.lender.WriteFrom(d)
	return true
}

// Len is called by WriteFrom, before it takes a buffer.
func (d *direct) Len() int { return d.calls.waiting(d.fd) }

// Read is called by WriteFrom for what Len has promised.
func (d *direct) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, again, err := d.calls.tryRead(d.fd, p)
	if again {
		err = syscall.EAGAIN
	}
	if err != nil {
		d.bad = err
	}
	return n, err
}

func (d *direct) opError(op string) error {
	return &net.OpError{
		Op: op, Net: d.socket.LocalAddr().Network(), Source: d.socket.LocalAddr(), Addr: d.socket.RemoteAddr(),
		Err: os.NewSyscallError(op, d.bad),
	}
}
