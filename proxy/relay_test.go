package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/netstack/splice"
	"github.com/anytun-go/anytun/test/loopback"
)

// plainConn hides that it is a kernel socket, but can half-close.
type plainConn struct {
	net.Conn
	tcp *net.TCPConn
}

func (c *plainConn) CloseWrite() error { return c.tcp.CloseWrite() }
func (c *plainConn) Abort() error      { _ = c.tcp.SetLinger(0); return c.tcp.Close() }

// waitingConn is like netstack's: it can wait without a buffer.
type waitingConn struct {
	plainConn
	waits *atomic.Int64
}

func (c *waitingConn) WaitReadable() error {
	c.waits.Add(1)
	return splice.WaitReadable(c.tcp)
}

func TestRelay(t *testing.T) {
	var waits atomic.Int64
	for _, tt := range []struct {
		name string
		wrap func(*net.TCPConn) net.Conn
	}{
		{"kernel socket", func(c *net.TCPConn) net.Conn { return c }},
		{"waiting", func(c *net.TCPConn) net.Conn { return &waitingConn{plainConn{struct{ net.Conn }{c}, c}, &waits} }},
		{"plain", func(c *net.TCPConn) net.Conn { return &plainConn{struct{ net.Conn }{c}, c} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			app, a := loopback.TCPPair(t)
			b, server := loopback.TCPPair(t)
			type result struct {
				ab, ba int64
				err    error
			}
			done := make(chan result, 1)
			go func() {
				ab, ba, err := Relay(tt.wrap(a), tt.wrap(b))
				done <- result{ab, ba, err}
			}()
			up, down := bytes.Repeat([]byte("up"), 400_000), bytes.Repeat([]byte("down"), 300_000)
			var wg sync.WaitGroup
			var gotUp, gotDown []byte
			var errUp, errDown error
			wg.Go(func() { _, _ = app.Write(up); _ = app.CloseWrite() })
			wg.Go(func() { gotUp, errUp = io.ReadAll(server); _, _ = server.Write(down); _ = server.CloseWrite() })
			wg.Go(func() { gotDown, errDown = io.ReadAll(app) })
			wg.Wait()
			if !bytes.Equal(gotUp, up) || !bytes.Equal(gotDown, down) || errUp != nil || errDown != nil {
				t.Errorf("%d bytes up (%v), %d down (%v)", len(gotUp), errUp, len(gotDown), errDown)
			}
			want := result{int64(len(up)), int64(len(down)), nil}
			if r := <-done; r != want {
				t.Errorf("got %+v, want %+v", r, want)
			}
		})
	}
	if waits.Load() == 0 {
		t.Error("WaitReadable was never called")
	}
}

// TestRelayReset resets one side; the other one must see a reset, not an end, and Relay must say so.
func TestRelayReset(t *testing.T) {
	for _, kernel := range []bool{true, false} {
		app, a := loopback.TCPPair(t)
		b, server := loopback.TCPPair(t)
		done := make(chan error, 1)
		go func() {
			var ca, cb net.Conn = a, b
			if !kernel {
				ca, cb = &plainConn{struct{ net.Conn }{a}, a}, &plainConn{struct{ net.Conn }{b}, b}
			}
			_, _, err := Relay(ca, cb)
			done <- err
		}()
		if _, err := server.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(app, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_ = server.SetLinger(0)
		server.Close()
		if _, err := io.ReadAll(app); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("kernel %v: the application got %v, want a reset", kernel, err)
		}
		if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("kernel %v: Relay returned %v, want a reset", kernel, err)
		}
	}
}

// TestRelayWithoutHalfClose uses connections that know no half-close: the end of one direction ends both.
func TestRelayWithoutHalfClose(t *testing.T) {
	app, a := net.Pipe()
	b, server := net.Pipe()
	done := make(chan error, 1)
	go func() {
		_, _, err := Relay(a, b)
		done <- err
	}()
	go func() { _, _ = app.Write([]byte("hello")); app.Close() }()
	if got, err := io.ReadAll(server); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if err := <-done; err != nil {
		t.Errorf("Relay: %v", err)
	}
}

func TestIdleTimer(t *testing.T) {
	var progress atomic.Uint64
	expired := make(chan struct{})
	timer := NewIdleTimer(20*time.Millisecond, progress.Load, func() { close(expired) })
	for range 20 { // twice the limit, but never idle
		progress.Add(1)
		select {
		case <-expired:
			t.Skip("this machine is too slow to keep up with the timer")
		default:
		}
		time.Sleep(2 * time.Millisecond)
	}
	<-expired
	timer.Stop()

	stopped := NewIdleTimer(time.Millisecond, progress.Load, func() { t.Error("expired after Stop") })
	stopped.Stop()
	time.Sleep(5 * time.Millisecond)
}

func TestProtocolOf(t *testing.T) {
	for b := range 256 {
		want := protocolUnknown
		switch {
		case b == 4 || b == 5:
			want = protocolSOCKS
		case bytes.ContainsRune([]byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"), rune(b)):
			want = protocolHTTP
		}
		if got := protocolOf(byte(b)); got != want {
			t.Errorf("byte %#x: got %d, want %d", b, got, want)
		}
	}
}

func TestTarget(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"example.com:80", "example.com:80"},
		{"192.0.2.1:80", "192.0.2.1:80"},
		{"[2001:db8::1]:443", "[2001:db8::1]:443"},
		{"[::ffff:192.0.2.1]:443", "192.0.2.1:443"},
		{"under_score.test.:1", "under_score.test.:1"},
		{"example.com", ""},
		{"example.com:", ""},
		{"example.com:65536", ""},
		{"example.com:http", ""},
		{"example.com:-1", ""},
		{":80", ""},
		{"a b:80", ""},
		{"a\x00b:80", ""},
		{"user@host:80", ""},
		{"[fe80::1%eth0]:80", ""},
		{string(bytes.Repeat([]byte("a"), 255)) + ":80", ""},
	} {
		got, err := ParseTarget(tt.in)
		if (err != nil) != (tt.want == "") || err == nil && got.String() != tt.want {
			t.Errorf("%q: got %v, %v, want %q", tt.in, got, err, tt.want)
		}
	}
}

// Who stops the proxy may fail a relay that has just ended: nothing changes.
func TestFailAfterTheEnd(t *testing.T) {
	a, far := loopback.TCPPair(t)
	b, further := loopback.TCPPair(t)
	far.Close()
	further.Close()
	r := relay{a: a, b: b}
	r.run(splice.NewReader(a), splice.NewReader(b), nil)
	failed := make(chan struct{})
	go func() { r.fail(errStopped); close(failed) }()
	if r.err != nil {
		t.Errorf("the relay ended with %v", r.err)
	}
	<-failed
	if r.err != nil {
		t.Errorf("the relay that had ended failed with %v", r.err)
	}
}
