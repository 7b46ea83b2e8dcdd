package splice

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/test/loopback"
)

// stackPair returns two ends of a TCP connection between two netstacks.
func stackPair(t testing.TB) (a, b *netstack.Conn) {
	t.Helper()
	stacks := make([]*netstack.Stack, 2)
	queues := []chan [][]byte{make(chan [][]byte, 1024), make(chan [][]byte, 1024)}
	done := make(chan struct{})
	var wg sync.WaitGroup
	at := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	for i := range stacks {
		s, err := netstack.New(netstack.Config{MTU: 1400, Output: func(pkts [][]byte) {
			list := make([][]byte, len(pkts))
			for k, p := range pkts {
				list[k] = bytes.Clone(p)
			}
			select {
			case queues[i] <- list:
			case <-done:
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetAddresses(at[i : i+1]); err != nil {
			t.Fatal(err)
		}
		stacks[i] = s
	}
	for i := range stacks {
		wg.Go(func() {
			for {
				select {
				case list := <-queues[i]:
					stacks[1-i].Input(list)
				case <-done:
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		close(done)
		wg.Wait()
		for _, s := range stacks {
			s.Close()
		}
	})
	l, err := stacks[1].ListenTCP(netip.AddrPortFrom(at[1], 80))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	a, err = stacks[0].DialTCP(ctx, netip.AddrPortFrom(at[1], 80))
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	b = c.(*netstack.Conn)
	for _, c := range []net.Conn{a, b} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return a, b
}

// halfCloser is what both kinds of connections are.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// abort resets a connection.
func abort(c net.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
		c.Close()
	case *netstack.Conn:
		_ = c.Abort()
	}
}

// relay copies both ways until both directions have ended and closes both ends. It passes the end of a stream on; any
// error resets both. up and down are told what has passed from a, and to it.
func relay(a, b halfCloser, up, down func(n int)) error {
	errs := make(chan error, 2)
	copyTo := func(to, from halfCloser, add func(n int)) {
		err := Copy(to, NewReader(from), nil, add)
		if err != nil {
			abort(a)
			abort(b)
		} else {
			_ = to.CloseWrite()
		}
		errs <- err
	}
	go copyTo(b, a, up)
	go copyTo(a, b, down)
	err := errors.Join(<-errs, <-errs)
	a.Close()
	b.Close()
	return err
}

func uncounted(int) {}

// TestCopy sends much both ways at once between a kernel socket and a netstack, in pieces of all sizes, with
// readers that stop now and then so that every buffer on the way fills.
func TestCopy(t *testing.T) {
	app, a := loopback.TCPPair(t)
	b, far := stackPair(t)
	if rawReads && (newDirect(a, b) == nil || newDirect(b, a) != nil) {
		t.Fatal("the kernel's socket and the netstack's connection are taken for something else")
	}
	_ = app.SetReadBuffer(64 << 10)
	_ = a.SetWriteBuffer(64 << 10)
	relayed := make(chan error, 1)
	go func() {
		relayed <- relay(a, b, uncounted, uncounted)
	}()
	const size = 8 << 20
	var wg sync.WaitGroup
	for i, d := range [][2]halfCloser{{app, far}, {far, app}} {
		random := rand.New(rand.NewPCG(uint64(i), 7))
		data := make([]byte, size)
		for k := range data {
			data[k] = byte(random.Uint32())
		}
		wg.Go(func() {
			for rest := data; len(rest) > 0; {
				n, err := d[0].Write(rest[:min(len(rest), 1+random.IntN(300_000))])
				if err != nil {
					t.Errorf("direction %d: %v", i, err)
					return
				}
				rest = rest[n:]
			}
			if err := d[0].CloseWrite(); err != nil {
				t.Errorf("direction %d: %v", i, err)
			}
		})
		pause := rand.New(rand.NewPCG(uint64(i), 8))
		wg.Go(func() {
			sum := sha256.New()
			buf := make([]byte, 100_000)
			for {
				n, err := d[1].Read(buf[:1+pause.IntN(len(buf))])
				sum.Write(buf[:n])
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Errorf("direction %d: %v", i, err)
					return
				}
				if pause.IntN(20) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			if want := sha256.Sum256(data); !bytes.Equal(sum.Sum(nil), want[:]) {
				t.Errorf("direction %d: other bytes arrived than were sent", i)
			}
		})
	}
	wg.Wait()
	if err := <-relayed; err != nil {
		t.Errorf("Copy: %v", err)
	}
}

// TestCopyReset resets one end in the middle of a bulk transfer: the other end sees a reset, not an end.
func TestCopyReset(t *testing.T) {
	for _, kernel := range []bool{true, false} {
		app, a := loopback.TCPPair(t)
		b, far := stackPair(t)
		relayed := make(chan error, 1)
		go func() {
			relayed <- relay(a, b, uncounted, uncounted)
		}()
		var resets, other halfCloser = app, far
		if !kernel {
			resets, other = far, app
		}
		go func() { _, _ = io.Copy(resets, &endless{}) }()
		if _, err := io.ReadFull(other, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		abort(resets)
		if _, err := io.Copy(io.Discard, other); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("kernel %v: the other end read %v, want a reset", kernel, err)
		}
		if err := <-relayed; err == nil {
			t.Errorf("kernel %v: Copy reports no error", kernel)
		}
	}
}

// TestCopyFull: an application that doesn't read holds its sender up.
func TestCopyFull(t *testing.T) {
	app, a := loopback.TCPPair(t)
	b, far := stackPair(t)
	relayed := make(chan struct{})
	var down atomic.Int64
	go func() {
		defer close(relayed)
		_ = relay(a, b, uncounted, func(n int) { down.Add(int64(n)) })
	}()
	_ = far.SetWriteDeadline(time.Now().Add(2 * time.Second))
	n, err := io.Copy(far, &endless{})
	if err == nil || n > 64<<20 {
		t.Errorf("%d bytes were taken while nobody read: %v", n, err)
	}
	moved := down.Load()
	time.Sleep(50 * time.Millisecond)
	if now := down.Load(); now != moved {
		t.Errorf("%d bytes went to an application that doesn't read, later %d", moved, now)
	}
	abort(app)
	<-relayed
}

// TestDirectClosed: on a closed socket nothing is moved, and the bytes of the call before aren't counted again.
func TestDirectClosed(t *testing.T) {
	if !rawReads {
		t.Skip("this system's sockets aren't read through their file descriptors")
	}
	app, a := loopback.TCPPair(t)
	near, far := stackPair(t)
	to, from := newDirect(a, near), newDirect(a, near)
	if _, err := far.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if n, err := to.toSocket(); n != 1000 || err != nil {
		t.Fatalf("to the socket: %d, %v", n, err)
	}
	if _, err := app.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := WaitReadable(a); err != nil {
		t.Fatal(err)
	}
	if n, err := from.fromSocket(); runtime.GOOS == "linux" && n != 1000 || err != nil {
		t.Fatalf("from the socket: %d, %v", n, err)
	}
	if _, err := far.Write(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if n, err := to.toSocket(); n != 0 || err == nil {
		t.Errorf("to a closed socket: %d, %v", n, err)
	}
	if n, err := from.fromSocket(); n != 0 || err == nil {
		t.Errorf("from a closed socket: %d, %v", n, err)
	}
}

// endless is a stream of zeros.
type endless struct{}

func (*endless) Read(p []byte) (int, error) { return len(p), nil }

// BenchmarkCopy copies 64 KiB between a kernel socket and a netstack.
func BenchmarkCopy(b *testing.B) {
	for _, down := range []bool{true, false} {
		name := "up"
		if down {
			name = "down"
		}
		b.Run(name, func(b *testing.B) {
			app, a := loopback.TCPPair(b)
			near, far := stackPair(b)
			relayed := make(chan struct{})
			go func() {
				defer close(relayed)
				_ = relay(a, near, uncounted, uncounted)
			}()
			var from, to halfCloser = app, far
			if down {
				from, to = far, app
			}
			const size = 64 << 10
			b.SetBytes(size)
			b.ReportAllocs()
			for _, c := range []net.Conn{app, a, near, far} {
				_ = c.SetDeadline(time.Now().Add(time.Minute))
			}
			go func() {
				buf := make([]byte, size)
				for range b.N {
					if _, err := from.Write(buf); err != nil {
						break
					}
				}
				_ = from.CloseWrite()
			}()
			if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{to}, make([]byte, size)); n != int64(b.N)*size || err != nil {
				b.Errorf("%d of %d bytes came: %v", n, int64(b.N)*size, err)
			}
			b.StopTimer()
			_ = to.CloseWrite()
			<-relayed
		})
	}
}

// TestReaderHoldsNoBuffer counts buffers that are out while both sides are silent.
func TestReaderHoldsNoBuffer(t *testing.T) {
	if !rawReads {
		t.Skip("this system's sockets can't be waited for without a buffer")
	}
	_, a := loopback.TCPPair(t)
	r := NewReader(a)
	var out atomic.Int64
	try := r.try
	r.try = func(fd uintptr) bool {
		ok := try(fd)
		if r.buf != nil {
			out.Add(1)
		}
		return ok
	}
	_ = a.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if b, _, err := r.Next(); b != nil || err == nil {
		t.Errorf("read %v, %v from a silent connection", b, err)
	}
	if out.Load() != 0 || r.buf != nil {
		t.Error("a buffer is held while nothing arrives")
	}
}

// TestReaderAllocations: a chunk from an open connection costs no allocation.
func TestReaderAllocations(t *testing.T) {
	app, a := loopback.TCPPair(t)
	r := NewReader(a)
	chunk := make([]byte, 1000)
	if n := testing.AllocsPerRun(200, func() {
		if _, err := app.Write(chunk); err != nil {
			t.Fatal(err)
		}
		b, _, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		Put(b)
	}); n > 0.5 { // the garbage collector may empty the pool meanwhile
		t.Errorf("%v allocations per chunk", n)
	}
}
