package proxy

import (
	"sync"
	"time"
)

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
