package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"
)

// When much has happened and then it is quiet, memory goes back to the system.
// Busy times leave behind pooled buffers, garbage up to the size of what is in
// use, and two goroutines for each open connection whose stacks had to be twice
// as large as they are now; the runtime by itself would keep all of that for
// minutes, or until it is busy again.
const (
	// restLook is how often the proxy looks, and how long it must have been quiet.
	restLook = 300 * time.Millisecond
	// restQuiet packets in that time are still quiet.
	restQuiet = 150
	// restWorth packets since the last time make it worthwhile: a hundred
	// connections, or a megabyte.
	restWorth = 1000
	// restShare bounds the cost: one part in restShare of the time.
	restShare = 50
)

// rest says when to give memory back. Not safe for concurrent use.
type rest struct {
	last     uint64    // packets until the last look
	since    uint64    // packets since memory was given back
	earliest time.Time // not before this
}

// due is given the number of packets until now.
func (r *rest) due(packets uint64, now time.Time) bool {
	moved := packets - r.last
	r.last = packets
	r.since += moved
	return moved <= restQuiet && r.since >= restWorth && !now.Before(r.earliest)
}

// done is told when memory was given back.
func (r *rest) done(began, ended time.Time) {
	r.since = 0
	r.earliest = ended.Add(restShare * ended.Sub(began))
}

// restLoop gives memory back until ctx ends.
func (g *gateway) restLoop(ctx context.Context) {
	ticker := time.NewTicker(restLook)
	defer ticker.Stop()
	var r rest
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if began := time.Now(); r.due(g.tunnel.packets(), began) {
			// What lies in a sync.Pool is garbage at the second collection only,
			// which is FreeOSMemory's.
			runtime.GC()
			debug.FreeOSMemory()
			r.done(began, time.Now())
		}
	}
}

// packets is how many packets have gone either way.
func (t *tunnel) packets() uint64 {
	s := t.input.Load()
	if s == nil {
		return 0
	}
	st := s.Stats()
	return st.PacketsIn + st.PacketsOut
}
