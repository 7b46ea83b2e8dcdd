package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// The busy connections of a stack share a budget for their windows, one for each
// direction.
//
// gVisor tunes the buffers of every connection by itself, and what it measures
// includes the time that data waits in queues. So many busy connections talk each
// other into the largest windows: what they have under way fills every queue of
// the tunnel until it drops, and each keeps bufferMax in memory. The budget bounds
// that, and leaves few connections, of which each may need bufferMax on a long
// path, alone.
//
// How many connections are busy is measured by what they move, in turns of
// budgetTurn: if x are the bytes of one connection in a turn, it is (Σx)² / Σx²,
// which is n for n connections that move the same and doesn't count those that
// move little beside the others.
const (
	// receiveBudget is the sum of the busy connections' receive buffers, of which
	// the peers see half as windows, and sendBudget that of their send buffers.
	// Two connections down still have bufferMax each, eight 4 MiB, and eight up
	// have 24 MiB under way, which is 400 MB/s at 60 ms.
	receiveBudget, sendBudget = 32 << 20, 24 << 20

	// No connection's share is smaller: a window has room for a super-segment.
	receiveFloor, sendFloor = 128 << 10, 128 << 10

	budgetTurn = 250 * time.Millisecond

	// budgetGrain is how many bytes a connection has moved before it tells the
	// budget, so that small reads and writes cost nothing.
	budgetGrain = 16 << 10

	// budgetUnit is what the budget counts in, bytes. The sum of the squares
	// doesn't overflow before 256 GB have been moved in a turn.
	budgetUnit = 64
)

// On a long path, or one that reorders, a connection has no more under way than the
// path takes, either. Until the first loss nothing else ends the growth of Reno's
// window, and what exceeds the path stands in a queue, which delays the answer to
// losses; and if there are several roads, the queue of each delays differently. So a
// send buffer begins with standingFloor and grows by what is written, as slow start
// does, until even the shortest of the latest round trips is longer than the
// shortest ever by half of that and standingQueue. Then it shrinks by as much, and
// grows again by an eighth of what is written. The floor is a quarter of what Linux
// may have under way, so that nobody who fills the queue gets the path alone. On a
// short path with one road the queue is what keeps both ends busy.
const (
	standingPath  = 5 * time.Millisecond // a longer one is long
	standingQueue = 5 * time.Millisecond
	standingFloor = 1 << 20

	// standingGrain is how many bytes are written between two looks at it.
	standingGrain = 256 << 10
)

// windows are the budgets of a Stack.
type windows struct{ in, out budget }

func (w *windows) init(s *Stack) {
	w.in.init(s.clock, receiveBudget, receiveFloor)
	w.in.changed = s.limitReceive
	w.out.init(s.clock, sendBudget, sendFloor)
}

// limitReceive keeps gVisor from tuning a receive buffer beyond the share. When it
// enlarges one it tells the peer at once, and what has been promised that way can't
// be taken back: the peer may send it, and gVisor drops what exceeds the buffer.
func (s *Stack) limitReceive(share int) {
	o := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: min(share, bufferDefault), Max: share}
	if err := s.st.SetTransportProtocolOption(tcp.ProtocolNumber, &o); err != nil {
		s.log.Error("can't limit receive buffers", "share", share, "error", err.String())
	}
}

// budget is shared by the connections of a Stack in one direction.
type budget struct {
	clock        tcpip.Clock
	total, floor int

	share   atomic.Int64    // the most that a connection's buffer may have now
	changed func(share int) // called when that changes, with mu held; may be nil

	mu    sync.Mutex // guards what follows
	turn  uint32     // the number of this turn
	began tcpip.MonotonicTime
	// sum and squares are those of what each connection has moved in this turn,
	// in units.
	sum, squares uint64
	last         float64 // how many were busy in the last turn
}

func (b *budget) init(clock tcpip.Clock, total, floor int) {
	b.clock, b.total, b.floor = clock, total, floor
	b.share.Store(bufferMax)
}

// usage is what one connection has moved. It belongs to whoever reads, or writes.
type usage struct {
	untold uint32 // bytes that the budget doesn't know of yet
	units  uint32 // those it knows of in this turn
	turn   uint32
}

// moved notes that a connection has moved n bytes and reports whether the budget
// was told, so that it is time to look at the share.
func (b *budget) moved(u *usage, n int) bool {
	u.untold += uint32(n)
	if u.untold < budgetGrain {
		return false
	}
	units := u.untold / budgetUnit
	u.untold %= budgetUnit
	now := b.clock.NowMonotonic()
	b.mu.Lock()
	defer b.mu.Unlock()
	if passed := now.Sub(b.began); passed >= budgetTurn {
		b.last = 0
		if passed < 2*budgetTurn {
			b.last = b.busyLocked()
		}
		b.turn++
		b.began, b.sum, b.squares = now, 0, 0
	}
	if u.turn != b.turn {
		u.turn, u.units = b.turn, 0
	}
	b.sum += uint64(units)
	b.squares += uint64(units) * uint64(2*u.units+units)
	u.units += units
	b.divideLocked()
	return true
}

// busyLocked is how many connections have been busy in this turn.
func (b *budget) busyLocked() float64 {
	if b.squares == 0 {
		return 0
	}
	return float64(b.sum) * float64(b.sum) / float64(b.squares)
}

// divideLocked sets the share.
func (b *budget) divideLocked() {
	busy := max(b.busyLocked(), b.last)
	share := min(max(int(float64(b.total)/busy), b.floor), bufferMax)
	// Not for every little change, but to either end.
	old := int(b.share.Load())
	if d := share - old; d == 0 || share != bufferMax && share != b.floor && max(d, -d) < old/8 {
		return
	}
	b.share.Store(int64(share))
	if b.changed != nil {
		b.changed(share)
	}
}

// sendWindow keeps a connection's send buffer within its share.
type sendWindow struct {
	usage   usage
	taken   bool // gVisor tunes it no more
	limit   int  // what the path takes; 0: no matter
	slow    bool // limit was too much once
	written int  // since the last look at the path
}

// hasWritten is told how much was written. The next thing that is done with the
// connection's room must be to look whether there is any, since gVisor wakes a
// writer when the buffer becomes half empty by the size it has then.
func (w *sendWindow) hasWritten(b *budget, t *flowTable, k *flowKey, ep tcpip.Endpoint, n int) {
	w.written += n
	if !b.moved(&w.usage, n) {
		return
	}
	if w.written >= standingGrain {
		w.queue(t.state(k))
	}
	o, share := ep.SocketOptions(), b.share.Load()
	if w.limit != 0 {
		share = min(share, int64(w.limit))
	}
	switch now := o.GetSendBufferSize(); {
	case !w.taken && now > share:
		// With gVisor's tuning at work a buffer is enlarged again and again; with
		// the limit of the tuning lowered below a buffer's size, it may forget to
		// wake the writer.
		w.taken = true
		o.SetSendBufferSize(share, true) // ends the tuning
	case w.taken && now != share:
		o.SetSendBufferSize(share, false)
	}
}

// queue is told of the connection's path.
func (w *sendWindow) queue(p pathState) {
	least := p.shortest + p.shortest/2 + standingQueue
	switch {
	case p.shortest <= standingPath && !p.reorders:
		w.limit, w.slow, w.written = 0, false, 0
		return
	case p.lately > least:
		if w.limit == 0 || p.inFlight < w.limit {
			w.limit = p.inFlight
		}
		w.slow = true
		w.limit = int(float64(w.limit) * max(float64(least)/float64(p.lately), 0.75))
	case w.slow:
		w.limit += w.written / 8
	default:
		w.limit += w.written
	}
	w.limit = min(max(w.limit, standingFloor), bufferMax)
	w.written = 0
}

// receiveWindow keeps a connection's receive buffer within its share.
type receiveWindow struct {
	usage usage
	tuned int // the largest size that gVisor has chosen
	size  int // the size now; 0: not known yet
	read  int // bytes read since it was made smaller, or gVisor made it larger
}

// hasRead is told how much was read, after gVisor has tuned the buffer.
func (w *receiveWindow) hasRead(b *budget, ep tcpip.Endpoint, n int) {
	w.read = min(w.read+n, bufferMax)
	if !b.moved(&w.usage, n) {
		return
	}
	o := ep.SocketOptions()
	now := int(o.GetReceiveBufferSize())
	size := w.fit(now, int(b.share.Load()))
	if size > now {
		// Of a window that gets larger here the peer isn't told, which does no harm
		// while it has one. It can't fail.
		if queued, _ := ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption); queued > now/4 {
			w.size = now
			return
		}
	}
	if size != now {
		o.SetReceiveBufferSize(int64(size), false) // true would end gVisor's tuning
	}
}

// fit returns the size that a buffer of now bytes is to get.
//
// What the peer was promised can't be taken back, and gVisor drops what exceeds
// the buffer. The peer may send half of its size, and half as much again is enough
// for the overhead of the segments. So a buffer is made smaller by a quarter at a
// time, and not again before all that was promised until then has been read; and
// what gVisor has enlarged counts as promised.
func (w *receiveWindow) fit(now, share int) int {
	if now > w.size { // gVisor has promised that
		w.tuned = max(w.tuned, now)
		w.size, w.read = now, 0
	}
	want := min(w.tuned, share)
	switch {
	case want >= w.size:
		w.size = want
	case w.read >= w.size:
		w.size, w.read = max(want, w.size-w.size/4), 0
	}
	return w.size
}
