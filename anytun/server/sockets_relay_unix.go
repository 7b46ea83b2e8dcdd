//go:build unix

package server

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// endOfStream judges a failed CloseWrite: an end that is not connected any
// more needs no end of stream, and what it was closed by shows in the other
// direction.
func endOfStream(err error) error {
	if errors.Is(err, syscall.ENOTCONN) {
		return nil
	}
	return err
}

// egressHostReader reads a socket of the host with a buffer that is taken from
// the pool once there is something to read.
type egressHostReader struct {
	raw syscall.RawConn
	try func(fd uintptr) bool
	buf *egressBuf
	n   int
	err error
}

func newEgressHostReader(c *net.TCPConn) *egressHostReader {
	r := new(egressHostReader)
	r.raw, r.err = c.SyscallConn()
	r.try = r.tryRead
	return r
}

// tryRead is called when the socket may be readable, at first without knowing.
func (r *egressHostReader) tryRead(fd uintptr) bool {
	buf := egressBufs.Get().(*egressBuf)
	n, err := 0, error(syscall.EINTR)
	for errors.Is(err, syscall.EINTR) {
		n, err = syscall.Read(int(fd), buf[:])
	}
	if errors.Is(err, syscall.EAGAIN) {
		egressBufs.Put(buf)
		return false
	}
	r.buf, r.n, r.err = buf, max(n, 0), nil
	switch {
	case err != nil:
		r.err = os.NewSyscallError("read", err)
	case n == 0:
		r.err = io.EOF
	}
	return true
}

// read returns what has arrived in a buffer that the caller puts back into
// egressBufs, unless it is nil.
func (r *egressHostReader) read() (*egressBuf, int, error) {
	if r.raw == nil {
		return nil, 0, r.err
	}
	r.buf, r.n = nil, 0
	if err := r.raw.Read(r.try); err != nil {
		return nil, 0, err
	}
	return r.buf, r.n, r.err
}
