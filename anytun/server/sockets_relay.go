package server

import (
	"errors"
	"io"
	"net"
	"sync"
)

// egressBuf is the relay's and the UDP readers' buffer: the largest datagram,
// and what one system call moves at best.
type egressBuf [64 << 10]byte

var egressBufs = sync.Pool{New: func() any { return new(egressBuf) }}

// egressInner is the client's end of a relayed connection, a *netstack.Conn.
type egressInner interface {
	net.Conn
	CloseWrite() error
	Abort() error
	WaitReadable() error
}

// egressRelay copies between a client's connection and the host's, both ways
// at once. An end of stream is passed on as such while the other direction goes
// on; a reset, or any other error, resets both ends.
type egressRelay struct {
	inner egressInner
	host  *net.TCPConn
	used  func(up bool, n int) // told about every piece; called by two goroutines

	once sync.Once
	err  error // why it was aborted; set inside once
}

func newEgressRelay(inner egressInner, host *net.TCPConn) *egressRelay {
	return &egressRelay{inner: inner, host: host, used: func(bool, int) {}}
}

var errEgressAborted = errors.New("aborted")

// abort resets both ends; run returns soon after.
func (r *egressRelay) abort() { r.fail(errEgressAborted) }

func (r *egressRelay) fail(err error) {
	r.once.Do(func() {
		r.err = err
		egressReset(r.host)
		_ = r.inner.Abort() // it is lost already
	})
}

// egressReset closes c with a reset.
func egressReset(c *net.TCPConn) {
	// Fails only for a socket that is gone already.
	_ = c.SetLinger(0)
	c.Close()
}

// run copies until both directions have ended, closes both ends and returns
// nil when both ended with the stream, otherwise the first error.
func (r *egressRelay) run() error {
	down := make(chan struct{})
	go r.downLoop(down)
	if err := r.copyUp(); err != nil {
		r.fail(err)
	}
	<-down
	r.once.Do(func() {
		r.host.Close()
		r.inner.Close()
	})
	return r.err
}

// downLoop is the goroutine of the direction to the client.
func (r *egressRelay) downLoop(done chan<- struct{}) {
	defer close(done)
	if err := r.copyDown(); err != nil {
		r.fail(err)
	}
}

// copyUp copies from the client to the host until the client's end of stream.
func (r *egressRelay) copyUp() error {
	for {
		// The buffer is held only while there is data: idle connections are
		// the many.
		if err := r.inner.WaitReadable(); err != nil {
			return err
		}
		buf := egressBufs.Get().(*egressBuf)
		n, err := r.inner.Read(buf[:])
		if n > 0 {
			r.used(true, n)
			if _, werr := r.host.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		egressBufs.Put(buf)
		if errors.Is(err, io.EOF) {
			return endOfStream(r.host.CloseWrite())
		}
		if err != nil {
			return err
		}
	}
}

// copyDown copies from the host to the client until the host's end of stream.
func (r *egressRelay) copyDown() error {
	in := newEgressHostReader(r.host)
	for {
		buf, n, err := in.read()
		if n > 0 {
			r.used(false, n)
			if _, werr := r.inner.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		if buf != nil {
			egressBufs.Put(buf)
		}
		if errors.Is(err, io.EOF) {
			return endOfStream(r.inner.CloseWrite())
		}
		if err != nil {
			return err
		}
	}
}
