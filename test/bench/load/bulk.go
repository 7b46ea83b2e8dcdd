package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// busyStreams are those of bulkAmong that move data.
const busyStreams = 8

// bulk moves data over n connections and counts what the receiver got.
func (t test) bulk(up bool, n int) (figures, error) {
	s := streams{stop: make(chan struct{})}
	defer s.end()
	run := rand.Uint64()
	for i := range n {
		c, err := t.path.dial(portBulk)
		if err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
		if err := s.begin(c, up, run); err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	arrived := s.count
	if up {
		arrived = func() (count, error) { return t.direct.count(run) }
	}
	pause(t.warm)
	before := t.procs.now()
	from, err := arrived()
	if err != nil {
		return nil, err
	}
	pause(t.dur)
	after := t.procs.now()
	to, err := arrived()
	if err != nil {
		return nil, err
	}
	return throughput(from, to, after.since(before))
}

// throughput is what came between two counts, for the CPU time it took.
func throughput(from, to count, used usage) (figures, error) {
	if len(to.streams) != len(from.streams) || to.at <= from.at {
		return nil, fmt.Errorf("counts of %d and %d streams", len(from.streams), len(to.streams))
	}
	var sum, squares float64
	for i := range to.streams {
		v := float64(to.streams[i] - from.streams[i])
		sum += v
		squares += v * v
	}
	if sum == 0 {
		return nil, fmt.Errorf("nothing arrived in %v", to.at-from.at)
	}
	f := figures{
		figMBps: sum / 1e6 / (to.at - from.at).Seconds(),
		// Jain's index: 1 when all got the same, 1/n when one got everything.
		figFair: sum * sum / (float64(len(to.streams)) * squares),
	}
	used.addTo(f, figClientCPU, figServerCPU, sum/1e9)
	return f, nil
}

// bulkAmong opens so many connections, each used once, and measures those of
// them that are busy. Where each packet costs more the more connections there
// are, it shows here.
func (t test) bulkAmong(open int) (figures, error) {
	idle, err := t.openIdle(nil, max(0, open-busyStreams))
	defer closeAll(idle)
	if err != nil {
		return nil, err
	}
	pause(time.Second) // for what opening has left to do
	f, err := t.bulk(false, busyStreams)
	if f != nil {
		f[figOpen] = float64(len(idle) + busyStreams)
	}
	return f, err
}

// streams are connections that move data until they are ended.
type streams struct {
	stop   chan struct{}
	conns  []*net.TCPConn
	counts []*atomic.Uint64 // bytes received here
	loops  sync.WaitGroup
}

// begin has one more connection, which it owns from now on.
func (s *streams) begin(c *net.TCPConn, up bool, run uint64) error {
	s.conns = append(s.conns, c)
	if !up {
		if _, err := c.Write([]byte{askDown}); err != nil {
			return err
		}
		n := new(atomic.Uint64)
		s.counts = append(s.counts, n)
		s.loops.Go(func() { receiveLoop(c, n) })
		return nil
	}
	if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{askUp}, run)); err != nil {
		return err
	}
	s.loops.Go(func() { s.sendLoop(c) })
	return nil
}

func receiveLoop(c *net.TCPConn, n *atomic.Uint64) {
	b := make([]byte, bulkBuffer)
	for {
		k, err := c.Read(b)
		n.Add(uint64(k))
		if err != nil {
			return
		}
	}
}

func (s *streams) sendLoop(c *net.TCPConn) {
	for {
		select {
		case <-s.stop:
			return
		default:
		}
		if _, err := c.Write(filler); err != nil {
			return
		}
	}
}

// count is what arrived here, by this host's clock.
func (s *streams) count() (count, error) {
	c := count{at: time.Since(programBegan)}
	for _, n := range s.counts {
		c.streams = append(c.streams, n.Load())
	}
	return c, nil
}

var programBegan = time.Now()

// end resets the connections: what is on its way has no business in the next test.
func (s *streams) end() {
	close(s.stop)
	for _, c := range s.conns {
		_ = c.SetLinger(0) // then it ends in an orderly way, which is good too
		c.Close()
	}
	s.loops.Wait()
}
