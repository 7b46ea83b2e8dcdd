//go:build linux

package lab

import (
	"sync"
	"time"
)

// A meter measures one stream's progress: its bytes, and the longest time
// without any since the last mark. Safe for concurrent use.
type meter struct {
	mu      sync.Mutex
	bytes   uint64
	waiting bool
	since   time.Time // waiting for progress since then
	stall   time.Duration
}

// wait tells that progress is expected from now on.
func (m *meter) wait() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting, m.since = true, time.Now()
}

// add tells of progress. A bulk stream waits for more at once; one that is
// asked and answers waits for its next question.
func (m *meter) add(n int, more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes += uint64(n)
	now := time.Now()
	if m.waiting {
		m.stall = max(m.stall, now.Sub(m.since))
	}
	m.waiting, m.since = more, now
}

// rest tells that no progress is expected any more. The wait that it ends
// counts: a stream that broke while it stalled has stalled until then.
func (m *meter) rest() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting {
		m.stall = max(m.stall, time.Since(m.since))
	}
	m.waiting = false
}

// mark begins a new measurement. A wait that has begun before counts from its
// beginning.
func (m *meter) mark() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stall = 0
}

// read returns the bytes in all and the longest wait since the mark, the one
// that goes on included.
func (m *meter) read() (bytes uint64, stall time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	stall = m.stall
	if m.waiting {
		stall = max(stall, time.Since(m.since))
	}
	return m.bytes, stall
}
