package server

import (
	"errors"
	"net"
	"sync"

	"github.com/anytun-go/anytun/netstack/deep"
	"github.com/anytun-go/anytun/netstack/splice"
)

// egressInner is the client's end of a relayed connection, a *netstack.Conn.
type egressInner interface {
	net.Conn
	CloseWrite() error
	Abort() error
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
	deep.Stack()
	if err := r.copyDown(); err != nil {
		r.fail(err)
	}
}

// copyUp copies from the client to the host until the client's end of stream.
func (r *egressRelay) copyUp() error {
	if err := splice.Copy(r.host, splice.NewReader(r.inner), nil, func(n int) { r.used(true, n) }); err != nil {
		return err
	}
	return endOfStream(r.host.CloseWrite())
}

// copyDown copies from the host to the client until the host's end of stream.
func (r *egressRelay) copyDown() error {
	if err := splice.Copy(r.inner, splice.NewReader(r.host), nil, func(n int) { r.used(false, n) }); err != nil {
		return err
	}
	return endOfStream(r.inner.CloseWrite())
}
