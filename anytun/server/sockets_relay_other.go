//go:build !unix

package server

import "net"

// endOfStream judges a failed CloseWrite; see the unix twin.
func endOfStream(err error) error { return err }

// egressHostReader reads a socket of the host. Where reading can't be tried
// without waiting, a connection holds its buffer while it waits.
type egressHostReader struct{ c *net.TCPConn }

func newEgressHostReader(c *net.TCPConn) *egressHostReader { return &egressHostReader{c} }

// read returns what has arrived in a buffer that the caller puts back into
// egressBufs.
func (r *egressHostReader) read() (*egressBuf, int, error) {
	buf := egressBufs.Get().(*egressBuf)
	n, err := r.c.Read(buf[:])
	return buf, n, err
}
