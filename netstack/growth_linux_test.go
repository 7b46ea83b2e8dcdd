package netstack

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What a packet costs when many connections are open. The far end is no stack
// but the few lines of a TCP peer that never loses anything, so that what grows
// is this stack's. One goroutine per connection reads, as relays do.

// farEnd is the peer of every connection of a stack. Its port tells which one it
// is: index+1.
type farEnd struct {
	stack *Stack
	dials bool // it opens the connections, to a stack with Forward

	mu      sync.Mutex
	conns   []farConn
	bytes   uint64        // received, by all
	unacked []farAck      // what is to be acknowledged
	replies [][]byte      // of handshakes
	wake    chan struct{} // there are replies

	bufs [growthBatch][1 << 11]byte
	pkts [][]byte
}

// farConn is one connection's far half.
type farConn struct {
	addr     [4]byte // of the far end
	peer     [4]byte
	port     uint16 // the stack's
	seq, ack uint32
	echo     uint32 // the stack's latest timestamp
}

// farAck is an acknowledgement that connection i is to get.
type farAck struct {
	i   int
	ack uint32
}

// farSegment is the largest payload with an MTU of 1400 and timestamps.
const farSegment = 1400 - 52

// put writes a packet of connection i to b and returns it.
func (f *farEnd) put(b []byte, i int, flags byte, options []byte, payload int) []byte {
	c := &f.conns[i]
	hl := 40 + 12 + len(options)
	b = b[:hl+payload]
	b[0], b[1] = 0x45, 0
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	b[4], b[5], b[6], b[7], b[8], b[9] = 0, 0, 0x40, 0, 64, protoTCP
	copy(b[12:], c.addr[:])
	copy(b[16:], c.peer[:])
	setIPv4Checksum(b[:20])
	t := b[20:]
	binary.BigEndian.PutUint16(t, uint16(i+1))
	binary.BigEndian.PutUint16(t[2:], c.port)
	binary.BigEndian.PutUint32(t[4:], c.seq)
	binary.BigEndian.PutUint32(t[8:], c.ack)
	t[12], t[13] = byte(hl-20)/4<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	t[16], t[17], t[18], t[19] = 0, 0, 0, 0
	t[20], t[21], t[22], t[23] = 1, 1, 8, 10
	binary.BigEndian.PutUint32(t[24:], 1)
	binary.BigEndian.PutUint32(t[28:], c.echo)
	copy(t[32:], options)
	c.seq += uint32(payload)
	if flags&flagSYN != 0 {
		c.seq++
	}
	return b
}

// farOptions are those of a SYN besides timestamps: MSS 1360, SACK, window scale 7.
var farOptions = []byte{2, 4, 1360 >> 8, 1360 & 0xff, 4, 2, 1, 3, 3, 7, 1, 1}

// output is Config.Output.
func (f *farEnd) output(pkts [][]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	first := &pkts[0][testHeadroom]
	for _, p := range pkts {
		p = p[testHeadroom : len(p)-testTailroom]
		t := p[20:]
		i := int(binary.BigEndian.Uint16(t[2:])) - 1
		c := &f.conns[i]
		if v, _, ok := timestamps(t[20 : int(t[12]>>4)*4]); ok {
			c.echo = v
		}
		seq := binary.BigEndian.Uint32(t[4:])
		n := len(t) - int(t[12]>>4)*4
		switch {
		case t[13]&flagSYN != 0:
			c.ack, c.port = seq+1, binary.BigEndian.Uint16(t)
			copy(c.peer[:], p[12:16])
			copy(c.addr[:], p[16:20])
			if f.dials {
				f.replies = append(f.replies, f.put(make([]byte, 100), i, flagACK, nil, 0))
			} else {
				f.replies = append(f.replies, f.put(make([]byte, 100), i, flagSYN|flagACK, farOptions, 0))
			}
			select {
			case f.wake <- struct{}{}:
			default:
			}
		case n > 0:
			if seq != c.ack {
				continue // sent again: there was no acknowledgement for long
			}
			c.ack += uint32(n)
			f.bytes += uint64(n)
			if k := len(f.unacked) - 1; k >= 0 && f.unacked[k].i == i && &p[0] != first {
				f.unacked[k].ack = c.ack
			} else {
				f.unacked = append(f.unacked, farAck{i, c.ack})
			}
		}
	}
}

// shakeLoop answers SYNs until the connections are made.
func (f *farEnd) shakeLoop(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-f.wake:
		}
		f.mu.Lock()
		r := f.replies
		f.replies = nil
		f.mu.Unlock()
		f.stack.Input(r)
	}
}

// acknowledge answers the data that has come, one acknowledgement for what came
// at once, up to as many as fit a batch.
func (f *farEnd) acknowledge() {
	f.mu.Lock()
	f.pkts = f.pkts[:0]
	n := min(len(f.unacked), growthBatch)
	for k, a := range f.unacked[:n] {
		p := f.put(f.bufs[k][:], a.i, flagACK, nil, 0)
		binary.BigEndian.PutUint32(p[28:], a.ack)
		f.pkts = append(f.pkts, p)
	}
	f.unacked = append(f.unacked[:0], f.unacked[n:]...)
	f.mu.Unlock()
	f.stack.Input(f.pkts)
}

// growthRig is a stack with many connections to a farEnd.
type growthRig struct {
	*farEnd
	conns []*Conn
	read  atomic.Int64  // bytes, by all readers
	want  atomic.Int64  // of which so many are waited for
	there chan struct{} // they are there
	wg    sync.WaitGroup
}

// newGrowthRig opens n connections.
func newGrowthRig(b *testing.B, n int, forward bool) *growthRig {
	b.Helper()
	r := &growthRig{
		farEnd: &farEnd{dials: forward, conns: make([]farConn, n), wake: make(chan struct{}, 1)},
		conns:  make([]*Conn, n), there: make(chan struct{}, 1),
	}
	var err error
	r.stack, err = New(Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: r.output, Forward: forward})
	if err != nil {
		b.Fatal(err)
	}
	own := client4
	if forward {
		own = server4
	}
	if err := r.stack.SetAddresses([]netip.Addr{own}); err != nil {
		b.Fatal(err)
	}
	stop := make(chan struct{})
	defer close(stop)
	go r.shakeLoop(stop)
	if forward {
		r.accept(b)
	} else {
		r.dial(b)
	}
	for i, c := range r.conns {
		if c == nil {
			b.Fatalf("connection %d isn't there", i)
		}
		r.wg.Go(func() { r.readLoop(c) })
	}
	b.Cleanup(func() {
		r.stack.Close()
		r.wg.Wait()
	})
	return r
}

func (r *growthRig) dial(b *testing.B) {
	if err := r.stack.SetPortRange(2048, 4095); err != nil {
		b.Fatal(err)
	}
	const dialers = 16
	var wg sync.WaitGroup
	for from := range dialers {
		wg.Go(func() {
			for i := from; i < len(r.conns); i += dialers {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 16)}), uint16(i+1))
				c, err := r.stack.DialTCP(ctx, to)
				cancel()
				if err != nil {
					b.Error(err)
					return
				}
				r.conns[i] = c
			}
		})
	}
	wg.Wait()
}

// accept lets the far end dial, as clients of a server do, 100 connections each.
func (r *growthRig) accept(b *testing.B) {
	const most = 256 // at once
	free := make(chan struct{}, most)
	r.stack.ForwardTCP(most, func(q *TCPRequest) {
		c, err := q.Accept()
		if err != nil {
			b.Error(err)
			return
		}
		r.conns[int(q.Source().Port())-1] = c
		<-free
	})
	for i := range r.conns {
		free <- struct{}{}
		r.mu.Lock()
		r.farEnd.conns[i] = farConn{addr: [4]byte{100, 64, 1, byte(i / 100)}, peer: [4]byte{192, 0, 2, 80}, port: 443}
		p := r.put(r.bufs[0][:], i, flagSYN, farOptions, 0)
		r.mu.Unlock()
		r.stack.Input([][]byte{p})
	}
	for range most {
		free <- struct{}{}
	}
}

// readLoop reads one connection, with a buffer only while there is data.
func (r *growthRig) readLoop(c *Conn) {
	for {
		if c.WaitReadable() != nil {
			return
		}
		buf := growthBuffers.Get().(*[64 << 10]byte)
		n, err := c.Read(buf[:])
		growthBuffers.Put(buf)
		if err != nil {
			return
		}
		if have, want := r.read.Add(int64(n)), r.want.Load(); have >= want && have-int64(n) < want {
			select {
			case r.there <- struct{}{}:
			default:
			}
		}
	}
}

var growthBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// turns goes through the first n connections in a random order, again and again.
type turns struct {
	order []int
	at    int
}

func newTurns(n int) *turns { return &turns{order: rand.New(rand.NewPCG(1, uint64(n))).Perm(n)} }

func (t *turns) next() int {
	i := t.order[t.at]
	if t.at++; t.at == len(t.order) {
		t.at = 0
	}
	return i
}

// growthBatch is how many packets are in hand at once, as from the outer socket.
const growthBatch = 64

// down lets n packets come, run of them in a row for one connection.
func (r *growthRig) down(t *turns, n, size, run int) {
	sent := r.read.Load()
	for n > 0 {
		r.pkts = r.pkts[:0]
		for len(r.pkts) < growthBatch {
			r.segments(t, run, size)
		}
		r.stack.Input(r.pkts)
		n -= growthBatch
		// Two batches may be on their way.
		before := sent
		sent += int64(growthBatch * size)
		r.await(before)
		if n <= 0 {
			r.await(sent)
		}
	}
}

// segments appends packets for the connection whose turn it is.
func (r *growthRig) segments(t *turns, run, size int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := t.next()
	for k := range run {
		flags := byte(flagACK)
		if k == run-1 {
			flags |= flagPSH
		}
		r.pkts = append(r.pkts, r.put(r.bufs[len(r.pkts)][:], i, flags, nil, size))
	}
}

// await waits until so many bytes have been read.
func (r *growthRig) await(n int64) {
	r.want.Store(n)
	for r.read.Load() < n {
		<-r.there // one that nobody has taken does no harm
	}
}

// up writes n packets, run of them at once to one connection.
func (r *growthRig) up(t *turns, n, size, run int) {
	written := r.received()
	payload := make([]byte, size*run)
	for ; n > 0; n -= growthBatch {
		for range growthBatch / run {
			_, _ = r.conns[t.next()].Write(payload)
		}
		r.acknowledge()
		// A batch may be on its way, so that no send buffer ever fills: nobody
		// would acknowledge anything while Write waits.
		before := written
		written += uint64(growthBatch * size)
		r.arrived(before)
	}
	r.arrived(written)
}

// arrived waits until the far end has got so many bytes.
func (r *growthRig) arrived(n uint64) {
	for r.received() < n {
		runtime.Gosched()
		r.acknowledge()
	}
}

// received is how many bytes the far end has got.
func (r *growthRig) received() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkGrowth is a packet in (down) and out (up) while so many connections
// are open. An operation is a packet; cpu-ns are those of all cores. Of the
// connections all have their turn, in a random order, or few: the difference is
// that between memory and caches, since small and full packets come alone, each
// for another connection than the last. Runs of 8 are what is common.
func BenchmarkGrowth(b *testing.B) {
	for _, road := range []string{"dial", "forward"} {
		for _, n := range []int{10, 100, 1000, 10_000} {
			b.Run(fmt.Sprintf("%s/connections=%d", road, n), func(b *testing.B) {
				if n > 1000 && testing.Short() {
					b.Skip("opening so many connections takes a second")
				}
				benchmarkGrowth(b, newGrowthRig(b, n, road == "forward"))
			})
		}
	}
}

func benchmarkGrowth(b *testing.B, r *growthRig) {
	for _, way := range []struct {
		name string
		pass func(*growthRig, *turns, int, int, int)
	}{{"down", (*growthRig).down}, {"up", (*growthRig).up}} {
		for _, load := range []struct {
			name        string
			active      int
			size, count int
		}{
			{"small", len(r.conns), 64, 1},
			{"full", len(r.conns), farSegment, 1},
			{"runs", len(r.conns), farSegment, 8},
			{"few", 10, farSegment, 1},
		} {
			b.Run(way.name+"/"+load.name, func(b *testing.B) {
				t := newTurns(load.active)
				b.SetBytes(int64(load.size))
				b.ReportAllocs()
				n := (b.N + growthBatch - 1) / growthBatch * growthBatch
				used := cpuTime()
				b.ResetTimer()
				way.pass(r, t, n, load.size, load.count)
				b.StopTimer()
				b.ReportMetric(float64(cpuTime()-used)/float64(n), "cpu-ns/op")
			})
		}
	}
}
