package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// udpPackets are the packets of a datagram, as they come from the tunnel.
func udpPackets(s *Stack, from, to netip.AddrPort, payload []byte) (pkts [][]byte) {
	b := &batch{dev: &device{mtu: s.dev.mtu, output: func(p [][]byte) {
		for _, b := range p {
			pkts = append(pkts, append([]byte(nil), b...))
		}
	}}, buf: make([]byte, batchSize)}
	b.putUDP(from, to, payload)
	b.flush()
	return pkts
}

// listenUDP opens a socket that ends with the test, and gives up after a while.
func listenUDP(t testing.TB, s *Stack, at netip.AddrPort) *PacketConn {
	t.Helper()
	c, err := s.ListenUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

// Datagrams come in batches and in order, with the room asked for, whether they
// came whole or in fragments, and both ways of reading take turns.
func TestPacketConnBatch(t *testing.T) {
	families(t, func(t *testing.T, at netip.Addr) {
		p := newPair(t)
		own := client4
		if at.Is6() {
			own = client6
		}
		u := listenUDP(t, p.client, netip.AddrPort{})
		to := netip.AddrPortFrom(own, u.at.Port())
		var pkts [][]byte
		var want []string
		for i, n := range []int{5, 1300, 0, 3000, 1, 1300, 9000, 2, 65507, 0, 3} {
			b := make([]byte, n)
			(&pattern{at: uint64(i)}).fill(b)
			want = append(want, string(b))
			pkts = append(pkts, udpPackets(p.client, netip.AddrPortFrom(at, uint16(1000+i)), to, b)...)
		}
		p.client.Input(pkts)
		got := 0
		check := func(b []byte, from netip.AddrPort) {
			t.Helper()
			if got == len(want) || string(b) != want[got] || from != netip.AddrPortFrom(at, uint16(1000+got)) {
				t.Fatalf("datagram %d: %d bytes from %v", got, len(b), from)
			}
			got++
		}
		b := make([]byte, 70000)
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatal(err)
		}
		check(b[:n], from)
		for _, room := range []int{22, 0, 32, 10, 5, 5, 5} {
			if got == len(want) {
				break
			}
			list, senders, err := u.ReadBatch(room)
			if err != nil {
				t.Fatal(err)
			}
			for i, d := range list {
				for j := range d[:room] {
					d[j] = 0xee // the room is the caller's
				}
				check(d[room:], senders[i])
			}
		}
		if got != len(want) {
			t.Fatalf("%d datagrams, want %d", got, len(want))
		}
		if st := p.client.Stats(); st.UDPBufferErrors != 0 {
			t.Errorf("%d datagrams dropped", st.UDPBufferErrors)
		}
	})
}

// WriteBatch sends all packets of the batch at once, in order, up to the
// datagram that can't be sent.
func TestPacketConnWriteBatch(t *testing.T) {
	p := newPair(t)
	p.up.mu.Lock()
	batches := 0
	p.up.tap = func([][]byte) { batches++ }
	p.up.mu.Unlock()
	a := listenUDP(t, p.client, netip.AddrPort{})
	b4 := listenUDP(t, p.server, netip.AddrPortFrom(server4, 0))
	b6 := listenUDP(t, p.server, netip.AddrPortFrom(server6, 0))
	list := [][]byte{[]byte("one"), []byte("two"), make([]byte, 3000), nil, []byte("five"), make([]byte, 65508), []byte("seven")}
	to := []netip.AddrPort{b4.at, b6.at, b4.at, b6.at, b4.at, b4.at, b4.at}
	n, err := a.WriteBatch(list, to)
	if n != 5 {
		t.Errorf("%d datagrams sent, want 5", n)
	}
	wantErrno(t, err, syscall.EMSGSIZE)
	if n, err := a.WriteBatch(list[6:], to[6:]); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	read := func(u *PacketConn, own netip.Addr, want ...string) {
		t.Helper()
		b := make([]byte, 4000)
		for _, w := range want {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil || string(b[:n]) != w || from != netip.AddrPortFrom(own, a.at.Port()) {
				t.Errorf("%d bytes from %v, %v; want %d from %v", n, from, err, len(w), own)
			}
		}
	}
	read(b4, client4, "one", string(list[2]), "five", "seven")
	read(b6, client6, "two", "")
	p.up.mu.Lock()
	defer p.up.mu.Unlock()
	if batches != 2 {
		t.Errorf("%d batches went out, want 2", batches)
	}
}

// What nobody reads is bounded, empty datagrams too, and the rest is counted.
func TestPacketConnFull(t *testing.T) {
	for _, size := range []int{0, 100, 1372, 40000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := newPair(t)
			u := listenUDP(t, p.client, netip.AddrPort{})
			pkts := udpPackets(p.client, netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, u.at.Port()), make([]byte, size))
			sent := 0
			for p.client.Stats().UDPBufferErrors < 10 {
				p.client.Input(pkts)
				sent++
				if sent > 2*udpBuffer/udpRoom {
					t.Fatal("there is no end")
				}
			}
			memory := 0
			for k := u.queue.head; k != nil; k = k.next {
				memory += len(k.buf) + 56*len(k.datagrams)
			}
			if memory > 2*udpBuffer {
				t.Errorf("%d bytes of chunks", memory)
			}
			waiting := sent - 10
			if bytes := waiting * (size + datagramCost); bytes < udpBuffer*9/10 {
				t.Errorf("only %d bytes wait", bytes)
			}
			for got := 0; got < waiting; {
				list, _, err := u.ReadBatch(0)
				if err != nil {
					t.Fatal(err)
				}
				got += len(list)
			}
			if u.queue.head != nil || u.queue.bytes != 0 {
				t.Errorf("%d bytes are left", u.queue.bytes)
			}
			p.client.Input(pkts) // there is room again
			if _, _, err := u.ReadBatch(0); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A socket that has nothing to read holds no buffer, once its reader waits.
func TestPacketConnIdleBuffers(t *testing.T) {
	p := newPair(t)
	u := listenUDP(t, p.client, netip.AddrPort{})
	p.client.Input(udpPackets(p.client, netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, u.at.Port()), []byte("x")))
	if _, _, err := u.ReadBatch(0); err != nil {
		t.Fatal(err)
	}
	_ = u.SetReadDeadline(time.Now().Add(time.Millisecond))
	for {
		if _, _, err := u.ReadBatch(0); err != nil {
			break
		}
	}
	if u.reading != nil || u.queue.head != nil {
		t.Error("it holds a chunk")
	}
}

// What isn't a plain datagram for a socket is gVisor's: it drops what is
// malformed and answers for ports that nobody has.
func TestPacketConnOddPackets(t *testing.T) {
	p := newPair(t)
	answers := make(chan []byte, 10)
	p.up.mu.Lock()
	p.up.edit = func(b []byte) []byte { answers <- b; return nil }
	p.up.mu.Unlock()
	u := listenUDP(t, p.client, netip.AddrPort{})
	from, to := netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, u.at.Port())
	whole := func() []byte { return udpPackets(p.client, from, to, []byte("hello"))[0] }
	edited := func(f func(b []byte)) []byte {
		b := whole()
		f(b)
		setIPv4Checksum(b[:20])
		return b
	}
	for name, b := range map[string][]byte{
		"length beyond the packet": edited(func(b []byte) { binary.BigEndian.PutUint16(b[24:], 14) }),
		"length below the header":  edited(func(b []byte) { binary.BigEndian.PutUint16(b[24:], 7) }),
		"no header":                edited(func(b []byte) { binary.BigEndian.PutUint16(b[2:], 25) })[:25],
		"from multicast":           edited(func(b []byte) { b[12] = 224 }),
		"from broadcast":           edited(func(b []byte) { copy(b[12:], "\xff\xff\xff\xff") }),
		"to somebody else":         edited(func(b []byte) { b[16] = 9 }),
	} {
		p.client.Input([][]byte{b})
		if u.queue.head != nil {
			t.Errorf("%s: delivered", name)
			u.queue.take()
		}
	}
	if len(answers) > 0 {
		t.Errorf("answered with %x", <-answers)
	}
	// A length below the packet's cuts the rest off; options of IP change nothing.
	short := edited(func(b []byte) { binary.BigEndian.PutUint16(b[24:], 8+4) })
	options := append(append(append([]byte(nil), whole()[:20]...), 1, 1, 1, 1), whole()[20:]...)
	options[0] = 0x46
	binary.BigEndian.PutUint16(options[2:], uint16(len(options)))
	setIPv4Checksum(options[:24])
	p.client.Input([][]byte{short, options})
	for _, want := range []string{"hell", "hello"} {
		b := make([]byte, 10)
		if n, a, err := u.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != want || a != from {
			t.Errorf("%q from %v, %v; want %q", b[:n], a, err, want)
		}
	}
	p.client.Input([][]byte{edited(func(b []byte) { binary.BigEndian.PutUint16(b[22:], to.Port()^1) })})
	if b := <-answers; b[9] != protoICMP || b[20] != icmpUnreachable || b[21] != icmpPort {
		t.Errorf("answered with % x", b)
	}
}

// Sockets of one port but different addresses, and who gets what.
func TestPacketConnAddresses(t *testing.T) {
	p := newPair(t)
	a4 := listenUDP(t, p.client, netip.AddrPortFrom(client4, 53))
	a6 := listenUDP(t, p.client, netip.AddrPortFrom(client6, 53))
	_, err := p.client.ListenUDP(netip.AddrPortFrom(netip.IPv6Unspecified(), 53))
	wantErrno(t, err, syscall.EADDRINUSE)
	b := make([]byte, 10)
	for want, u := range map[netip.Addr]*PacketConn{client4: a4, client6: a6} {
		from := netip.AddrPortFrom(server4, 9)
		if want.Is6() {
			from = netip.AddrPortFrom(server6, 9)
		}
		p.client.Input(udpPackets(p.client, from, netip.AddrPortFrom(want, 53), []byte(want.String()[:3])))
		if n, _, err := u.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != want.String()[:3] {
			t.Errorf("%q, %v", b[:n], err)
		}
	}
	a4.Close()
	a4 = listenUDP(t, p.client, netip.AddrPortFrom(client4, 53)) // free again
	a6.Close()
	// The address goes: neither in nor out, until it is back.
	if err := p.client.SetAddresses([]netip.Addr{client6}); err != nil {
		t.Fatal(err)
	}
	in := udpPackets(p.client, netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, 53), []byte("x"))
	p.client.Input(in)
	if a4.queue.head != nil {
		t.Error("delivered to an address that is gone")
	}
	_, err = a4.WriteToUDPAddrPort(nil, netip.AddrPortFrom(server4, 9))
	wantErrno(t, err, syscall.ENETUNREACH)
	if err := p.client.SetAddresses([]netip.Addr{client4, client6}); err != nil {
		t.Fatal(err)
	}
	p.client.Input(in)
	if n, _, err := a4.ReadFromUDPAddrPort(b); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
}

// The errors of unusual destinations, and the source address where there is a
// choice.
func TestPacketConnDestinations(t *testing.T) {
	p := newPair(t)
	other4, other6 := netip.MustParseAddr("100.64.0.8"), netip.MustParseAddr("2001:db8::8")
	type wants map[string]any
	check := func(t *testing.T, at netip.AddrPort, w wants) {
		t.Helper()
		u := listenUDP(t, p.client, at)
		defer u.Close()
		for to, want := range w {
			var source netip.Addr
			p.up.mu.Lock()
			p.up.edit = func(b []byte) []byte {
				q, _ := parseIP(b)
				source = q.source()
				return nil
			}
			p.up.mu.Unlock()
			_, err := u.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(netip.MustParseAddr(to), 9))
			switch want := want.(type) {
			case netip.Addr:
				if err != nil || source != want {
					t.Errorf("to %v: from %v, %v; want %v", to, source, err, want)
				}
			case syscall.Errno:
				if !errors.Is(err, want) || source.IsValid() {
					t.Errorf("to %v: %v; want %v", to, err, want)
				}
			}
		}
	}
	check(t, netip.AddrPort{}, wants{
		"0.0.0.0": syscall.ENETUNREACH, "::": syscall.ENETUNREACH, "255.255.255.255": syscall.EACCES,
		"224.0.0.1": client4, "ff02::1": client6, "fe80::1": client6, "127.0.0.1": client4, "::1": client6,
		"192.0.2.1": client4, "::ffff:192.0.2.1": client4, "2001:db8::1": client6, client4.String(): client4,
	})
	check(t, netip.AddrPortFrom(client4, 0), wants{"192.0.2.1": client4, "2001:db8::1": syscall.EAFNOSUPPORT})
	check(t, netip.AddrPortFrom(client6, 0), wants{"192.0.2.1": syscall.EAFNOSUPPORT, "2001:db8::1": client6})
	set := func(addrs ...netip.Addr) {
		t.Helper()
		if err := p.client.SetAddresses(addrs); err != nil {
			t.Fatal(err)
		}
	}
	set(client4)
	check(t, netip.AddrPort{}, wants{"192.0.2.1": client4, "2001:db8::1": syscall.ENETUNREACH})
	set()
	check(t, netip.AddrPort{}, wants{"192.0.2.1": syscall.ENETUNREACH, "255.255.255.255": syscall.ENETUNREACH})
	set(client4, other4, client6, other6)
	check(t, netip.AddrPort{}, wants{
		"192.0.2.1": client4, "2001:db8::1": other6, "fd00:0:0:7::99": client6, // RFC 6724 rule 8
	})
	check(t, netip.AddrPortFrom(other4, 0), wants{"192.0.2.1": other4})
}

// The end of the stack ends its sockets, those that are being read too.
func TestPacketConnStackClosed(t *testing.T) {
	p := newPair(t)
	u := listenUDP(t, p.client, netip.AddrPort{})
	ended := make(chan error, 1)
	go func() { _, _, err := u.ReadBatch(0); ended <- err }()
	p.client.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := u.WriteBatch([][]byte{nil}, []netip.AddrPort{netip.AddrPortFrom(server4, 9)}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if err := u.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("set a deadline: %v", err)
	}
	if len(p.client.ports.udp.byPort) != 0 {
		t.Error("the stack still knows the socket")
	}
}

func TestUDPInAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools on purpose")
	}
	p := newPair(t)
	u := listenUDP(t, p.client, netip.AddrPort{})
	in := udpPackets(p.client, netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, u.at.Port()), make([]byte, 1200))
	pkts := make([][]byte, 64)
	for i := range pkts {
		pkts[i] = in[0]
	}
	if n := testing.AllocsPerRun(100, func() {
		p.client.Input(pkts)
		for got := 0; got < len(pkts); {
			list, _, _ := u.ReadBatch(22)
			got += len(list)
		}
	}); n > 1 {
		t.Errorf("%v allocations for %d datagrams", n, len(pkts))
	}
}

// BenchmarkUDPIn is the road of 64 datagrams of 1200 bytes from the tunnel to
// the reader of a socket.
func BenchmarkUDPIn(b *testing.B) {
	p := newPair(b)
	u := listenUDP(b, p.client, netip.AddrPort{})
	_ = u.SetDeadline(time.Time{})
	in := udpPackets(p.client, netip.AddrPortFrom(server4, 9), netip.AddrPortFrom(client4, u.at.Port()), make([]byte, 1200))
	pkts := make([][]byte, 64)
	for i := range pkts {
		pkts[i] = in[0]
	}
	b.SetBytes(64 * 1200)
	b.ReportAllocs()
	for b.Loop() {
		p.client.Input(pkts)
		for got := 0; got < len(pkts); {
			list, _, _ := u.ReadBatch(22)
			got += len(list)
		}
	}
}

// BenchmarkUDPOut is the road of 64 datagrams from a socket to the tunnel.
func BenchmarkUDPOut(b *testing.B) {
	s, err := New(Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: func([][]byte) {}})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if err := s.SetAddresses([]netip.Addr{client4, client6}); err != nil {
		b.Fatal(err)
	}
	u := listenUDP(b, s, netip.AddrPort{})
	_ = u.SetDeadline(time.Time{})
	list, to := make([][]byte, 64), make([]netip.AddrPort, 64)
	for i := range list {
		list[i], to[i] = make([]byte, 1200), netip.AddrPortFrom(server4, 9)
	}
	b.SetBytes(64 * 1200)
	b.ReportAllocs()
	for b.Loop() {
		if n, err := u.WriteBatch(list, to); n != 64 {
			b.Fatal(err)
		}
	}
}
