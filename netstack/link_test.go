package netstack

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
)

// The addresses of the tests: two stacks, client and server, tied by a link.
var (
	client4 = netip.MustParseAddr("100.64.0.7")
	client6 = netip.MustParseAddr("fd00:0:0:7::1")
	server4 = netip.MustParseAddr("100.64.0.0")
	server6 = netip.MustParseAddr("fd00::1")
	world4  = netip.MustParseAddr("192.0.2.80")
	world6  = netip.MustParseAddr("2001:db8::80")
)

// raceEnabled is set when the race detector is on, under which a sync.Pool
// loses elements on purpose.
var raceEnabled bool

const (
	testHeadroom = 20
	testTailroom = 16
)

// weather is what a direction of a link does to packets. The zero value passes
// them on as they are.
type weather struct {
	loss, dup, reorder float64 // probabilities for each packet
}

// way is one direction of a link: a queue and the goroutine that delivers from
// it, as a real tunnel has. What the queue can't take is lost.
type way struct {
	t     testing.TB
	queue chan [][]byte
	stop  chan struct{}
	done  chan struct{}
	to    *Stack

	mu   sync.Mutex
	w    weather
	cut  bool
	rng  *rand.Rand
	late []byte                // the packet that reordering holds back
	tap  func(pkts [][]byte)   // sees what goes in
	edit func(b []byte) []byte // nil drops
}

func newWay(t testing.TB, seed uint64) *way {
	return &way{t: t, queue: make(chan [][]byte, 4096), stop: make(chan struct{}), done: make(chan struct{}), rng: rand.New(rand.NewPCG(seed, 1))}
}

// output is Config.Output. It checks the contract, takes the packets away and
// then overwrites everything, as sealing would.
func (y *way) output(pkts [][]byte) {
	batch := make([][]byte, 0, len(pkts))
	y.mu.Lock()
	defer y.mu.Unlock()
	for i, p := range pkts {
		if cap(p) != len(p) {
			y.t.Errorf("packet of %d bytes with capacity %d", len(p), cap(p))
		}
		if i > 0 {
			before := pkts[i-1]
			if unsafe.Add(unsafe.Pointer(&before[0]), len(before)) != unsafe.Pointer(&p[0]) {
				y.t.Error("packets of a batch don't lie one behind another")
			}
		}
		b := append([]byte(nil), p[testHeadroom:len(p)-testTailroom]...)
		for i := range p {
			p[i] = 0xee
		}
		if y.edit != nil {
			if b = y.edit(b); b == nil {
				continue
			}
		}
		if y.rng.Float64() < y.w.loss || y.cut {
			continue
		}
		if y.rng.Float64() < y.w.dup {
			batch = append(batch, append([]byte(nil), b...))
		}
		if y.late == nil && y.rng.Float64() < y.w.reorder {
			y.late = b
			continue
		}
		batch = append(batch, b)
		if y.late != nil && y.rng.IntN(4) == 0 {
			batch = append(batch, y.late)
			y.late = nil
		}
	}
	if y.tap != nil {
		y.tap(batch)
	}
	if len(batch) == 0 {
		return
	}
	select {
	case y.queue <- batch:
	default:
	}
}

func (y *way) set(w weather) { y.mu.Lock(); y.w = w; y.mu.Unlock() }

func (y *way) deliverLoop() {
	defer close(y.done)
	for {
		select {
		case b := <-y.queue:
			y.to.Input(b)
		case <-y.stop:
			return
		}
	}
}

// pair is two stacks back to back.
type pair struct {
	client, server *Stack
	up, down       *way // client to server, server to client
	ended          bool
}

func (p *pair) close() {
	if p.ended {
		return
	}
	p.ended = true
	p.client.Close()
	p.server.Close()
	// The queues stay open: a packet that is being delivered just now may still
	// cause an answer.
	close(p.up.stop)
	close(p.down.stop)
	<-p.up.done
	<-p.down.done
}

type option func(client, server *Config)

func withMTU(n int) option { return func(c, s *Config) { c.MTU, s.MTU = n, n } }
func withForward() option  { return func(_, s *Config) { s.Forward = true } }

// newPair returns two connected stacks that end with the test, and checks that
// nothing of them is left then.
func newPair(t testing.TB, opts ...option) *pair {
	t.Helper()
	checkLeaks(t)
	p := &pair{up: newWay(t, 1), down: newWay(t, 2)}
	cc := Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: p.up.output}
	sc := Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: p.down.output}
	for _, o := range opts {
		o(&cc, &sc)
	}
	var err error
	if p.client, err = New(cc); err != nil {
		t.Fatal(err)
	}
	if p.server, err = New(sc); err != nil {
		t.Fatal(err)
	}
	if err := p.client.SetAddresses([]netip.Addr{client4, client6}); err != nil {
		t.Fatal(err)
	}
	if err := p.server.SetAddresses([]netip.Addr{server4, server6}); err != nil {
		t.Fatal(err)
	}
	p.up.to, p.down.to = p.server, p.client
	go p.up.deliverLoop()
	go p.down.deliverLoop()
	t.Cleanup(p.close)
	return p
}

// checkLeaks fails the test if goroutines of this package or of gVisor's
// transport outlive it. It must be called before other cleanups are set.
func checkLeaks(t testing.TB) {
	t.Cleanup(func() {
		var stacks string
		for range 100 {
			if stacks = leaked(); stacks == "" {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("goroutines left behind:\n%s", stacks)
	})
}

func leaked() string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var left []string
	for i, g := range strings.Split(string(buf), "\n\n") {
		if i == 0 || strings.Contains(g, "testing.(*T).Run") || strings.Contains(g, "testing.tRunner") {
			continue
		}
		if strings.Contains(g, "anytun/netstack.") || strings.Contains(g, "tcpip/") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// connect dials from client to a listener of the server and returns both ends.
func (p *pair) connect(t testing.TB, at netip.Addr) (c, s *Conn) {
	t.Helper()
	l, err := p.server.ListenTCP(netip.AddrPortFrom(at, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err = p.client.DialTCP(testContext(t), l.at)
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s = a.(*Conn)
	deadline := time.Now().Add(30 * time.Second)
	_ = c.SetDeadline(deadline)
	_ = s.SetDeadline(deadline)
	return c, s
}

// pattern is a stream of bytes that shows every displacement.
type pattern struct {
	at    uint64
	bytes int // how many are left
}

func (p *pattern) fill(b []byte) {
	for i := range b {
		x := (p.at + uint64(i)) * 0x9e3779b97f4a7c15
		b[i] = byte(x >> 56)
	}
}

func (p *pattern) Read(b []byte) (int, error) {
	if p.bytes == 0 {
		return 0, io.EOF
	}
	n := min(len(b), p.bytes)
	p.fill(b[:n])
	p.at += uint64(n)
	p.bytes -= n
	return n, nil
}

// check reads r to its end and reports whether it is n bytes of the pattern.
func checkPattern(t testing.TB, r io.Reader, n int) {
	t.Helper()
	want := pattern{bytes: n}
	buf, exp := make([]byte, 50000), make([]byte, 50000)
	got := 0
	for {
		k, err := r.Read(buf)
		if k > 0 {
			want.fill(exp[:k])
			if string(exp[:k]) != string(buf[:k]) {
				t.Errorf("wrong bytes after offset %d", got)
				return
			}
			want.at += uint64(k)
			got += k
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Errorf("after %d bytes: %v", got, err)
			return
		}
	}
	if got != n {
		t.Errorf("%d bytes, want %d", got, n)
	}
}

// transfer sends n bytes both ways at once and half-closes.
func transfer(t testing.TB, a, b net.Conn, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for _, d := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Add(2)
		go func() {
			defer wg.Done()
			if _, err := io.CopyBuffer(struct{ io.Writer }{d[0]}, &pattern{bytes: n}, make([]byte, 70000)); err != nil {
				t.Errorf("send: %v", err)
			}
			_ = d[0].(*Conn).CloseWrite()
		}()
		go func() {
			defer wg.Done()
			checkPattern(t, d[1], n)
		}()
	}
	wg.Wait()
}
