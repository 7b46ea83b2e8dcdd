package main

import (
	"bufio"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// getSize is the bytes of an answer.
const getSize = 1024

// requests has workers GET for a while, each on its kept connection, or each
// time on a fresh one.
func (t test) requests(workers int, fresh bool) (figures, error) {
	var counting, stopped atomic.Bool
	all := make([]worker, workers)
	var loops sync.WaitGroup
	for i := range all {
		w := &all[i]
		*w = worker{path: t.path, number: i, fresh: fresh, counting: &counting, stopped: &stopped}
		loops.Go(w.loop)
	}
	pause(t.warm)
	before := t.procs.now()
	counting.Store(true)
	pause(t.dur)
	counting.Store(false)
	used := t.procs.now().since(before)
	stopped.Store(true)
	loops.Wait()
	var took []float64
	var failed float64
	err := errors.New("no request was answered")
	for _, w := range all {
		took = append(took, w.took...)
		failed += w.failed
		err = errors.Join(err, w.err)
	}
	if len(took) == 0 {
		return nil, err
	}
	n := float64(len(took))
	f := figures{
		figPerSecond: n / used.wall.Seconds(), figFailed: failed,
		figP50: percentile(took, 50), figP99: percentile(took, 99),
	}
	used.addTo(f, figClientCPUEach, figServerCPUEach, n/1e6)
	return f, nil
}

// A worker makes one request after the other.
type worker struct {
	path              *path
	number            int
	fresh             bool
	counting, stopped *atomic.Bool

	took   []float64 // µs
	failed float64
	err    error // the last one
}

func (w *worker) loop() {
	var c net.Conn
	answer := bufio.NewReaderSize(nil, 4096)
	for i := 0; !w.stopped.Load(); i++ {
		began := time.Now()
		err := func() error {
			if c == nil {
				conn, err := w.path.dial(portHTTP + (w.number+i)%httpPorts)
				if err != nil {
					return err
				}
				c = conn
				answer.Reset(c)
				if err := c.SetDeadline(began.Add(10 * time.Second)); err != nil {
					return err
				}
			}
			return get(c, answer, getSize, w.fresh)
		}()
		took := time.Since(began)
		if c != nil && (w.fresh || err != nil) {
			c.Close()
			c = nil
		}
		if err != nil {
			w.err = err
			if w.counting.Load() {
				w.failed++
			}
			pause(10 * time.Millisecond)
			continue
		}
		if w.counting.Load() {
			w.took = append(w.took, float64(took.Nanoseconds())/1e3)
		}
	}
	if c != nil {
		c.Close()
	}
}
