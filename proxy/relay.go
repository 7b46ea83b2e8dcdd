package proxy

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/netstack/splice"
)

// Relay copies bytes both ways until both directions have ended, and closes both connections. The end of one direction
// is passed on as a half-close and the other one goes on; a reset, or any other error, resets both sides, so that a
// connection cut short never looks complete. No buffer is held while nothing arrives, and one goroutine is added to the
// caller's. The error is nil when both directions ended properly.
//
// A connection without CloseWrite can't express a half-close and is closed instead, which ends both directions.
func Relay(a, b net.Conn) (aToB, bToA int64, err error) {
	r := relay{a: a, b: b}
	r.run(splice.NewReader(a), splice.NewReader(b), nil)
	return r.aToB.Load(), r.bToA.Load(), r.err
}

// relay is one pair of connections. The totals, when set, are counted as bytes pass.
type relay struct {
	a, b             net.Conn
	aToB, bToA       atomic.Int64
	totalAB, totalBA *atomic.Uint64

	idle     time.Duration // nothing moved either way: end; 0 = never
	halfIdle time.Duration // the same once one direction has ended; 0 = never
	expired  atomic.Bool

	mu    sync.Mutex // guards what follows
	timer *IdleTimer
	ended int   // directions
	err   error // the first one
	over  bool  // both connections are closed or about to be, what fails now fails for that
}

// run copies until both directions have ended. early is what was already read from a.
func (r *relay) run(fromA, fromB *splice.Reader, early []byte) {
	if r.idle > 0 {
		r.timer = NewIdleTimer(r.idle, r.progress, r.expire)
	}
	done := make(chan struct{})
	go r.backLoop(fromB, done)
	r.copy(r.b, fromA, early, &r.aToB, r.totalAB)
	<-done
	r.mu.Lock()
	if r.timer != nil {
		r.timer.Stop()
	}
	r.over = true // err is settled: who stops the proxy may still know of this relay
	r.mu.Unlock()
	r.a.Close()
	r.b.Close()
}

// backLoop is the direction from b to a.
func (r *relay) backLoop(fromB *splice.Reader, done chan<- struct{}) {
	defer close(done)
	r.copy(r.a, fromB, nil, &r.bToA, r.totalBA)
}

func (r *relay) copy(to net.Conn, from *splice.Reader, early []byte, count *atomic.Int64, total *atomic.Uint64) {
	err := splice.Copy(to, from, early, func(n int) {
		count.Add(int64(n))
		if total != nil {
			total.Add(uint64(n))
		}
	})
	if err == nil {
		r.end(to)
	} else {
		r.fail(err)
	}
}

// end passes a proper end on.
func (r *relay) end(to net.Conn) {
	r.mu.Lock()
	r.ended++
	if r.ended == 1 && r.halfIdle > 0 && (r.idle == 0 || r.halfIdle < r.idle) {
		if r.timer != nil {
			r.timer.Stop()
		}
		r.timer = NewIdleTimer(r.halfIdle, r.progress, r.expire)
	}
	half, ok := to.(interface{ CloseWrite() error })
	if !ok {
		r.over = true
	}
	last := r.ended == 2
	r.mu.Unlock()
	if last {
		return // run closes both, which ends this stream, too
	}
	if !ok {
		r.a.Close()
		r.b.Close()
		return
	}
	// It fails when the peer has reset the connection meanwhile, which the other direction finds out too.
	_ = half.CloseWrite()
}

// fail notes the first error and resets both sides, which also ends the other direction.
func (r *relay) fail(err error) {
	r.mu.Lock()
	if r.over {
		r.mu.Unlock()
		return
	}
	r.err, r.over = err, true
	r.mu.Unlock()
	Abort(r.a)
	Abort(r.b)
}

func (r *relay) progress() uint64 { return uint64(r.aToB.Load() + r.bToA.Load()) }

var errIdle = errors.New("nothing moved for too long")

func (r *relay) expire() {
	r.expired.Store(true)
	r.fail(errIdle)
}

// Abort closes a connection so that its peer sees a reset, where the connection knows of resets.
func Abort(c net.Conn) {
	switch c := c.(type) {
	case interface{ Abort() }:
		c.Abort()
	case interface{ Abort() error }:
		_ = c.Abort() // nothing is left to do about it
	case *net.TCPConn:
		_ = c.SetLinger(0) // fails on a closed connection only
		c.Close()
	default:
		c.Close()
	}
}
