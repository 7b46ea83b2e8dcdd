package tun

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// world is a client, a server and a destination, each a kernel of its own:
//
//	client | tun0 == relay == tun0 | server | veth --- veth | dst
//
// The relay stands for the tunnel. The client has the egress address, so nothing
// needs to be translated.
type world struct {
	t                   *testing.T
	client, server, dst *space
	in, out             *Device // of the client, of the server
	down                func()
}

const (
	testHead, testTail = 20, 16

	dst4, dst6       = "192.0.2.2", "2001:db8:2::2"
	egress4, egress6 = "203.0.113.2", "2001:db8:113::2"
)

// newWorld builds it; service addresses are put on the server's loopback.
func newWorld(t *testing.T, egress []string, service []netip.AddrPort) *world {
	t.Helper()
	w := &world{t: t, client: newSpace(t), server: newSpace(t), dst: newSpace(t)}
	w.server.join("wan", w.dst, "eth0")
	w.server.run(`
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip addr add 192.0.2.1/24 dev wan
		ip addr add 2001:db8:2::1/64 dev wan nodad`)
	w.dst.run(`
		ip addr add 192.0.2.2/24 dev eth0
		ip addr add 2001:db8:2::2/64 dev eth0 nodad
		ip route add default via 192.0.2.1
		ip -6 route add default via 2001:db8:2::1`)
	w.server.reach("192.0.2.2", "2001:db8:2::2")
	for _, a := range service {
		w.server.addr(netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), "lo")
	}
	w.in = w.client.open(Config{Name: "tun0", Headroom: testHead, Tailroom: testTail})
	w.out = w.server.open(Config{Name: "tun0", Headroom: testHead, Tailroom: testTail})
	h := Host{Device: w.out.Name(), Service: service}
	for _, a := range egress {
		p := netip.MustParsePrefix(a)
		h.Egress = append(h.Egress, p)
		w.client.addr(p, "tun0")
	}
	w.client.run("ip route add default dev tun0; ip -6 route add default dev tun0")
	w.down = w.server.up(h)
	relay(t, w.in, w.out, testHead, testTail)
	relay(t, w.out, w.in, testHead, testTail)
	return w
}

func both(t *testing.T, f func(t *testing.T, dst, egress string)) {
	t.Helper()
	t.Run("IPv4", func(t *testing.T) { f(t, dst4, egress4) })
	t.Run("IPv6", func(t *testing.T) { f(t, dst6, egress6) })
}

// wire makes the destination's network real: small packets with checksums, which
// it verifies.
func (w *world) wire() {
	w.server.run("ethtool -K wan tx off tso off gso off >&2")
	w.dst.run("ethtool -K eth0 rx off gro off tx off tso off gso off >&2")
}

// bad counts what the destination threw away for its checksum.
func (w *world) bad() {
	w.t.Helper()
	w.dst.do(func() error {
		for file, names := range map[string][]string{
			"snmp":  {"Tcp: InCsumErrors", "Udp: InCsumErrors", "Icmp: InCsumErrors", "Tcp: InErrs"},
			"snmp6": {"Udp6InCsumErrors", "Icmp6InCsumErrors"},
		} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			for _, n := range names {
				if v := counter(string(b), n); v != "0" {
					w.t.Errorf("%s is %q", n, v)
				}
			}
		}
		return nil
	})
}

// counter finds "Udp6InCsumErrors 3" or, in pairs of lines, "Udp: InCsumErrors".
func counter(text, name string) string {
	group, name2, pair := strings.Cut(name, " ")
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case !pair && f[0] == name:
			return f[1]
		case pair && f[0] == group && names == nil:
			names = f
		case pair && f[0] == group:
			return f[slices.Index(names, name2)]
		}
	}
	return "missing"
}

func single(egress string) string {
	a := netip.MustParseAddr(egress)
	return netip.PrefixFrom(a, a.BitLen()).String()
}

func (w *world) drops() {
	w.t.Helper()
	for name, d := range map[string]*Device{"client": w.in, "server": w.out} {
		s := d.Stats()
		for r, n := range s.Drops {
			if n > 0 && DropReason(r) != DropBacklog {
				w.t.Errorf("%s dropped %d: %v", name, n, DropReason(r))
			}
		}
		w.t.Logf("%s: read %+v, written %+v, uso %v, backlog %d", name, s.Read, s.Written, s.USO, s.Drops[DropBacklog])
	}
}

// joined fails if the traffic went packet by packet.
func joined(t *testing.T, what string, tr Traffic) {
	t.Helper()
	if tr.Packets < 4*tr.Messages {
		t.Errorf("%s: %d packets in %d messages", what, tr.Packets, tr.Messages)
	}
}

func TestTCP(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		const size = 64 << 20
		l := w.dst.listen(net.JoinHostPort(dst, "80"))

		c := w.client.dial(l.Addr().String())
		s := accept(t, l)
		if a := s.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); a != netip.MustParseAddr(egress) {
			t.Errorf("the destination sees %v", a)
		}
		transfer(t, c, s, size)
		joined(t, "client read, up", w.in.Stats().Read)
		joined(t, "server written, up", w.out.Stats().Written)

		before := w.out.Stats().Read
		transfer(t, s, c, size)
		after := w.out.Stats().Read
		joined(t, "server read, down", Traffic{after.Packets - before.Packets, 0, after.Messages - before.Messages})
		joined(t, "client written, down", w.in.Stats().Written)
		w.drops()
	})
}

// TestChecksums lets the destination verify what the server's host computes.
func TestChecksums(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		w.wire()
		l := w.dst.listen(net.JoinHostPort(dst, "80"))
		c := w.client.dial(l.Addr().String())
		s := accept(t, l)
		transfer(t, c, s, 4<<20)
		transfer(t, s, c, 4<<20)
		echo := w.dst.listenUDP(net.JoinHostPort(dst, "7"))
		go echoUDP(echo)
		u := w.client.dialUDP(echo.LocalAddr().String())
		got := make([]byte, 2000)
		for n := range 200 {
			if _, err := u.Write(make([]byte, n)); err != nil {
				t.Fatal(err)
			}
			if k, err := u.Read(got); err != nil || k != n {
				t.Fatalf("datagram of %d bytes: got %d: %v", n, k, err)
			}
		}
		out := w.client.run("ping -n -c 3 -i 0.2 -W 20 -s 1000 " + dst)
		if !strings.Contains(out, " 0% packet loss") {
			t.Errorf("ping:\n%s", out)
		}
		w.bad()
		w.drops()
	})
}

// TestTCPBothWays has several connections busy in both directions at once, begun
// by the destination.
func TestTCPBothWays(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		l := w.client.listen(net.JoinHostPort(egress, "8080"))
		done := make(chan struct{})
		const flows, size = 4, 4 << 20
		for range flows {
			a := w.dst.dial(l.Addr().String())
			b := accept(t, l)
			for _, d := range [][2]net.Conn{{a, b}, {b, a}} {
				go func() {
					defer func() { done <- struct{}{} }()
					transfer(t, d[0], d[1], size)
				}()
			}
		}
		for range 2 * flows {
			<-done
		}
		w.drops()
	})
}

// TestTCPSmall sends many writes of all sizes, so that segments differ in length
// and carry PSH.
func TestTCPSmall(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		l := w.dst.listen(net.JoinHostPort(dst, "80"))
		c := w.client.dial(l.Addr().String())
		s := accept(t, l)
		for _, ends := range [][2]net.Conn{{c, s}, {s, c}} {
			go func() {
				var p pattern
				for n := range 3000 {
					if err := p.send(ends[0], n); err != nil {
						t.Error(err)
						break
					}
				}
				_ = ends[0].(*net.TCPConn).CloseWrite()
			}()
			var p pattern
			if n, err := p.receive(ends[1]); err != nil || n != 3000*2999/2 {
				t.Errorf("received %d: %v", n, err)
			}
		}
		w.drops()
	})
}

// TestUDP echoes datagrams of all sizes: small, the longest that isn't
// fragmented, fragmented by the client, and by the server's host.
func TestUDP(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		echo := w.dst.listenUDP(net.JoinHostPort(dst, "7"))
		go echoUDP(echo)
		c := w.client.dialUDP(echo.LocalAddr().String())
		var p pattern
		got := make([]byte, 1<<16)
		for _, n := range []int{0, 1, 17, 512, 1280, 1350, 1352, 1372, 1373, 1400, 1452, 1473, 3000, 9000, 60000} {
			b := make([]byte, n)
			p.fill(b)
			// The destination learns the path's MTU by losing a datagram.
			for try := 0; ; try++ {
				if _, err := c.Write(b); err != nil {
					t.Fatal(err)
				}
				_ = c.SetReadDeadline(time.Now().Add(time.Second))
				k, err := c.Read(got)
				if err == nil && bytes.Equal(got[:k], b) {
					break
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) || try == 20 {
					t.Fatalf("datagram of %d bytes: got %d: %v", n, k, err)
				}
			}
		}
		w.drops()
	})
}

// TestUSO sends super-packets of datagrams, which the kernel hands over whole
// where it can.
func TestUSO(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		if !w.in.Stats().USO {
			t.Skip("this kernel has no USO for TUN devices (Linux 6.2)")
		}
		sink := w.dst.listenUDP(net.JoinHostPort(dst, "7"))
		_ = sink.SetReadBuffer(4 << 20)
		c := w.client.dialUDP(sink.LocalAddr().String())
		rc, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		const segment, count, rounds, odd = 1200, 40, 25, 77
		_ = rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
		})
		if err != nil {
			t.Fatal(err)
		}
		send := make([]byte, segment*count+odd)
		got := make([]byte, 1<<16)
		var p, q pattern
		for range rounds {
			p.fill(send)
			if _, err := c.Write(send); err != nil {
				t.Fatal(err)
			}
			for i := range count + 1 {
				want := send[i*segment : min(len(send), (i+1)*segment)]
				q.fill(got[:len(want)])
				k, _, err := sink.ReadFrom(got)
				if err != nil || !bytes.Equal(got[:k], want) {
					t.Fatalf("datagram %d: %d bytes, want %d: %v", i, k, len(want), err)
				}
			}
		}
		joined(t, "client read", w.in.Stats().Read)
		joined(t, "server written", w.out.Stats().Written)
		w.drops()
	})
}

func TestPingAndErrors(t *testing.T) {
	both(t, func(t *testing.T, dst, egress string) {
		w := newWorld(t, []string{single(egress)}, nil)
		w.client.run("ping -n -c 2 -W 1 -s 4000 " + dst + " || true") // teaches the path's MTU
		for _, size := range []string{"8", "1300", "4000"} {
			out := w.client.run("ping -n -c 3 -i 0.2 -W 20 -s " + size + " " + dst)
			if !strings.Contains(out, " 0% packet loss") {
				t.Errorf("ping:\n%s", out)
			}
		}
		// Nobody listens: the port unreachable comes back through the device.
		c := w.client.dialUDP(net.JoinHostPort(dst, "9"))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("read after port unreachable: %v", err)
		}
		// The server's host is a hop.
		hop := w.client.run("ping -n -c 1 -W 20 -t 1 " + dst + " || true")
		if !strings.Contains(hop, "192.0.2.1") && !strings.Contains(hop, "2001:db8:2::1") {
			t.Errorf("ping with ttl 1:\n%s", hop)
		}
		w.drops()
	})
}

func echoUDP(c *net.UDPConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = c.WriteToUDPAddrPort(b[:n], from)
	}
}
