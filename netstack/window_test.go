package netstack

import (
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/faketime"
)

func TestBudget(t *testing.T) {
	const mib = 1 << 20
	clock := faketime.NewManualClock()
	var b budget
	b.init(clock, 32*mib, 128<<10)
	users := make([]usage, 1000)
	// move lets n connections move bytes each, in pieces, within a turn.
	move := func(users []usage, bytes int) {
		for range bytes / budgetGrain {
			for i := range users {
				if !b.moved(&users[i], budgetGrain) {
					t.Fatal("a grain was not told to the budget")
				}
			}
		}
	}
	want := func(what string, least, most int) {
		t.Helper()
		if s := int(b.share.Load()); s < least || s > most {
			t.Errorf("%s: share %d, want %d to %d", what, s, least, most)
		}
	}
	want("nothing moved", bufferMax, bufferMax)
	move(users[:1], mib)
	want("one", bufferMax, bufferMax)
	move(users[:8], mib)
	want("eight", 4*mib*7/8, 5*mib)
	move(users[:64], mib)
	want("64", 512<<10, 680<<10)
	clock.Advance(budgetTurn)
	move(users[:1], mib)
	want("one, a turn after 64", 512<<10, 680<<10)
	clock.Advance(budgetTurn)
	move(users[:1], mib)
	want("one, two turns after 64", bufferMax, bufferMax)
	move(users, mib)
	want("1000", 128<<10, 128<<10)
	clock.Advance(10 * budgetTurn)
	move(users[:1], mib)
	want("one, after a quiet time", bufferMax, bufferMax)

	// Those that move little beside others are not to take their share away.
	clock.Advance(2 * budgetTurn)
	move(users[:1], 400*mib)
	move(users, budgetGrain)
	want("one, and 1000 that move little", bufferMax, bufferMax)
}

// A sender's room grows as slow start does, until a queue stands; it never falls
// below the floor.
func TestSendWindowQueue(t *testing.T) {
	const mib = 1 << 20
	var w sendWindow
	look := func(shortest, lately time.Duration, inFlight, written int) int {
		w.written = written
		w.queue(pathState{shortest: shortest, lately: lately, inFlight: inFlight})
		return w.limit
	}
	if got := look(0, 0, 0, mib/4); got != 0 {
		t.Errorf("nothing is known: %d", got)
	}
	if got := look(time.Millisecond, 30*time.Millisecond, 10*mib, mib/4); got != 0 {
		t.Errorf("a short path: %d", got)
	}
	w.queue(pathState{shortest: time.Millisecond, lately: time.Millisecond, inFlight: mib, reorders: true})
	if w.limit != standingFloor {
		t.Errorf("a short path that reorders: %d", w.limit)
	}
	if got := look(time.Millisecond, 30*time.Millisecond, 10*mib, mib/4); got != 0 {
		t.Errorf("it reorders no more: %d", got)
	}
	for range 64 {
		look(40*time.Millisecond, 50*time.Millisecond, 16*mib, mib/4)
	}
	if w.limit != bufferMax {
		t.Errorf("after 16 MiB without a queue %d, want all", w.limit)
	}
	least := 40*time.Millisecond*3/2 + standingQueue
	if got, want := look(40*time.Millisecond, least*10/9, 10*mib, mib/4), 9*mib; got != want {
		t.Errorf("a tenth too much: %d, want %d", got, want)
	}
	if got, want := look(40*time.Millisecond, 10*least, 10*mib, mib/4), 9*mib*3/4; got != want {
		t.Errorf("much too much: %d, want %d", got, want)
	}
	if got, want := look(40*time.Millisecond, least, 0, mib/4), 9*mib*3/4+mib/32; got != want {
		t.Errorf("the queue is gone: %d, want %d", got, want)
	}
	for range 20 {
		look(40*time.Millisecond, 10*least, 10*mib, mib/4)
	}
	if w.limit != standingFloor {
		t.Errorf("at last %d, want the floor", w.limit)
	}
}

// Small pieces are told together, and none is forgotten.
func TestBudgetSmallPieces(t *testing.T) {
	var b budget
	b.init(faketime.NewManualClock(), 32<<20, 128<<10)
	var u usage
	const pieces, size = 10000, 999
	told := 0
	for range pieces {
		if b.moved(&u, size) {
			told++
		}
	}
	if least := pieces * size / (budgetGrain + size); told < least || told > pieces*size/budgetGrain {
		t.Errorf("told %d times", told)
	}
	if got := int(b.sum)*budgetUnit + int(u.untold); got != pieces*size {
		t.Errorf("%d bytes counted, want %d", got, pieces*size)
	}
	if b.squares != b.sum*b.sum {
		t.Errorf("squares %d, want the square of %d", b.squares, b.sum)
	}
}

// Whatever gVisor chooses and the share becomes, a buffer shrinks only so fast
// that what the peer was promised has room, and gets to its share in the end.
func TestReceiveWindowFit(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var w receiveWindow
		size, tuned := bufferDefault, bufferDefault
		w.fit(size, bufferMax)
		read, sinceCut := 0, 0
		for range 300 {
			share := min(128<<10<<rng.IntN(7), bufferMax)
			for range rng.IntN(30) {
				n := rng.IntN(128 << 10)
				read += n
				sinceCut += n
				w.read = min(w.read+n, bufferMax)
				now := size
				if rng.IntN(4) == 0 {
					now = min(size+rng.IntN(size), bufferMax) // gVisor's tuning
					tuned = max(tuned, now)
				}
				next := w.fit(now, share)
				switch {
				case next > max(now, share), next > tuned:
					t.Fatalf("seed %d: %d bytes, the share is %d and gVisor wanted %d", seed, next, share, tuned)
				case next < now && now > size:
					t.Fatalf("seed %d: the peer was promised half of %d, and there are %d", seed, now, next)
				case next < size && next < size*3/4:
					t.Fatalf("seed %d: from %d to %d at once", seed, size, next)
				case next < size && sinceCut < size:
					t.Fatalf("seed %d: smaller than %d after %d bytes read", seed, size, sinceCut)
				case next < size:
					sinceCut = 0
				}
				size = next
			}
		}
		for range 16 {
			w.read = bufferMax
			size = w.fit(size, 256<<10)
		}
		if size != min(tuned, 256<<10) {
			t.Errorf("seed %d: stays at %d", seed, size)
		}
		if size = w.fit(size, bufferMax); size != tuned {
			t.Errorf("seed %d: back to %d, want %d", seed, size, tuned)
		}
	}
}

// Many busy connections get to their shares, with every byte in place; and one
// that goes on alone gets back what it had.
func TestWindowsOfManyConnections(t *testing.T) {
	const conns, bytes = 48, 1 << 20
	p := newPair(t)
	clock := faketime.NewManualClock() // one turn for as long as the test wants
	p.server.windows.in.clock, p.client.windows.out.clock = clock, clock
	type ends struct{ c, s *Conn }
	all := make([]ends, conns)
	for i := range all {
		all[i].c, all[i].s = p.connect(t, server4)
	}
	up := func(e ends) {
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := io.Copy(struct{ io.Writer }{e.c}, &pattern{bytes: bytes}); err != nil {
				t.Error(err)
			}
		})
		checkPattern(t, io.LimitReader(e.s, bytes), bytes)
		wg.Wait()
	}
	sizes := func() (in, out int) {
		for _, e := range all {
			in += int(e.s.ep.SocketOptions().GetReceiveBufferSize())
			out += int(e.c.ep.SocketOptions().GetSendBufferSize())
		}
		return in, out
	}
	for range 4 {
		var wg sync.WaitGroup
		for _, e := range all {
			wg.Go(func() { up(e) })
		}
		wg.Wait()
	}
	// Tuned by gVisor alone it would be some 200 MB and 120 MB. How far the sums exceed
	// the budgets depends on how many were busy at once when each was tuned last.
	if in, out := sizes(); in > 5*receiveBudget/2 || out > 5*sendBudget/2 {
		t.Errorf("receive buffers of %d bytes and send buffers of %d are too much for the budgets", in, out)
	}
	if n := p.server.Stats().DropNoRoom; n != 0 {
		t.Errorf("%d times a receive buffer had no room for what was promised", n)
	}
	clock.Advance(2 * budgetTurn)
	up(all[0])
	if in := all[0].s.ep.SocketOptions().GetReceiveBufferSize(); in < bufferDefault {
		t.Errorf("the receive buffer of a connection alone is %d bytes", in)
	}
	for _, e := range all {
		e.c.Close()
		e.s.Close()
	}
}

// BenchmarkIdleConnection reports what a connection costs that nothing moves on:
// both ends of it, in two stacks.
func BenchmarkIdleConnection(b *testing.B) {
	p := newPair(b)
	before := inUse()
	conns := make([]*Conn, 0, 2*b.N)
	for b.Loop() {
		c, s := p.connect(b, server4)
		_ = c.SetDeadline(time.Time{})
		_ = s.SetDeadline(time.Time{})
		conns = append(conns, c, s)
	}
	b.ReportMetric(float64(inUse()-before)/float64(len(conns)), "B/end")
	b.ReportMetric(0, "ns/op")
	for _, c := range conns {
		_ = c.Abort()
	}
}

// An idle connection holds no buffers: with them it would be 20 times as much.
func TestIdleConnectionMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector's memory is counted too")
	}
	const conns, most = 500, 16 << 10
	p := newPair(t)
	before := inUse()
	ends := make([]*Conn, 0, 2*conns)
	for range conns {
		c, s := p.connect(t, server4)
		for _, w := range []struct{ from, to *Conn }{{c, s}, {s, c}} {
			if _, err := w.from.Write(make([]byte, 100<<10)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(w.to, make([]byte, 100<<10)); err != nil {
				t.Fatal(err)
			}
		}
		ends = append(ends, c, s)
	}
	if per := (inUse() - before) / len(ends); per > most {
		t.Errorf("%d bytes for an end of an idle connection, want at most %d", per, most)
	} else {
		t.Logf("%d bytes for an end", per)
	}
	for _, c := range ends {
		_ = c.Abort()
	}
}

// inUse is how many bytes the heap and the goroutines' stacks take.
func inUse() int {
	// The first collection makes pools let go, the second one frees.
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}
