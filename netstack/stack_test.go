package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/faketime"
	"gvisor.dev/gvisor/pkg/waiter"
)

func TestConfigValidate(t *testing.T) {
	good := Config{MTU: 1400, Output: func([][]byte) {}}
	for name, spoil := range map[string]func(*Config){
		"small MTU":         func(c *Config) { c.MTU = 1279 },
		"large MTU":         func(c *Config) { c.MTU = 65536 },
		"negative headroom": func(c *Config) { c.Headroom = -1 },
		"negative tailroom": func(c *Config) { c.Tailroom = -1 },
		"no output":         func(c *Config) { c.Output = nil },
	} {
		c := good
		spoil(&c)
		if s, err := New(c); err == nil {
			s.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

// Close ends everything that waits, in every way of waiting.
func TestStackClose(t *testing.T) {
	p := newPair(t, withForward())
	inHandler := make(chan struct{})
	p.server.ForwardTCP(10, func(r *TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		close(inHandler)
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{c})
	})
	f, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(world4, 80))
	if err != nil {
		t.Fatal(err)
	}
	<-inHandler
	c, s := p.connect(t, server4)
	l, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 80))
	if err != nil {
		t.Fatal(err)
	}
	u, err := p.server.ListenUDP(netip.AddrPortFrom(server4, 80))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := s.Read(make([]byte, 1))
		wantErrno(t, err, syscall.ECONNABORTED)
	})
	wg.Go(func() {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept: %v", err)
		}
	})
	wg.Go(func() {
		if _, _, err := u.ReadFromUDPAddrPort(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v", err)
		}
	})
	for _, c := range []*Conn{c, f} { // the peers learn of it
		wg.Go(func() {
			_, err := c.Read(make([]byte, 1))
			wantErrno(t, err, syscall.ECONNRESET)
		})
	}
	time.Sleep(20 * time.Millisecond)
	for range 2 {
		if err := p.server.Close(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if _, err := p.server.ListenTCP(netip.AddrPort{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen: %v", err)
	}
	if _, err := p.server.ListenUDP(netip.AddrPort{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen: %v", err)
	}
	if _, err := p.server.DialTCP(testContext(t), netip.AddrPortFrom(client4, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v", err)
	}
	if err := p.server.SetAddresses(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("addresses: %v", err)
	}
	before := p.server.Stats().DropClosed
	p.server.Input([][]byte{echoRequest(client4, server4)})
	if p.server.Stats().DropClosed != before+1 {
		t.Error("a packet after Close was not counted as dropped")
	}
}

// Close doesn't wait for a handshake that nobody completes.
func TestStackCloseDuringAccept(t *testing.T) {
	p := newPair(t, withForward())
	p.down.mu.Lock()
	p.down.cut = true
	p.down.mu.Unlock()
	accepting := make(chan struct{})
	failed := make(chan error, 1)
	p.server.ForwardTCP(10, func(r *TCPRequest) {
		close(accepting)
		_, err := r.Accept()
		failed <- err
	})
	ctx := testContext(t)
	go func() { _, _ = p.client.DialTCP(ctx, netip.AddrPortFrom(world4, 80)) }()
	<-accepting
	p.server.Close()
	if err := <-failed; err == nil {
		t.Error("accepted")
	}
	p.client.Close()
}

// An endpoint that is made while Close is already at work is ended too.
func TestStackCloseLateEndpoint(t *testing.T) {
	p := newPair(t, withForward())
	p.down.mu.Lock()
	p.down.cut = true
	p.down.mu.Unlock()
	failed := make(chan tcpip.Error, 1)
	closed := make(chan struct{})
	p.server.ForwardTCP(10, func(r *TCPRequest) {
		go func() {
			p.server.Close()
			close(closed)
		}()
		time.Sleep(50 * time.Millisecond) // Close has aborted what there was
		_, err := r.gvisor.CreateEndpoint(new(waiter.Queue))
		failed <- err
	})
	p.server.Input([][]byte{tcpPacket(tcpSpec{v4: true, ttl: 64, flags: flagSYN, sport: 1})})
	if err := <-failed; err == nil {
		t.Error("connected")
	}
	<-closed
}

func TestSetAddresses(t *testing.T) {
	p := newPair(t)
	c4, s4 := p.connect(t, server4)
	c6, s6 := p.connect(t, server6)
	other := netip.MustParseAddr("100.64.0.8")
	for range 2 {
		if err := p.client.SetAddresses([]netip.Addr{other, client6, client6}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := c4.Read(make([]byte, 1))
	wantErrno(t, err, syscall.ECONNABORTED)
	_, err = s4.Read(make([]byte, 1))
	wantErrno(t, err, syscall.ECONNRESET)
	transfer(t, c6, s6, 100_000)

	c, s := p.connect(t, server4)
	if a := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); a != other {
		t.Errorf("connected from %v, want %v", a, other)
	}
	transfer(t, c, s, 100_000)
	for _, bad := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.MustParseAddr("224.0.0.1")} {
		if err := p.client.SetAddresses([]netip.Addr{bad}); err == nil {
			t.Errorf("%v accepted", bad)
		}
	}
}

// The promise: a connection outlives a tunnel that is dead for hours, and moves
// on soon after it has come back.
func TestOutage(t *testing.T) {
	clock := faketime.NewManualClock()
	p := newPair(t, func(c, s *Config) { c.Clock, s.Clock = clock, clock })
	c, s := p.connect(t, server4)
	idle, idlePeer := p.connect(t, server4)
	_ = c.SetDeadline(time.Time{})
	cut := func(b bool) {
		for _, y := range []*way{p.up, p.down} {
			y.mu.Lock()
			y.cut = b
			y.mu.Unlock()
		}
	}
	cut(true)
	_, _ = c.Write([]byte("into the dark"))
	for range 8 * 60 * 4 {
		clock.Advance(15 * time.Second)
	}
	if st := p.client.Stats(); st.TCPRetransmits < 100 || st.TCPTimeouts != 0 {
		t.Fatalf("%d retransmits, %d timeouts", st.TCPRetransmits, st.TCPTimeouts)
	}
	cut(false)
	go func() {
		// Within one interval, in small steps because acknowledgements need
		// real time to travel.
		clock.Advance(maxRTO)
	}()
	b := make([]byte, 100)
	n, err := s.Read(b)
	if err != nil || string(b[:n]) != "into the dark" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if _, err := idle.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if n, err := idlePeer.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Fatalf("%q, %v", b[:n], err)
	}
}

// A closed connection whose peer is gone does not stay for ever.
func TestOrphan(t *testing.T) {
	clock := faketime.NewManualClock()
	p := newPair(t, func(c, s *Config) { c.Clock, s.Clock = clock, clock })
	c, _ := p.connect(t, server4)
	p.up.mu.Lock()
	p.up.cut = true
	p.up.mu.Unlock()
	_, _ = c.Write([]byte("lost"))
	c.Close()
	if n := len(p.client.st.RegisteredEndpoints()); n != 1 {
		t.Fatalf("%d endpoints", n)
	}
	for range 10 {
		clock.Advance(time.Minute)
	}
	if n := len(p.client.st.RegisteredEndpoints()); n != 1 {
		t.Errorf("%d endpoints after 10 minutes", n)
	}
	for range 8 {
		clock.Advance(time.Minute)
	}
	if n := len(p.client.st.RegisteredEndpoints()); n != 0 {
		t.Errorf("%d endpoints after 18 minutes", n)
	}
}

// When the patience has an end, every call says so.
func TestTimeout(t *testing.T) {
	clock := faketime.NewManualClock()
	p := newPair(t, func(c, s *Config) { c.Clock, s.Clock = clock, clock })
	c, _ := p.connect(t, server4)
	_ = c.SetDeadline(time.Time{})
	p.up.mu.Lock()
	p.up.cut = true
	p.up.mu.Unlock()
	_, _ = c.Write([]byte("lost"))
	for range 14 * 60 {
		clock.Advance(time.Minute)
	}
	for range 3 {
		_, err := c.Read(make([]byte, 1))
		wantErrno(t, err, syscall.ETIMEDOUT)
		_, err = c.Write(make([]byte, 1))
		wantErrno(t, err, syscall.ETIMEDOUT)
	}
}
