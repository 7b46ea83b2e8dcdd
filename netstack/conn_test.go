package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// families runs f with an address of the server of each family.
func families(t *testing.T, f func(t *testing.T, at netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { f(t, server4) })
	t.Run("IPv6", func(t *testing.T) { f(t, server6) })
}

func wantErrno(t *testing.T, err error, want syscall.Errno) {
	t.Helper()
	var op *net.OpError
	if !errors.As(err, &op) || !errors.Is(err, want) {
		t.Errorf("error %v (%T), want a *net.OpError with %v", err, err, want)
	}
}

func TestTransfer(t *testing.T) {
	families(t, func(t *testing.T, at netip.Addr) {
		p := newPair(t)
		c, s := p.connect(t, at)
		transfer(t, c, s, 4<<20)
		c.Close()
		s.Close()
		if st := p.server.Stats(); st.Delivered*4 > st.PacketsIn {
			t.Errorf("%d packets in made %d deliveries: joining doesn't work", st.PacketsIn, st.Delivered)
		}
		if st := p.client.Stats(); st.Batches*4 > st.PacketsOut {
			t.Errorf("%d packets out in %d batches", st.PacketsOut, st.Batches)
		}
	})
}

func TestTransferMTU(t *testing.T) {
	for _, mtu := range []int{1280, 1500, 9000, 65535} {
		p := newPair(t, withMTU(mtu))
		c, s := p.connect(t, server4)
		transfer(t, c, s, 1<<20)
		c.Close()
		s.Close()
		p.close()
	}
}

func TestTransferBadWeather(t *testing.T) {
	families(t, func(t *testing.T, at netip.Addr) {
		p := newPair(t)
		c, s := p.connect(t, at)
		p.up.set(weather{loss: 0.01, dup: 0.02, reorder: 0.02})
		p.down.set(weather{loss: 0.01, dup: 0.02, reorder: 0.02})
		transfer(t, c, s, 512<<10)
		c.Close()
		s.Close()
	})
}

func TestHalfClose(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(s); err != nil || string(b) != "question" {
		t.Fatalf("%q, %v", b, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if _, err := s.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	_ = s.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "answer" {
		t.Fatalf("%q, %v", b, err)
	}
	for range 2 { // the end stays the end
		if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%d, %v", n, err)
		}
	}
}

// A reset is never the end of the stream, however often and in whatever order
// it is asked about.
func TestResetIsNotEOF(t *testing.T) {
	for name, reset := range map[string]func(*Conn){
		"abort":             func(s *Conn) { _ = s.Abort() },
		"close with unread": func(s *Conn) { _ = waitReadable(s); _ = s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			for _, first := range []string{"read", "write", "blocked"} {
				c, s := p.connect(t, server4)
				_, _ = c.Write([]byte("never read"))
				blocked := make(chan error, 1)
				if first == "blocked" {
					go func() { _, err := c.Read(make([]byte, 10)); blocked <- err }()
				}
				reset(s)
				if err := waitReadable(c); err != nil {
					t.Fatal(err)
				}
				if first == "write" {
					_, err := c.Write([]byte("x"))
					wantErrno(t, err, syscall.ECONNRESET)
				}
				if first == "blocked" {
					wantErrno(t, <-blocked, syscall.ECONNRESET)
				}
				for range 3 {
					_, err := c.Read(make([]byte, 10))
					wantErrno(t, err, syscall.ECONNRESET)
				}
				_, err := c.Write([]byte("x"))
				wantErrno(t, err, syscall.ECONNRESET)
				c.Close()
			}
		})
	}
}

func waitReadable(c *Conn) error { return c.WaitReadable() }

// What arrived before a reset can still be read.
func TestReadBeforeReset(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	_, _ = s.Write([]byte("last words"))
	if err := c.WaitReadable(); err != nil {
		t.Fatal(err)
	}
	_ = s.Abort()
	for p.client.Stats().TCPResetsIn == 0 {
		time.Sleep(time.Millisecond)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "last words" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	_, err = c.Read(b)
	wantErrno(t, err, syscall.ECONNRESET)
}

func TestLocalAbort(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	_, _ = s.Write([]byte("unread"))
	_ = c.WaitReadable()
	read := make(chan error, 1)
	go func() {
		for {
			if _, err := s.Read(make([]byte, 10)); err != nil {
				read <- err
				return
			}
		}
	}()
	if err := c.Abort(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Read(make([]byte, 10)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Abort: %v", err)
		}
		if _, err := c.Write(make([]byte, 10)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after Abort: %v", err)
		}
	}
	wantErrno(t, <-read, syscall.ECONNRESET)
}

// Closing a connection wakes those who wait on it, with net.ErrClosed.
func TestCloseWakes(t *testing.T) {
	for name, end := range map[string]func(*Conn) error{"close": (*Conn).Close, "abort": (*Conn).Abort} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			c, _ := p.connect(t, server4)
			var wg sync.WaitGroup
			for _, wait := range []func() error{
				func() error { _, err := c.Read(make([]byte, 1)); return err },
				func() error { _, err := c.Read(make([]byte, 1)); return err },
				c.WaitReadable,
				func() error { // nobody reads: the buffers fill up
					_, err := io.Copy(struct{ io.Writer }{c}, &pattern{bytes: 1 << 30})
					return err
				},
			} {
				wg.Go(func() {
					if err := wait(); !errors.Is(err, net.ErrClosed) {
						t.Errorf("%v, want net.ErrClosed", err)
					}
				})
			}
			time.Sleep(20 * time.Millisecond)
			if err := end(c); err != nil {
				t.Error(err)
			}
			wg.Wait()
			if err := c.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

func TestCloseRead(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	woken := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); woken <- err }()
	if err := c.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if err := <-woken; !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	if _, err := c.Write([]byte("still")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 10)
	if n, err := s.Read(b); err != nil || string(b[:n]) != "still" {
		t.Errorf("%q, %v", b[:n], err)
	}
}

func TestDeadlines(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	wantTimeout := func(err error) {
		t.Helper()
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%v, want a deadline's error", err)
		}
	}
	read := func() error { _, err := c.Read(make([]byte, 10)); return err }

	_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	wantTimeout(read())
	wantTimeout(c.WaitReadable())
	_, _ = s.Write([]byte("x"))
	_ = c.SetReadDeadline(time.Time{})
	if err := read(); err != nil {
		t.Errorf("after the deadline was lifted: %v", err)
	}
	// A deadline set while a read waits counts for it.
	blocked := make(chan error, 1)
	go func() { blocked <- read() }()
	time.Sleep(10 * time.Millisecond)
	_ = c.SetReadDeadline(time.Unix(1, 0))
	wantTimeout(<-blocked)
	// One that is moved does not fire at its old time.
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	time.AfterFunc(50*time.Millisecond, func() { _, _ = s.Write([]byte("y")) })
	if err := read(); err != nil {
		t.Errorf("after the deadline was moved: %v", err)
	}
	// A write that fills the buffers, with the count of what went in.
	_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	total := 0
	for {
		n, err := c.Write(make([]byte, 1<<20))
		total += n
		if err != nil {
			wantTimeout(err)
			break
		}
	}
	_ = s.SetReadDeadline(time.Now().Add(time.Second))
	_ = c.SetWriteDeadline(time.Time{})
	_ = c.CloseWrite()
	if n, err := io.Copy(io.Discard, struct{ io.Reader }{s}); err != nil || int(n) != total {
		t.Errorf("%d bytes arrived, %d were written: %v", n, total, err)
	}
}

func TestWaitReadable(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	done := make(chan error, 1)
	go func() { done <- c.WaitReadable() }()
	select {
	case err := <-done:
		t.Fatalf("returned early: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	_, _ = s.Write([]byte("x"))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, _ = c.Read(b)
	_ = s.CloseWrite()
	if err := c.WaitReadable(); err != nil { // io.EOF is something to read
		t.Fatal(err)
	}
	if _, err := c.Read(b); !errors.Is(err, io.EOF) {
		t.Errorf("%v", err)
	}
}

// Bytes written before Close arrive, and then the end.
func TestCloseDelivers(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	const n = 500_000
	if _, err := io.Copy(struct{ io.Writer }{c}, &pattern{bytes: n}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	checkPattern(t, s, n)
}

func TestAddrs(t *testing.T) {
	families(t, func(t *testing.T, at netip.Addr) {
		p := newPair(t)
		c, s := p.connect(t, at)
		if c.LocalAddr().String() != s.RemoteAddr().String() || c.RemoteAddr().String() != s.LocalAddr().String() {
			t.Errorf("client %v - %v, server %v - %v", c.LocalAddr(), c.RemoteAddr(), s.LocalAddr(), s.RemoteAddr())
		}
		if a := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); a.Unmap() != at {
			t.Errorf("connected to %v, want %v", a, at)
		}
	})
}

// A deadline's timer that fires while the deadline is being replaced has no
// effect.
func TestStaleTimer(t *testing.T) {
	var g gate
	g.init()
	g.setDeadline(time.Now().Add(time.Millisecond))
	g.mu.Lock()
	time.Sleep(20 * time.Millisecond) // it has fired and waits for the lock
	g.timer = nil
	g.mu.Unlock()
	g.setDeadline(time.Now().Add(time.Hour))
	defer g.stop()
	time.Sleep(20 * time.Millisecond)
	if g.isExpired() {
		t.Error("expired")
	}
}

// gVisor tells the reason of a reset once; when a concurrent call has taken it
// and not yet noted it, a read must still not take the rest for the end.
func TestResetReasonTaken(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	_ = s.Abort()
	if err := c.WaitReadable(); err != nil {
		t.Fatal(err)
	}
	c.ep.LastError()
	_, err := c.Read(make([]byte, 1))
	wantErrno(t, err, syscall.ECONNRESET)
}
