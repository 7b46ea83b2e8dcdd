package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

func TestEgressTCPEcho(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(at, func(t *testing.T) {
			r := newEgressRig(t)
			ln, to := egressListenTCP(t, at)
			c := r.dial(to)
			h := egressAccept(t, ln)
			if _, err := c.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4)
			if _, err := io.ReadFull(h, got); err != nil || string(got) != "ping" {
				t.Fatalf("host got %q, %v", got, err)
			}
			if _, err := h.Write([]byte("pong")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "pong" {
				t.Fatalf("client got %q, %v", got, err)
			}
			egressUntil(t, "the counters", func() bool { return r.e.Stats().TCPBytesDown == 4 })
			if st := r.e.Stats(); st.FlowsTCP != 1 || st.TCPOpened != 1 || st.TCPBytesUp != 4 || st.TCPBytesDown != 4 || st.Dials != 0 {
				t.Errorf("stats: %+v", st)
			}
			h.Close()
			c.Close()
			egressUntil(t, "the flow to end", func() bool { return r.e.Stats().Flows == 0 })
			if n := r.e.Stats().TCPReset; n != 0 {
				t.Errorf("%d resets", n)
			}
		})
	}
}

// TestEgressTCPBulk sends much both ways at once, byte-exact.
func TestEgressTCPBulk(t *testing.T) {
	r := newEgressRig(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	c := r.dial(to)
	h := egressAccept(t, ln)
	const size = 8 << 20
	var wg sync.WaitGroup
	send := func(w interface {
		io.Writer
		CloseWrite() error
	}, seed byte,
	) {
		defer wg.Done()
		if _, err := io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)); err != nil {
			t.Error(err)
		}
		if err := w.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	check := func(in io.Reader, seed byte) {
		defer wg.Done()
		got, want := sha256.New(), sha256.New()
		n, err := io.Copy(got, in)
		if err != nil || n != size {
			t.Errorf("read %d bytes: %v", n, err)
		}
		if _, err := io.Copy(want, io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			t.Error("other bytes have arrived")
		}
	}
	wg.Add(4)
	go send(c, 1)
	go check(h, 1)
	go send(h, 2)
	go check(c, 2)
	wg.Wait()
}

// TestEgressTCPHalfClose ends one direction and goes on with the other.
func TestEgressTCPHalfClose(t *testing.T) {
	type end interface {
		net.Conn
		CloseWrite() error
	}
	for _, clientFirst := range []bool{true, false} {
		t.Run(fmt.Sprint("client first ", clientFirst), func(t *testing.T) {
			r := newEgressRig(t)
			ln, to := egressListenTCP(t, "127.0.0.1:0")
			c := r.dial(to)
			h := egressAccept(t, ln)
			var first, second end = c, h
			if !clientFirst {
				first, second = h, c
			}
			if _, err := first.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			if err := first.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(second); err != nil || string(got) != "question" {
				t.Fatalf("read %q, %v", got, err)
			}
			if r.e.Stats().Flows != 1 {
				t.Error("the flow is gone while half of it is open")
			}
			if _, err := second.Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			second.Close()
			if got, err := io.ReadAll(first); err != nil || string(got) != "answer" {
				t.Fatalf("read %q, %v", got, err)
			}
			egressUntil(t, "the flow to end", func() bool { return r.e.Stats().Flows == 0 })
			if n := r.e.Stats().TCPReset; n != 0 {
				t.Errorf("%d resets", n)
			}
		})
	}
}

func TestEgressTCPReset(t *testing.T) {
	t.Run("by host", func(t *testing.T) {
		r := newEgressRig(t)
		ln, to := egressListenTCP(t, "127.0.0.1:0")
		c := r.dial(to)
		h := egressAccept(t, ln)
		egressReset(h)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client reads %v, want a reset", err)
		}
		egressUntil(t, "the flow to end", func() bool { return r.e.Stats().Flows == 0 })
		if n := r.e.Stats().TCPReset; n != 1 {
			t.Errorf("%d resets counted", n)
		}
	})
	t.Run("by client", func(t *testing.T) {
		r := newEgressRig(t)
		ln, to := egressListenTCP(t, "127.0.0.1:0")
		c := r.dial(to)
		h := egressAccept(t, ln)
		if err := c.Abort(); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("host reads %v, want a reset", err)
		}
		egressUntil(t, "the flow to end", func() bool { return r.e.Stats().Flows == 0 })
	})
}

func TestEgressTCPRefused(t *testing.T) {
	r := newEgressRig(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	ln.Close()
	if _, err := r.client.DialTCP(r.ctx(), to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
	if _, err := r.client.DialTCP(r.ctx(), netip.AddrPortFrom(egressGate4, 80)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("closed port of the gateway: %v", err)
	}
	if st := r.e.Stats(); st.TCPRefused != 1 || st.DropForbidden != 1 {
		t.Errorf("stats: %+v", st)
	}
	// The client hears of it before its flow is given back.
	egressUntil(t, "the flow to be given back", func() bool { return r.e.Stats().Flows == 0 })
}

func TestEgressTCPForbidden(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) { c.AllowLocal = false })
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	for _, to := range []netip.AddrPort{
		to,
		netip.MustParseAddrPort("169.254.169.254:80"),
		netip.AddrPortFrom(egressOther4, 80),
		netip.AddrPortFrom(netip.MustParseAddr("0.0.0.1"), to.Port()),
		netip.MustParseAddrPort("[::1]:80"),
	} {
		if _, err := r.client.DialTCP(r.ctx(), to); !errors.Is(err, syscall.EACCES) {
			t.Errorf("%s: %v, want a refusal by rule", to, err)
		}
	}
	if err := ln.SetDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if c, err := ln.Accept(); err == nil {
		t.Errorf("connection from %s has come through", c.RemoteAddr())
	}
	if st := r.e.Stats(); st.DropForbidden != 5 || st.TCPOpened != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestEgressTCPFlowLimit(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) { c.MaxFlowsPerClient = 2 })
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	r.dial(to)
	c := r.dial(to)
	if _, err := r.client.DialTCP(r.ctx(), to); !errors.Is(err, syscall.EACCES) {
		t.Errorf("third connection: %v, want a refusal by rule", err)
	}
	if n := r.e.Stats().DropClientFull; n != 1 {
		t.Errorf("%d flows counted as above the client's limit", n)
	}
	egressAccept(t, ln)
	h := egressAccept(t, ln)
	c.Close()
	h.Close()
	egressUntil(t, "one flow to end", func() bool { return r.e.Stats().Flows == 1 })
	r.dial(to)
}

func TestEgressDrain(t *testing.T) {
	r := newEgressRig(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	c := r.dial(to)
	h := egressAccept(t, ln)
	r.e.Drain()
	ctx, cancel := context.WithTimeout(r.ctx(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.client.DialTCP(ctx, to); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("new connection while draining: %v, want silence", err)
	}
	if n := r.e.Stats().DropDraining; n == 0 {
		t.Error("not counted")
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(h, make([]byte, 1)); err != nil {
		t.Errorf("the old connection: %v", err)
	}
}

// TestEgressCloseClient ends the flows of one client.
func TestEgressCloseClient(t *testing.T) {
	r := newEgressRig(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	c := r.dial(to)
	h := egressAccept(t, ln)
	r.e.CloseClient(8)
	if n := r.e.Stats().Flows; n != 1 {
		t.Fatalf("%d flows after another client was closed", n)
	}
	r.e.CloseClient(7)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client reads %v", err)
	}
	if _, err := h.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("host reads %v", err)
	}
	egressUntil(t, "the flow to end", func() bool { return r.e.Stats().Flows == 0 })
}

// TestEgressTCPIdle ends a connection that nobody has used for TCPTimeout, and
// not one that was used.
func TestEgressTCPIdle(t *testing.T) {
	r := newEgressRig(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	var exchanged uint64
	exchange := func(c *netstack.Conn, h *net.TCPConn) {
		t.Helper()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(h, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		exchanged++
		egressUntil(t, "the byte to be counted", func() bool { return r.e.Stats().TCPBytesUp == exchanged })
	}
	idle := r.dial(to)
	exchange(idle, egressAccept(t, ln))
	used := r.dial(to)
	h := egressAccept(t, ln)
	r.ahead.Store(int64(defaultTCPTimeout - time.Minute))
	exchange(used, h)
	r.e.expire(time.Now().Add(defaultTCPTimeout + time.Minute))
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("idle connection reads %v", err)
	}
	egressUntil(t, "one flow to end", func() bool { return r.e.Stats().Flows == 1 })
	if n := r.e.Stats().TCPExpired; n != 1 {
		t.Errorf("%d expired", n)
	}
	if _, err := used.Write([]byte("y")); err != nil {
		t.Error(err)
	}
}

func TestDialError(t *testing.T) {
	e := &sockets{}
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	wrap := func(err error) error { return &net.OpError{Op: "dial", Err: err} }
	for _, c := range []struct {
		to        netip.Addr
		err, want error
	}{
		{v4, wrap(syscall.ECONNREFUSED), syscall.ECONNREFUSED},
		{v4, wrap(syscall.ENETUNREACH), syscall.ENETUNREACH},
		{v4, wrap(syscall.EHOSTUNREACH), syscall.EHOSTUNREACH},
		{v4, wrap(syscall.EACCES), syscall.EACCES},
		{v4, wrap(syscall.EPERM), syscall.EACCES},
		{v4, wrap(syscall.ETIMEDOUT), syscall.ETIMEDOUT},
		{v4, wrap(context.DeadlineExceeded), syscall.ETIMEDOUT},
		{v4, wrap(context.Canceled), syscall.ETIMEDOUT},
		{v4, wrap(syscall.EADDRNOTAVAIL), syscall.ETIMEDOUT},
		{v6, wrap(syscall.EADDRNOTAVAIL), syscall.ENETUNREACH},
		{v4, wrap(syscall.EMFILE), syscall.ETIMEDOUT},
		{v4, wrap(syscall.EINVAL), syscall.EHOSTUNREACH},
	} {
		if got := e.dialError(c.to, c.err); !errors.Is(got, c.want) {
			t.Errorf("%s: %v: client is told %v, want %v", c.to, c.err, got, c.want)
		}
	}
}
