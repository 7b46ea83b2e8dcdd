package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	loop4 = netip.MustParseAddr("127.0.0.1")
	loop6 = netip.MustParseAddr("::1")
)

// worlds runs f with destinations that are none of the server's own addresses.
func worlds(t *testing.T, f func(t *testing.T, to netip.AddrPort)) {
	for _, a := range []netip.Addr{world4, world6, loop4, loop6, netip.MustParseAddr("127.8.9.10")} {
		t.Run(a.String(), func(t *testing.T) { f(t, netip.AddrPortFrom(a, 443)) })
	}
}

func TestForwardTCP(t *testing.T) {
	worlds(t, func(t *testing.T, to netip.AddrPort) {
		p := newPair(t, withForward())
		var early atomic.Bool
		p.server.ForwardTCP(10, func(r *TCPRequest) {
			if r.Destination() != to {
				t.Errorf("destination %v, want %v", r.Destination(), to)
			}
			// Dial first: the client's dial must not end before Accept.
			time.Sleep(20 * time.Millisecond)
			early.Store(true)
			c, err := r.Accept()
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			defer c.Close()
			if c.RemoteAddr().String() != r.Source().String() || c.LocalAddr().String() != to.String() {
				t.Errorf("%v - %v", c.LocalAddr(), c.RemoteAddr())
			}
			if _, err := io.Copy(struct{ io.Writer }{c}, c); err != nil {
				t.Errorf("echo: %v", err)
			}
		})
		c, err := p.client.DialTCP(testContext(t), to)
		if err != nil {
			t.Fatal(err)
		}
		if !early.Load() {
			t.Error("connected before Accept")
		}
		go func() {
			_, _ = io.Copy(struct{ io.Writer }{c}, &pattern{bytes: 300_000})
			_ = c.CloseWrite()
		}()
		checkPattern(t, c, 300_000)
		c.Close()
	})
}

func TestReject(t *testing.T) {
	for _, tt := range []struct {
		name   string
		reject error
		want   syscall.Errno
	}{
		{"refused", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, syscall.ECONNREFUSED},
		{"host", syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{"net", syscall.ENETUNREACH, syscall.ENETUNREACH},
		{"rule", syscall.EACCES, syscall.EACCES},
		{"permission", syscall.EPERM, syscall.EACCES},
		{"other", errors.New("who knows"), syscall.ECONNREFUSED},
		{"name", &net.DNSError{Err: "no such host", IsNotFound: true}, syscall.ECONNREFUSED},
	} {
		t.Run(tt.name, func(t *testing.T) {
			worlds(t, func(t *testing.T, to netip.AddrPort) {
				p := newPair(t, withForward())
				p.server.ForwardTCP(10, func(r *TCPRequest) { r.Reject(tt.reject) })
				for range 2 {
					c, err := p.client.DialTCP(testContext(t), to)
					if err == nil {
						c.Close()
						t.Fatal("connected")
					}
					wantErrno(t, err, tt.want)
				}
			})
		})
	}
}

// A request that is answered with silence leaves the client trying.
func TestRejectSilently(t *testing.T) {
	for name, end := range map[string]func(*TCPRequest){
		"nil":      func(r *TCPRequest) { r.Reject(nil) },
		"timeout":  func(r *TCPRequest) { r.Reject(syscall.ETIMEDOUT) },
		"deadline": func(r *TCPRequest) { r.Reject(context.DeadlineExceeded) },
		"return":   func(*TCPRequest) {},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, withForward())
			called := make(chan struct{}, 1)
			p.server.ForwardTCP(10, func(r *TCPRequest) { end(r); called <- struct{}{} })
			ctx, cancel := context.WithCancel(testContext(t))
			go func() {
				<-called
				time.Sleep(20 * time.Millisecond)
				cancel()
			}()
			_, err := p.client.DialTCP(ctx, netip.AddrPortFrom(world4, 80))
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%v, want canceled", err)
			}
			if n := p.server.Stats().TCPResetsOut; n != 0 {
				t.Errorf("%d resets", n)
			}
		})
	}
}

func TestRequestTwice(t *testing.T) {
	p := newPair(t, withForward())
	done := make(chan struct{})
	p.server.ForwardTCP(10, func(r *TCPRequest) {
		defer close(done)
		r.Reject(syscall.ECONNREFUSED)
		r.Reject(syscall.EHOSTUNREACH)
		if _, err := r.Accept(); err == nil {
			t.Error("accepted a rejected request")
		}
	})
	_, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(world4, 80))
	wantErrno(t, err, syscall.ECONNREFUSED)
	<-done
}

func TestForwardTCPMaxInFlight(t *testing.T) {
	p := newPair(t, withForward())
	const limit = 3
	release, entered := make(chan struct{}), make(chan struct{}, 100)
	p.server.ForwardTCP(limit, func(r *TCPRequest) {
		entered <- struct{}{}
		<-release
		r.Reject(syscall.ECONNREFUSED)
	})
	errs := make(chan error, limit+2)
	for range limit + 2 {
		go func() {
			_, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(world4, 80))
			errs <- err
		}()
	}
	for range limit {
		<-entered
	}
	for p.server.Stats().TCPForwardFull < 2 {
		time.Sleep(time.Millisecond)
	}
	if len(entered) != 0 {
		t.Error("more requests than allowed")
	}
	close(release)
	for range limit + 2 { // those dropped come back with their next SYN
		wantErrno(t, <-errs, syscall.ECONNREFUSED)
	}
}

// A listener or socket of the stack wins over the forwarders.
func TestListenWinsOverForward(t *testing.T) {
	p := newPair(t, withForward())
	p.server.ForwardTCP(10, func(r *TCPRequest) { t.Errorf("TCP forwarded to %v", r.Destination()) })
	p.server.ForwardUDP(func(_, to netip.AddrPort, _ []byte) { t.Errorf("UDP forwarded to %v", to) })
	families(t, func(t *testing.T, at netip.Addr) {
		l, err := p.server.ListenTCP(netip.AddrPortFrom(at, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		u, err := p.server.ListenUDP(netip.AddrPortFrom(at, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		c, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(at, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		uc, err := p.client.ListenUDP(netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		defer uc.Close()
		if _, err := uc.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(at, 53)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 10)
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil || string(b[:n]) != "hello" {
			t.Fatalf("%q, %v", b[:n], err)
		}
		if _, err := u.WriteToUDPAddrPort([]byte("yes"), from); err != nil {
			t.Fatal(err)
		}
		n, from, err = uc.ReadFromUDPAddrPort(b)
		if err != nil || string(b[:n]) != "yes" || from != netip.AddrPortFrom(at, 53) {
			t.Fatalf("%q from %v, %v", b[:n], from, err)
		}
	})
}

// A client may use a port again while the server still has the last connection
// in TIME-WAIT, because the server closed first.
func TestForwardTCPTimeWaitReuse(t *testing.T) {
	p := newPair(t, withForward())
	p.server.ForwardTCP(10, func(r *TCPRequest) {
		c, err := r.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		_ = c.CloseWrite() // first
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{c})
		c.Close()
	})
	if err := p.client.SetPortRange(5000, 5000); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	const rounds = 20
	for range rounds {
		c, err := p.client.DialTCP(testContext(t), netip.AddrPortFrom(world4, 80))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	// One lost SYN costs a second, so this shows in any weather.
	if d := time.Since(start); d > rounds*timeWait/2 {
		t.Errorf("%d connections on one port took %v", rounds, d)
	}
}

type datagram struct {
	from, to netip.AddrPort
	payload  string
}

func TestForwardUDP(t *testing.T) {
	worlds(t, func(t *testing.T, to netip.AddrPort) {
		p := newPair(t, withForward())
		got := make(chan datagram, 10)
		p.server.ForwardUDP(func(from, to netip.AddrPort, b []byte) { got <- datagram{from, to, string(b)} })
		u, err := p.client.ListenUDP(netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		_ = u.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 70000)
		for _, n := range []int{0, 1, 1372, 1373, 4000, 30000, 65507} {
			want := make([]byte, n)
			(&pattern{at: uint64(n)}).fill(want)
			if k, err := u.WriteToUDPAddrPort(want, to); err != nil || k != n {
				t.Fatalf("write %d bytes: %d, %v", n, k, err)
			}
			d := <-got
			if d.to != to || d.payload != string(want) {
				t.Fatalf("%d bytes to %v arrived as %d to %v", n, to, len(d.payload), d.to)
			}
			if err := p.server.WriteUDP(to, d.from, []byte(d.payload)); err != nil {
				t.Fatal(err)
			}
			k, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil || from != to || string(buf[:k]) != string(want) {
				t.Fatalf("%d bytes came back as %d from %v, %v", n, k, from, err)
			}
		}
	})
}

// A datagram to the server's own address where nobody listens is forwarded too.
func TestForwardUDPOwnAddress(t *testing.T) {
	p := newPair(t, withForward())
	got := make(chan datagram, 1)
	p.server.ForwardUDP(func(from, to netip.AddrPort, b []byte) { got <- datagram{from, to, string(b)} })
	families(t, func(t *testing.T, at netip.Addr) {
		u, err := p.client.ListenUDP(netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		_, _ = u.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(at, 99))
		if d := <-got; d.to != netip.AddrPortFrom(at, 99) || d.payload != "x" {
			t.Errorf("%+v", d)
		}
	})
}

func TestWriteUDPErrors(t *testing.T) {
	p := newPair(t, withForward())
	a4, a6 := netip.AddrPortFrom(world4, 1), netip.AddrPortFrom(world6, 1)
	wantErrno(t, p.server.WriteUDP(a4, a6, nil), syscall.EAFNOSUPPORT)
	wantErrno(t, p.server.WriteUDP(a4, a4, make([]byte, 65508)), syscall.EMSGSIZE)
	wantErrno(t, p.server.WriteUDP(a6, a6, make([]byte, 65528)), syscall.EMSGSIZE)
	p.server.Close()
	if err := p.server.WriteUDP(a4, a4, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// Pings to foreign addresses are the caller's affair; those to the stack's own
// are answered.
func TestForwardPing(t *testing.T) {
	p := newPair(t, withForward())
	var replies atomic.Int32
	p.down.mu.Lock()
	p.down.edit = func(b []byte) []byte {
		if q, ok := parseIP(b); ok && (q.proto == protoICMP && b[q.l4] == 0 || q.proto == protoICMPv6 && b[q.l4] == 129) {
			replies.Add(1)
		}
		return b
	}
	p.down.mu.Unlock()
	p.server.Input([][]byte{
		echoRequest(client4, world4), echoRequest(client6, world6), echoRequest(client4, loop4), echoRequest(client6, loop6),
		asFragment(echoRequest(client4, world4)),
	})
	st := p.server.Stats()
	if n := replies.Load(); n != 0 || st.DropForeignICMP != 5 {
		t.Errorf("%d replies, %d dropped", n, st.DropForeignICMP)
	}
	p.server.Input([][]byte{echoRequest(client4, server4), echoRequest(client6, server6)})
	if n := replies.Load(); n != 2 {
		t.Errorf("%d replies, want 2", n)
	}
}

func echoRequest(from, to netip.Addr) []byte {
	if from.Is4() {
		b := make([]byte, 20+8+16)
		putIPv4(b, protoICMP, from, to, 7, 0)
		b[20] = 8
		putChecksum(b[22:], sum(0, b[20:]))
		return b
	}
	b := make([]byte, 40+8+16)
	putIPv6(b, protoICMPv6, from, to)
	b[40] = 128
	putChecksum(b[42:], sum(pseudoSum(from, to, protoICMPv6, len(b)-40), b[40:]))
	return b
}

func putChecksum(b []byte, acc uint64) { c := ^fold(acc); b[0], b[1] = byte(c>>8), byte(c) }

func asFragment(b []byte) []byte {
	b[6] |= 0x20
	setIPv4Checksum(b[:20])
	return b
}

func TestRejectUDP(t *testing.T) {
	p := newPair(t, withForward())
	codes := map[Unreachable][2]byte{ // IPv4, IPv6: RFC 792, RFC 1812, RFC 4443
		UnreachablePort:       {3, 4},
		UnreachableHost:       {1, 3},
		UnreachableNet:        {0, 0},
		UnreachableProhibited: {13, 1},
	}
	got := make(chan []byte, 1)
	p.down.mu.Lock()
	p.down.edit = func(b []byte) []byte { got <- b; return nil }
	p.down.mu.Unlock()
	for code, want := range codes {
		for i, a := range [][2]netip.Addr{{client4, world4}, {client6, world6}} {
			from, to := netip.AddrPortFrom(a[0], 1111), netip.AddrPortFrom(a[1], 2222)
			for _, n := range []int{0, 100, 2000} {
				p.server.RejectUDP(from, to, make([]byte, n), code)
				checkUnreachable(t, <-got, from, to, want[i], 17, n)
			}
		}
	}
}

func TestPacketConnUnreachableIgnored(t *testing.T) {
	p := newPair(t, withForward())
	p.server.ForwardUDP(func(from, to netip.AddrPort, b []byte) { p.server.RejectUDP(from, to, b, UnreachablePort) })
	u, err := p.client.ListenUDP(netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for range 3 {
		if _, err := u.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(world4, 9)); err != nil {
			t.Fatal(err)
		}
	}
	_ = u.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, _, err := u.ReadFromUDPAddrPort(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an unconnected socket got %v", err)
	}
}

// A SYN that comes again while its request is being served makes no second
// request, and an unanswered request gives its place back.
func TestForwardTCPPlaces(t *testing.T) {
	p := newPair(t, withForward())
	entered, release := make(chan struct{}, 10), make(chan struct{})
	p.server.ForwardTCP(1, func(*TCPRequest) {
		entered <- struct{}{}
		<-release
	})
	spec := tcpSpec{v4: true, ttl: 64, flags: flagSYN, sport: 1}
	syn := tcpPacket(spec)
	for range 3 {
		p.server.Input([][]byte{syn})
	}
	<-entered
	if st := p.server.Stats(); len(entered) != 0 || st.TCPForwardFull != 0 {
		t.Errorf("%d more requests, %d dropped", len(entered), st.TCPForwardFull)
	}
	release <- struct{}{}
	spec.sport++
	other := tcpPacket(spec)
	for len(entered) == 0 { // until the place is free again
		p.server.Input([][]byte{other})
		time.Sleep(time.Millisecond)
	}
	close(release)
}

// Datagrams whose length field lies are dropped and counted.
func TestForwardUDPMalformed(t *testing.T) {
	p := newPair(t, withForward())
	p.server.ForwardUDP(func(_, _ netip.AddrPort, b []byte) { t.Errorf("%d bytes forwarded", len(b)) })
	for _, length := range []byte{0, 7, 13, 255} {
		b := make([]byte, 20+8+4)
		putIPv4(b, protoUDP, client4, world4, 0, 0)
		b[25] = length
		p.server.Input([][]byte{b})
	}
	short := make([]byte, 20+7)
	putIPv4(short, protoUDP, client4, world4, 0, 0)
	p.server.Input([][]byte{short})
	if n := p.server.Stats().DropMalformed; n != 5 {
		t.Errorf("%d dropped, want 5", n)
	}
}
