package netstack

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// cup takes at most room bytes, and says so by an error.
type cup struct {
	bytes.Buffer
	room int
}

var errCupFull = errors.New("full")

func (c *cup) Write(p []byte) (int, error) {
	n, _ := c.Buffer.Write(p[:min(len(p), c.room)])
	if c.room -= n; n < len(p) {
		return n, errCupFull
	}
	return n, nil
}

// jug gives what it holds.
type jug struct {
	*bytes.Reader
	breaks bool // gives less than it has promised
}

func (j jug) Read(p []byte) (int, error) {
	if j.breaks {
		return 0, io.EOF
	}
	return j.Reader.Read(p)
}

// TestLend moves bytes through ReadTo and WriteFrom in pieces of every size, with
// writers that are full and sources that are empty in between.
func TestLend(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	const size = 3 << 20
	want := make([]byte, size)
	(&pattern{}).fill(want)
	sent := make(chan error, 1)
	go func() {
		random := rand.New(rand.NewPCG(1, 2))
		for rest := want; len(rest) > 0; {
			if err := c.WaitWritable(); err != nil {
				sent <- err
				return
			}
			n, err := c.WriteFrom(jug{Reader: bytes.NewReader(rest[:min(len(rest), random.IntN(200_000))])})
			if err != nil {
				sent <- err
				return
			}
			rest = rest[n:]
		}
		sent <- c.CloseWrite()
	}()
	var got []byte
	random := rand.New(rand.NewPCG(3, 4))
	for {
		if err := s.WaitReadable(); err != nil {
			t.Fatal(err)
		}
		in := cup{room: random.IntN(100_000)}
		n, err := s.ReadTo(&in)
		if n != in.Len() {
			t.Fatalf("ReadTo says %d bytes, the writer has %d", n, in.Len())
		}
		got = append(got, in.Bytes()...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrived, not the %d that were sent", len(got), size)
	}
}

// TestLendWithoutWaiting: ReadTo and WriteFrom return at once where there is
// nothing, no room or no use.
func TestLendWithoutWaiting(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	if n, err := s.ReadTo(io.Discard); n != 0 || err != nil {
		t.Errorf("ReadTo of an empty connection: %d, %v", n, err)
	}
	if n, err := c.WriteFrom(jug{Reader: bytes.NewReader(nil)}); n != 0 || err != nil {
		t.Errorf("WriteFrom of an empty source: %d, %v", n, err)
	}
	big := make([]byte, 1<<20)
	for total := 0; ; {
		n, err := c.WriteFrom(jug{Reader: bytes.NewReader(big)})
		if err != nil {
			t.Fatal(err)
		}
		if n > gsoMaxSize {
			t.Fatalf("%d bytes at once", n)
		}
		if total += n; n == 0 {
			break
		}
		if total > 64<<20 {
			t.Fatal("the send buffer never fills")
		}
	}
	full := c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	if full != nil {
		t.Fatal(full)
	}
	// It may be writable again for the part that the peer has taken meanwhile.
	for range 1000 {
		if err := c.WaitWritable(); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("waiting for room: %v", err)
			}
			break
		}
		if _, err := c.WriteFrom(jug{Reader: bytes.NewReader(big)}); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
}

// TestLendBroken: a source that doesn't keep its promise and a connection that is
// reset are errors, not silence.
func TestLendBroken(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	if n, err := c.WriteFrom(jug{Reader: bytes.NewReader(make([]byte, 5000)), breaks: true}); n != 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a source that breaks its promise: %d, %v", n, err)
	}
	if err := c.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := s.WaitReadable(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadTo(io.Discard); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("ReadTo after a reset: %v", err)
	}
	if _, err := s.WriteFrom(jug{Reader: bytes.NewReader([]byte("x"))}); err == nil {
		t.Error("WriteFrom after a reset succeeds")
	}
	if err := c.WaitWritable(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("WaitWritable after Abort: %v", err)
	}
	if _, err := c.WriteFrom(jug{Reader: bytes.NewReader([]byte("x"))}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("WriteFrom after Abort: %v", err)
	}
	if _, err := c.ReadTo(io.Discard); !errors.Is(err, net.ErrClosed) {
		t.Errorf("ReadTo after Abort: %v", err)
	}
}

// TestChunk: writes of any size leave as super-segments of full segments.
func TestChunk(t *testing.T) {
	families(t, func(t *testing.T, at netip.Addr) {
		n := chunk(1400, at)
		mss := 1348
		if !at.Is4() {
			mss = 1328
		}
		if n%mss != 0 || n < 40*mss || n > gsoMaxSize-161 {
			t.Errorf("chunks of %d bytes, segments of %d", n, mss)
		}
	})
	if n := chunk(65535, server4); n < 65000 {
		t.Errorf("chunks of %d bytes where one segment holds more", n)
	}
}
