package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"
)

// deafListener is an address of the host that completes no more handshakes:
// its backlog is full, which Linux answers with silence.
func deafListener(t testing.TB) netip.AddrPort {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(loopback4, uint16(sa.(*syscall.SockaddrInet4).Port))
	c, err := net.Dial("tcp", at.String()) // a backlog of 0 takes one
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return at
}

// TestEgressTCPDialLimit has one client with dead targets up to its limit of
// half-open connections; a live one waits for the client's next SYN, another
// client's doesn't.
func TestEgressTCPDialLimit(t *testing.T) {
	dead := deafListener(t)
	r := newEgressRig(t, func(c *socketsConfig) {
		c.MaxDialsPerClient = 2
		c.DialTimeout = 500 * time.Millisecond
	})
	ctx, cancel := context.WithCancel(r.ctx())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if _, err := r.client.DialTCP(ctx, dead); err == nil {
				t.Error("connected to a deaf address")
			}
		})
	}
	egressUntil(t, "two dials", func() bool { return r.e.Stats().Dials == 2 })
	cancel() // the client gives up, so its SYNs don't come again with the next one's
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	c := r.dial(to) // its first SYN is dropped, a later one finds room
	h := egressAccept(t, ln)
	st := r.e.Stats()
	if st.DropDialsFull == 0 {
		t.Error("no dial was above the limit")
	}
	if st.TCPTimedOut == 0 {
		t.Error("no dial has timed out, so there was no limit")
	}
	c.Close()
	h.Close()
	cancel()
	wg.Wait()
	egressUntil(t, "all flows to end", func() bool { return r.e.Stats().Flows == 0 })
}

// TestEgressShutdown ends Run with connections, dials and mappings under way;
// the rig's close does the checking.
func TestEgressShutdown(t *testing.T) {
	r := newEgressRig(t)
	dead := deafListener(t)
	ln, to := egressListenTCP(t, "127.0.0.1:0")
	c := r.dial(to)
	egressAccept(t, ln)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = r.client.DialTCP(ctx, dead) })
	egressUntil(t, "a dial", func() bool { return r.e.Stats().Dials == 1 })
	r.cancel()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client reads %v", err)
	}
	cancel()
	wg.Wait()
}
