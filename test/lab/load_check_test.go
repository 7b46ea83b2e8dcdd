//go:build linux

package lab

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The load's verdicts decide about everything else here, so they are tried
// first: a saboteur stands between load and sink and does to one connection
// what must not happen.

// A sabotage is done to the first connection of a kind, in one direction, after
// some bytes. It returns what to pass on of p; an error ends the connection.
type sabotage struct {
	name string
	kind byte
	down bool // to what the sink sends
	do   func(p []byte) ([]byte, error)
	want string // how the verdict begins; empty: no error, but a stall
}

var (
	errReset = errors.New("reset")
	errEnd   = errors.New("end")
)

const sabotageStall = 1500 * time.Millisecond

func flip(p []byte) ([]byte, error)   { p[len(p)/2] ^= 1; return p, nil }
func lose(p []byte) ([]byte, error)   { return slices.Delete(p, 3, 5), nil }
func double(p []byte) ([]byte, error) { return append(p, p...), nil }
func swap(p []byte) ([]byte, error)   { slices.Reverse(p); return p, nil }
func zero(p []byte) ([]byte, error)   { clear(p); return p, nil }
func reset([]byte) ([]byte, error)    { return nil, errReset }
func finish([]byte) ([]byte, error)   { return nil, errEnd }
func stall(p []byte) ([]byte, error)  { time.Sleep(sabotageStall); return p, nil }

var sabotages = []sabotage{
	{name: "up flip", kind: kindUp, do: flip, want: "corrupt"},
	{name: "up lose", kind: kindUp, do: lose, want: "corrupt"},
	{name: "up double", kind: kindUp, do: double, want: "corrupt"},
	{name: "up swap", kind: kindUp, do: swap, want: "corrupt"},
	{name: "up reset", kind: kindUp, do: reset, want: "write|read|ended"},
	{name: "up finish", kind: kindUp, do: finish, want: "write|read|ended"},
	{name: "up stall", kind: kindUp, do: stall},
	{name: "down flip", kind: kindDown, down: true, do: flip, want: "corrupt"},
	{name: "down lose", kind: kindDown, down: true, do: lose, want: "corrupt"},
	{name: "down zero", kind: kindDown, down: true, do: zero, want: "corrupt"},
	{name: "down reset", kind: kindDown, down: true, do: reset, want: "read|ended"},
	{name: "down finish", kind: kindDown, down: true, do: finish, want: "ended"},
	{name: "down stall", kind: kindDown, down: true, do: stall},
	{name: "ping flip up", kind: kindPing, do: flip, want: "corrupt"},
	{name: "ping flip down", kind: kindPing, down: true, do: flip, want: "corrupt"},
	{name: "ping reset", kind: kindPing, down: true, do: reset, want: "read|write|ended"},
	{name: "ping stall", kind: kindPing, down: true, do: stall},
	{name: "idle finish", kind: kindIdle, down: true, do: finish, want: "ended"},
	{name: "idle flip", kind: kindIdle, do: flip, want: "corrupt"},
}

// A crook relays connections and sabotages one.
type crook struct {
	sabotage
	to     netip.AddrPort
	l      net.Listener
	wg     sync.WaitGroup
	mu     sync.Mutex
	victim net.Conn // the connection to the sink
	armed  bool
	struck bool
}

func newCrook(t *testing.T, s sabotage, to netip.AddrPort) *crook {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &crook{sabotage: s, to: to, l: l}
	c.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.wg.Go(func() { c.relay(conn.(*net.TCPConn)) })
		}
	})
	return c
}

func (c *crook) relay(app *net.TCPConn) {
	defer app.Close()
	h, err := readHeader(app)
	if err != nil {
		return
	}
	conn, err := net.Dial("tcp", c.to.String())
	if err != nil {
		return
	}
	far := conn.(*net.TCPConn)
	defer far.Close()
	if _, err := far.Write(h.append(nil)); err != nil {
		return
	}
	c.mu.Lock()
	victim := h.kind == c.kind && c.victim == nil
	if victim {
		c.victim = far
	}
	c.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { c.pump(far, app, victim && !c.down) })
	wg.Go(func() { c.pump(app, far, victim && c.down) })
	wg.Wait()
}

// pump copies one direction. The victim's is spoilt once the crook is armed.
func (c *crook) pump(to, from *net.TCPConn, victim bool) {
	b := make([]byte, 4096, 16384)
	for {
		n, err := from.Read(b)
		if n > 0 {
			p := b[:n]
			if victim && c.strike() {
				if p, err = c.do(p); err != nil {
					if errors.Is(err, errReset) {
						_ = to.SetLinger(0)
						_ = from.SetLinger(0)
					}
					from.Close()
					to.Close()
					return
				}
			}
			if _, err := to.Write(p); err != nil {
				from.Close()
				return
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				_ = to.CloseWrite()
			} else {
				_ = to.SetLinger(0)
				to.Close()
			}
			return
		}
	}
}

// strike says, once, that it is time.
func (c *crook) strike() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.armed || c.struck {
		return false
	}
	c.struck = true
	return true
}

func (c *crook) arm() { c.mu.Lock(); c.armed = true; c.mu.Unlock() }

func (c *crook) close() { c.l.Close(); c.wg.Wait() }

// tryLoad runs a small load past a crook and returns the last report.
func tryLoad(t *testing.T, s sabotage, dwell time.Duration) report {
	t.Helper()
	far, err := newSink(netip.AddrPortFrom(loop4, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer far.close()
	c := newCrook(t, s, far.address())
	defer c.close()
	l, err := newLoad(loadConfig{
		Sink: netip.MustParseAddrPort(c.l.Addr().String()), Up: 5, Down: 5, Pings: 5, Idle: 5,
		Rate: 100_000, Tick: 20 * time.Millisecond, Every: 20 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	l.mark()
	far.mark()
	c.arm()
	time.Sleep(dwell)
	near, _ := l.report()
	before := report{streams: merge(near, far.report())}
	l.end()
	near, _ = l.report()
	after := report{streams: merge(near, far.report())}
	for i := range after.streams { // the stall of the running load, the verdict of the ended
		after.streams[i].Stall = before.streams[i].Stall
	}
	return after
}

// TestLoadSeesSabotage: whatever happens to one connection is said of that
// connection, and nothing is said of the others.
func TestLoadSeesSabotage(t *testing.T) {
	for _, s := range sabotages {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			dwell := 400 * time.Millisecond
			if s.want == "" {
				dwell += sabotageStall
			}
			r := tryLoad(t, s, dwell)
			if len(r.streams) != 20 {
				t.Fatalf("%d streams in the report, want 20", len(r.streams))
			}
			broken := r.broken()
			if s.want == "" {
				slices.SortFunc(r.streams, func(a, b streamReport) int { return int(b.Stall - a.Stall) })
				worst := r.streams[0]
				if len(broken) > 0 || worst.Stall < sabotageStall || worst.Kind != kindNames[s.kind] {
					t.Errorf("%d broken (%s), the worst: %+v", len(broken), r.why(), worst)
				}
				if second := r.streams[1].Stall; second >= sabotageStall {
					t.Errorf("a stream that nobody held up stalled for %v", second)
				}
				return
			}
			if len(broken) != 1 || broken[0].Kind != kindNames[s.kind] {
				t.Fatalf("broken: %+v, want one of kind %s", broken, kindNames[s.kind])
			}
			for want := range strings.SplitSeq(s.want, "|") {
				if strings.HasPrefix(broken[0].Error, want) {
					return
				}
			}
			t.Errorf("the verdict is %q, want %s…", broken[0].Error, s.want)
		})
	}
}

// TestLoadIsContent: without a saboteur every stream is whole, also at full
// speed, and bytes went both ways.
func TestLoadIsContent(t *testing.T) {
	for rate, connections := range map[int]int{100_000: 60, 0: 12} {
		far, err := newSink(netip.AddrPortFrom(loop4, 0))
		if err != nil {
			t.Fatal(err)
		}
		l, err := newLoad(loadConfig{Sink: far.address(), UDP: true, Ping: loopIfRoot(), Rate: rate}.connections(connections))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.open([]byte{kindPing, kindPing}); err != nil {
			t.Error(err)
		}
		time.Sleep(500 * time.Millisecond)
		l.end()
		near, flows := l.report()
		r := report{streams: merge(near, far.report()), flows: flows}
		if len(r.streams) != connections+2 || len(r.broken()) != 0 {
			t.Errorf("rate %d: %d streams, broken: %s", rate, len(r.streams), r.why())
		}
		for _, kind := range []byte{kindUp, kindDown, kindPing, kindIdle} {
			if r.bytes(kind) == 0 {
				t.Errorf("rate %d: no byte went over connections of kind %s", rate, kindNames[kind])
			}
		}
		for _, f := range flows {
			if f.Sent < 10 || f.Lost+f.Doubled+f.Corrupt > 0 {
				t.Errorf("rate %d: %+v", rate, f)
			}
		}
		if got := r.from(); !slices.Equal(got, []string{loop4.String()}) {
			t.Errorf("connections from %v", got)
		}
		far.close()
	}
}

// loopIfRoot is an address to ping, if this user may.
func loopIfRoot() netip.Addr {
	if os.Geteuid() != 0 {
		return netip.Addr{}
	}
	return loop4
}

// TestTape: every byte can be told from its neighbours, however it is cut.
func TestTape(t *testing.T) {
	whole := make([]byte, 4096)
	k := tape(rand.Uint64())
	k.fill(whole, 0)
	for range 2000 {
		from := rand.IntN(len(whole))
		to := from + rand.IntN(len(whole)-from)
		part := make([]byte, to-from)
		k.fill(part, uint64(from))
		if string(part) != string(whole[from:to]) || k.check(part, uint64(from)) != -1 {
			t.Fatalf("bytes %d to %d differ from those of the whole", from, to)
		}
		if len(part) == 0 {
			continue
		}
		spoilt := rand.IntN(len(part))
		part[spoilt] ^= byte(1 + rand.IntN(255))
		if got := k.check(part, uint64(from)); got != spoilt {
			t.Fatalf("byte %d of %d to %d is wrong, check says %d", spoilt, from, to, got)
		}
	}
	if k.check(whole[:64], 8) == -1 || k.check(whole[:64], 1<<40) == -1 || (k+1).check(whole[:64], 0) == -1 {
		t.Error("another position or another key has the same bytes")
	}
}

// TestFlowCounts: lost, doubled, late and corrupt packets are each counted.
func TestFlowCounts(t *testing.T) {
	pipe := make(chan []byte, 100)
	var held []byte
	n, ended := 0, make(chan struct{})
	var marked atomic.Bool
	f := &flow{
		name: "test", close: func() { close(ended) },
		send: func(b []byte) error {
			p := slices.Clone(b)
			if !marked.Load() {
				return nil // lost, but nobody counts it
			}
			switch n++; {
			case n > 10 && n <= 15: // lost, in one piece
			case n == 18:
				return syscall.ENETUNREACH // lost
			case n == 20:
				pipe <- p
				pipe <- p // doubled
			case n == 25:
				held = p // late
			case n == 26:
				pipe <- p
				pipe <- held
			case n == 30:
				p[100] ^= 1 // corrupt, hence also lost
				pipe <- p
			default:
				pipe <- p
			}
			return nil
		},
		recv: func([]byte) ([]byte, error) {
			select {
			case p := <-pipe:
				return p, nil
			case <-ended:
				return nil, net.ErrClosed
			}
		},
	}
	f.start(1)
	time.Sleep(3 * flowEvery)
	f.mark()
	marked.Store(true)
	for f.report().Sent < 40 || f.report().Lost == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	eventually(t, 20*time.Second, func() error {
		if got := f.report(); got.Lost != 7 {
			return errors.New("not all lost packets are given up")
		}
		return nil
	})
	f.end()
	r := f.report()
	if r.Lost != 7 || r.Doubled != 1 || r.Late != 1 || r.Corrupt != 1 || r.LostRun != 5*flowEvery || len(r.LostAt) != 7 {
		t.Errorf("%+v", r)
	}
	if r.LostSpan < 15*flowEvery {
		t.Errorf("lost packets span %v, want that of 20 packets, about", r.LostSpan)
	}
}
