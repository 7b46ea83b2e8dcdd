package netstack

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// outRig is a device whose packets are noted, batch by batch, as "port:seq+n".
type outRig struct {
	*device
	t       testing.TB
	mu      sync.Mutex
	batches [][]string
	gate    chan struct{} // if not nil, each batch waits for a value
}

func newOutRig(t testing.TB) *outRig {
	r := &outRig{t: t}
	r.device = newDevice(&Config{MTU: 1400, Output: func(pkts [][]byte) {
		if r.gate != nil {
			<-r.gate
		}
		var list []string
		for _, p := range pkts {
			tcp := header.TCP(p[20:])
			list = append(list, fmt.Sprintf("%d:%d+%d", tcp.SourcePort(), tcp.SequenceNumber(), len(p)-40))
		}
		r.mu.Lock()
		r.batches = append(r.batches, list)
		r.mu.Unlock()
	}})
	return r
}

// write lets the connection of a port send.
func (r *outRig) write(port uint16, seq uint32, size int) {
	p := superSegment(tcpSpec{v4: true, flags: flagACK | flagPSH, sport: port, seq: seq, payload: make([]byte, size)}, 1300, 1)
	defer p.DecRef()
	var list stack.PacketBufferList
	list.PushBack(p)
	if n, err := r.WritePackets(list); n != 1 || err != nil {
		r.t.Error(n, err)
	}
}

// sent returns the batches so far, and forgets them.
func (r *outRig) sent() (b [][]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, r.batches = r.batches, nil
	return b
}

func (r *outRig) want(want ...[]string) {
	r.t.Helper()
	if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
		r.t.Errorf("sent %v, want %v", got, want)
	}
}

func TestOutboxGathers(t *testing.T) {
	r := newOutRig(t) // without run, so that nothing leaves by itself
	r.write(1, 10, 0)
	r.write(2, 20, 5)
	r.want()
	r.small.flush()
	r.want([]string{"1:10+0", "2:20+5"})
	r.small.flush()
	r.want()

	var all []string
	for i := range uint32(fullOutbox) {
		r.want()
		r.write(3, i, 1)
		all = append(all, fmt.Sprintf("3:%d+1", i))
	}
	r.want(all)
	if r.small.flows.Load() != 0 {
		t.Error("connections are left in an empty outbox")
	}
}

// What is large leaves at once, but behind small packets of its connection.
func TestOutboxKeepsOrder(t *testing.T) {
	r := newOutRig(t)
	r.write(1, 10, 1)
	r.write(2, 50, 1500)
	r.want([]string{"2:50+1300", "2:1350+200"})
	r.write(1, 11, 2600)
	r.want([]string{"1:10+1"}, []string{"1:11+1300", "1:1311+1300"})
}

// While Output blocks, small packets wait, as many as there is room for. Who has
// more waits, too, and nothing is lost.
func TestOutboxBehindABlockedOutput(t *testing.T) {
	r := newOutRig(t)
	r.gate = make(chan struct{})
	r.write(1, 0, 1)
	var writers sync.WaitGroup
	writers.Go(r.small.flush)
	for !r.sending() {
		runtime.Gosched()
	}
	const size, packets = 1000, 1000
	var done atomic.Uint32
	writers.Go(func() {
		for n := uint32(1); n <= packets; n++ {
			r.write(1, n, size)
			done.Store(n)
		}
		r.write(1, packets+1, 2600)
	})
	room := uint32(batchSize / (size + 40))
	for done.Load() < room {
		runtime.Gosched()
	}
	for range 100 {
		runtime.Gosched()
		if n := done.Load(); n != room {
			t.Fatalf("%d packets wait, and there is room for %d", n, room)
		}
	}
	close(r.gate)
	writers.Wait()
	var got []string
	for _, b := range r.sent() {
		got = append(got, b...)
	}
	want := []string{"1:0+1"}
	for n := range packets {
		want = append(want, fmt.Sprintf("1:%d+%d", n+1, size))
	}
	want = append(want, fmt.Sprintf("1:%d+1300", packets+1), fmt.Sprintf("1:%d+1300", packets+1301))
	if !slices.Equal(got, want) {
		t.Fatalf("%d packets, want %d: %v", len(got), len(want), got)
	}
}

func (r *outRig) sending() bool {
	r.small.mu.Lock()
	defer r.small.mu.Unlock()
	return r.small.sending
}

// Many connections send packets of all sizes at once; run sends what is left.
func TestOutboxRuns(t *testing.T) {
	const flows, packets = 40, 300
	var mu sync.Mutex
	next := map[uint16]uint32{}
	left := sync.WaitGroup{}
	left.Add(flows * packets)
	d := newDevice(&Config{MTU: 1400, Output: func(pkts [][]byte) {
		mu.Lock()
		defer mu.Unlock()
		for _, p := range pkts {
			port, seq := binary.BigEndian.Uint16(p[20:]), binary.BigEndian.Uint32(p[24:])
			if seq < next[port] {
				t.Errorf("port %d: %d after %d", port, seq, next[port])
			}
			if next[port] = seq + uint32(len(p)-40); p[33]&flagPSH != 0 { // the last of a super-segment
				left.Done()
			}
		}
	}})
	go d.small.run()
	r := &outRig{device: d, t: t}
	for port := range uint16(flows) {
		go func() {
			seq := uint32(0)
			for i := range packets {
				size := []int{1, 40, 1200, 2600, 30000}[(i*7+int(port))%5]
				r.write(port, seq, size)
				seq += uint32(size)
			}
		}()
	}
	ended := make(chan struct{})
	go func() { left.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("packets are left behind")
	}
	d.small.close()
}

// What waits behind a blocked Output leaves before close returns.
func TestOutboxCloses(t *testing.T) {
	r := newOutRig(t)
	r.gate = make(chan struct{})
	close(r.small.done) // run has ended already
	r.write(1, 0, 1)
	go r.small.flush()
	for !r.sending() {
		runtime.Gosched()
	}
	r.write(1, 1, 1)
	closed := make(chan struct{})
	go func() { r.small.close(); close(closed) }()
	close(r.gate)
	<-closed
	r.want([]string{"1:0+1"}, []string{"1:1+1"})
}
