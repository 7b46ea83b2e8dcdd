package netstack

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

func TestDialRefused(t *testing.T) {
	p := newPair(t)
	families(t, func(t *testing.T, at netip.Addr) {
		_, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(at, 9))
		wantErrno(t, err, syscall.ECONNREFUSED)
	})
}

func TestDialUnroutable(t *testing.T) {
	p := newPair(t)
	for _, to := range []string{"0.0.0.0:1", "[::]:1", "224.0.0.1:1", "255.255.255.255:1", "[ff02::1]:1"} {
		_, err := p.client.DialTCP(testContext(t), netip.MustParseAddrPort(to))
		wantErrno(t, err, syscall.ENETUNREACH)
	}
	_, err := p.client.DialTCP(testContext(t), netip.AddrPort{})
	wantErrno(t, err, syscall.ENETUNREACH)
	if err := p.client.SetAddresses([]netip.Addr{client4}); err != nil {
		t.Fatal(err)
	}
	_, err = p.client.DialTCP(testContext(t), netip.AddrPortFrom(server6, 9))
	wantErrno(t, err, syscall.ENETUNREACH)
	_, err = p.client.DialTCP(testContext(t), netip.AddrPortFrom(server4, 9))
	wantErrno(t, err, syscall.ECONNREFUSED)
}

func TestDialCancel(t *testing.T) {
	p := newPair(t)
	p.up.mu.Lock()
	p.up.cut = true
	p.up.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err := p.client.DialTCP(ctx, netip.AddrPortFrom(server4, 9))
	var op *net.OpError
	if !errors.Is(err, context.Canceled) || !errors.As(err, &op) {
		t.Errorf("%v", err)
	}
	_, err = p.client.DialTCP(ctx, netip.AddrPortFrom(server4, 9))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err = p.client.DialTCP(ctx, netip.AddrPortFrom(server4, 9))
	var ne net.Error
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("%v", err)
	}
	if n := len(p.client.st.RegisteredEndpoints()); n != 0 {
		t.Errorf("%d endpoints left", n)
	}
}

func TestPortRange(t *testing.T) {
	p := newPair(t)
	if err := p.client.SetPortRange(7000, 7003); err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][2]uint16{{0, 5}, {6, 5}} {
		if err := p.client.SetPortRange(bad[0], bad[1]); err == nil {
			t.Errorf("range %v accepted", bad)
		}
	}
	l, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 0))
	if err != nil {
		t.Fatal(err)
	}
	used := map[int]*Conn{}
	for range 4 {
		c, err := p.client.DialTCP(testContext(t), l.at)
		if err != nil {
			t.Fatal(err)
		}
		port := c.LocalAddr().(*net.TCPAddr).Port
		if port < 7000 || port > 7003 || used[port] != nil {
			t.Errorf("port %d", port)
		}
		used[port] = c
	}
	_, err = p.client.DialTCP(testContext(t), l.at)
	wantErrno(t, err, syscall.EADDRNOTAVAIL)
	// Another destination can be reached from the same ports.
	other, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.DialTCP(testContext(t), other.at); err != nil {
		t.Error(err)
	}
	// A port that is given back is used by the dial that waits for it.
	time.AfterFunc(50*time.Millisecond, func() { _ = used[7001].Abort() })
	c, err := p.client.DialTCP(testContext(t), l.at)
	if err != nil {
		t.Fatal(err)
	}
	if port := c.LocalAddr().(*net.TCPAddr).Port; port != 7001 {
		t.Errorf("port %d, want 7001", port)
	}
	for i := range 4 {
		u, err := p.client.ListenUDP(netip.AddrPort{})
		if err != nil {
			t.Fatalf("UDP socket %d: %v", i, err)
		}
		if port := u.at.Port(); port < 7000 || port > 7003 {
			t.Errorf("port %d", port)
		}
	}
	_, err = p.client.ListenUDP(netip.AddrPort{})
	wantErrno(t, err, syscall.EADDRNOTAVAIL)
}

// More short connections than there are ports, closed by the client first, go
// through; they only wait for TIME-WAIT to end.
func TestShortConnections(t *testing.T) {
	p := newPair(t)
	if err := p.client.SetPortRange(7000, 7099); err != nil {
		t.Fatal(err)
	}
	l, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 0))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = c.Read(make([]byte, 1))
				c.Close()
			}()
		}
	}()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				c, err := p.client.DialTCP(testContext(t), l.at)
				if err != nil {
					t.Error(err)
					return
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	l.Close()
}

func TestListenErrors(t *testing.T) {
	p := newPair(t)
	l, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 80))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.server.ListenTCP(netip.AddrPortFrom(server4, 80))
	wantErrno(t, err, syscall.EADDRINUSE)
	_, err = p.server.ListenTCP(netip.AddrPortFrom(world4, 80))
	wantErrno(t, err, syscall.EADDRNOTAVAIL)
	u, err := p.server.ListenUDP(netip.AddrPortFrom(server6, 80))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.server.ListenUDP(netip.AddrPortFrom(server6, 80))
	wantErrno(t, err, syscall.EADDRINUSE)
	_, err = p.server.ListenUDP(netip.AddrPortFrom(world4, 80))
	wantErrno(t, err, syscall.EADDRNOTAVAIL)

	accepted := make(chan error, 1)
	go func() { _, err := l.Accept(); accepted <- err }()
	time.Sleep(10 * time.Millisecond)
	l.Close()
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after Close: %v", err)
	}
	read := make(chan error, 1)
	go func() { _, _, err := u.ReadFromUDPAddrPort(make([]byte, 1)); read <- err }()
	time.Sleep(10 * time.Millisecond)
	u.Close()
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := u.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(client6, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	// The port is free again at once.
	if l, err = p.server.ListenTCP(netip.AddrPortFrom(server4, 80)); err != nil {
		t.Error(err)
	}
}

func TestListenAnyAddress(t *testing.T) {
	p := newPair(t)
	for _, at := range []netip.AddrPort{{}, netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("[::]:0")} {
		l, err := p.server.ListenTCP(at)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range []netip.Addr{server4, server6} {
			c, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(a, l.at.Port()))
			if err != nil {
				t.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if got := s.LocalAddr().(*net.TCPAddr).AddrPort(); got.Addr().Unmap() != a {
				t.Errorf("accepted at %v, want %v", got, a)
			}
			if got := s.RemoteAddr().String(); got != c.LocalAddr().String() {
				t.Errorf("from %v, want %v", got, c.LocalAddr())
			}
		}
		l.Close()
	}
}

func TestPacketConn(t *testing.T) {
	p := newPair(t)
	a, err := p.client.ListenUDP(netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.server.ListenUDP(netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	_ = a.SetDeadline(time.Now().Add(5 * time.Second))
	_ = b.SetDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 70000)
	for _, at := range []netip.Addr{server4, server6, netip.AddrFrom16(server4.As16())} {
		for _, n := range []int{0, 1, 1372, 1400, 20000, 65507} {
			want := make([]byte, n)
			(&pattern{at: uint64(n)}).fill(want)
			if k, err := a.WriteToUDPAddrPort(want, netip.AddrPortFrom(at, b.at.Port())); k != n || err != nil {
				t.Fatalf("%d, %v", k, err)
			}
			k, from, err := b.ReadFromUDPAddrPort(buf)
			if err != nil || string(buf[:k]) != string(want) {
				t.Fatalf("%d of %d bytes, %v", k, n, err)
			}
			if from.Addr() != client4 && from.Addr() != client6 || from.Port() != a.at.Port() {
				t.Errorf("from %v", from)
			}
		}
	}
	// A short buffer gets the beginning, and the rest is gone.
	_, _ = a.WriteToUDPAddrPort([]byte("long"), netip.AddrPortFrom(server4, b.at.Port()))
	_, _ = a.WriteToUDPAddrPort([]byte("next"), netip.AddrPortFrom(server4, b.at.Port()))
	if n, _, err := b.ReadFromUDPAddrPort(buf[:2]); err != nil || string(buf[:n]) != "lo" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if n, _, err := b.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != "next" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	_, err = a.WriteToUDPAddrPort(make([]byte, 65508), netip.AddrPortFrom(server4, 5))
	wantErrno(t, err, syscall.EMSGSIZE)
	_, err = a.WriteToUDPAddrPort(nil, netip.AddrPortFrom(server4, 0))
	wantErrno(t, err, syscall.EINVAL)
	one, err := p.client.ListenUDP(netip.AddrPortFrom(client4, 0))
	if err != nil {
		t.Fatal(err)
	}
	_, err = one.WriteToUDPAddrPort(nil, netip.AddrPortFrom(server6, 5))
	wantErrno(t, err, syscall.EAFNOSUPPORT)
}

// When the first range is used up the others serve, and the owner is told when
// they are used up too.
func TestPortRanges(t *testing.T) {
	told := make(chan struct{}, 100)
	p := newPair(t, func(c, _ *Config) { c.PortsUsedUp = func() { told <- struct{}{} } })
	for _, bad := range [][]PortRange{nil, {{7000, 7001}, {0, 5}}, {{7, 6}}} {
		if err := p.client.SetPortRanges(bad); err == nil {
			t.Errorf("ranges %v accepted", bad)
		}
	}
	if err := p.client.SetPortRanges([]PortRange{{7000, 7001}, {9000, 9000}, {8000, 8001}}); err != nil {
		t.Fatal(err)
	}
	l, err := p.server.ListenTCP(netip.AddrPortFrom(server4, 0))
	if err != nil {
		t.Fatal(err)
	}
	conns := make(map[uint16]*Conn)
	dial := func() {
		t.Helper()
		c, err := p.client.DialTCP(testContext(t), l.at)
		if err != nil {
			t.Fatal(err)
		}
		conns[c.LocalAddr().(*net.TCPAddr).AddrPort().Port()] = c
	}
	dial()
	dial()
	if conns[7000] == nil || conns[7001] == nil {
		t.Errorf("the first range was not used first: %v", conns)
	}
	for range 3 {
		dial()
	}
	for _, port := range []uint16{7000, 7001, 9000, 8000, 8001} {
		if conns[port] == nil {
			t.Errorf("port %d was not used", port)
		}
	}
	if len(told) != 0 {
		t.Error("told that ports are used up while there were some")
	}
	// The owner has until the dial's patience ends to get more.
	go func() {
		<-told
		err := p.client.SetPortRanges([]PortRange{{7000, 7001}, {9000, 9000}, {8000, 8001}, {6000, 6000}})
		if err != nil {
			t.Error(err)
		}
	}()
	dial()
	if conns[6000] == nil {
		t.Error("the new range was not used")
	}
	_, err = p.client.DialTCP(testContext(t), l.at)
	wantErrno(t, err, syscall.EADDRNOTAVAIL)
	if n := p.client.Stats().PortsUsedUp; n < 2 {
		t.Errorf("PortsUsedUp is %d", n)
	}
	if n := len(told); n > 3 {
		t.Errorf("told %d times within two seconds", n)
	}
	// Sockets have ports of their own, from the same ranges.
	for i := range 6 {
		if _, err := p.client.ListenUDP(netip.AddrPort{}); err != nil {
			t.Errorf("UDP socket %d: %v", i, err)
		}
	}
	_, err = p.client.ListenUDP(netip.AddrPort{})
	wantErrno(t, err, syscall.EADDRNOTAVAIL)
	// After a while the first range is the first again.
	_ = conns[7001].Abort()
	_ = conns[8001].Abort()
	time.Sleep(firstRangeAgain + 50*time.Millisecond)
	dial()
	if got := conns[7001].LocalAddr(); p.client.ports.at != 0 {
		t.Errorf("the stack draws from range %d, dialed from %v", p.client.ports.at, got)
	}
}
