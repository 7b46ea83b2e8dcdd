package proxy_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// association is an application's side of a UDP association.
type association struct {
	*net.UDPConn
	t     *testing.T
	tcp   *client
	relay netip.AddrPort
}

// associate opens one; port is what the request declares as the application's own (0: none, -1: the true one).
func (g *gateway) associate(t *testing.T, port int) *association {
	t.Helper()
	c := g.client(t)
	host := "127.0.0.1:0"
	if !c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4() {
		host = "[::1]:0"
	}
	a := &association{UDPConn: listenUDP(t, host), t: t, tcp: c}
	if port < 0 {
		port = a.port()
	}
	c.greet()
	c.send(5, 3, 0, 1, 0, 0, 0, 0, sport(port))
	head := c.read(4)
	if head[1] != 0 {
		t.Fatalf("reply % x", head)
	}
	addr, _ := netip.AddrFromSlice(c.read(map[byte]int{1: 4, 4: 16}[head[3]]))
	a.relay = netip.AddrPortFrom(addr, binary.BigEndian.Uint16(c.read(2)))
	if want, _ := netip.ParseAddrPort(g.addr); a.relay.Addr() != want.Addr() {
		t.Errorf("the relay is at %v, want the address the application asked, %v", a.relay, want)
	}
	return a
}

func listenUDP(t *testing.T, address string) *net.UDPConn {
	t.Helper()
	addr, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenUDP("udp", addr)
	if err != nil {
		t.Skipf("this host has no %s: %v", address, err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func (a *association) port() int { return a.LocalAddr().(*net.UDPAddr).Port }

func (a *association) sendFrom(from *net.UDPConn, parts ...any) {
	a.t.Helper()
	if _, err := from.WriteToUDPAddrPort(join(parts...), a.relay); err != nil {
		a.t.Fatal(err)
	}
}

func (a *association) send(parts ...any) {
	a.t.Helper()
	a.sendFrom(a.UDPConn, parts...)
}

func (a *association) want(parts ...any) {
	a.t.Helper()
	b := make([]byte, 1<<16)
	n, from, err := a.ReadFromUDPAddrPort(b)
	if err != nil || from != a.relay {
		a.t.Fatalf("from %v: %v", from, err)
	}
	if want := join(parts...); !bytes.Equal(b[:n], want) {
		a.t.Fatalf("got % x, want % x", b[:min(n, 80)], want[:min(len(want), 80)])
	}
}

// bothKinds runs a test with sockets that move one datagram at a time, and with such that move many.
func bothKinds(t *testing.T, test func(*testing.T, func(*options))) {
	t.Run("singly", func(t *testing.T) { test(t, func(*options) {}) })
	t.Run("batches", func(t *testing.T) {
		test(t, func(o *options) {
			o.socks.ListenUDP = func(at netip.AddrPort) (socks5.AppConn, error) {
				return udp.ListenSocket(at, udp.Options{ShareBuffers: true})
			}
			o.net.packets = func() (proxy.PacketConn, error) {
				s, err := udp.ListenSocket(netip.AddrPort{}, udp.Options{})
				return &batchConn{s: s}, err
			}
		})
	})
}

// batchConn is a proxy.PacketConn of which only the batches are to be used.
type batchConn struct {
	proxy.PacketConn
	s *udp.Socket
}

func (c *batchConn) ReadBatch(room int) (datagrams [][]byte, from []netip.AddrPort, err error) {
	list, sender, err := c.s.ReadBatch()
	for _, b := range list {
		datagrams = append(datagrams, append(make([]byte, room), b...))
		from = append(from, sender)
	}
	return datagrams, from, err
}

func (c *batchConn) WriteBatch(datagrams [][]byte, to []netip.AddrPort) (int, error) {
	for i := range datagrams {
		if n, err := c.s.WriteBatch(datagrams[i:i+1], to[i]); n == 0 {
			return i, cmp.Or(err, error(syscall.EINVAL))
		}
	}
	return len(datagrams), nil
}

func (c *batchConn) LocalAddr() net.Addr { return c.s.LocalAddr() }
func (c *batchConn) Close() error        { return c.s.Close() }

// udpEcho answers each datagram; other answers the same from another port.
func udpEcho(t *testing.T, address string, other *net.UDPConn) *net.UDPAddr {
	t.Helper()
	c := listenUDP(t, address)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
			if other != nil {
				_, _ = other.WriteToUDPAddrPort(b[:n], from)
			}
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c.LocalAddr().(*net.UDPAddr)
}

func TestAssociate(t *testing.T) { bothKinds(t, testAssociate) }

func testAssociate(t *testing.T, kind func(*options)) {
	four := udpEcho(t, "127.0.0.1:0", nil)
	six := udpEcho(t, "[::1]:0", nil)
	one := netip.MustParseAddr("::1").As16()
	large := bytes.Repeat([]byte("x"), 65507-10)
	for _, tt := range []struct {
		name string
		send []byte
		want []byte
	}{
		{"ipv4", join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), "hi"), join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), "hi")},
		{"ipv6", join(0, 0, 0, 4, one[:], sport(six.Port), "hi"), join(0, 0, 0, 4, one[:], sport(six.Port), "hi")},
		{"name", join(0, 0, 0, sname("four.test"), sport(four.Port), "hi"), join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), "hi")},
		{"name of ipv6", join(0, 0, 0, sname("six.test"), sport(six.Port), "hi"), join(0, 0, 0, 4, one[:], sport(six.Port), "hi")},
		{"ipv4 as a name", join(0, 0, 0, sname("127.0.0.1"), sport(four.Port), "hi"), join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), "hi")},
		{"empty", join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port)), join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port))},
		{"large", join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), large), join(0, 0, 0, 1, 127, 0, 0, 1, sport(four.Port), large)},
	} {
		for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
			if tt.name == "large" && listen == "[::1]:0" {
				continue // one address family is enough for the size
			}
			t.Run(tt.name+" over "+listen, func(t *testing.T) {
				listenUDP(t, listen)
				g := start(t, kind, func(o *options) { o.listen = listen })
				a := g.associate(t, 0)
				for range 3 {
					a.send(tt.send)
					a.want(tt.want)
				}
				counted(t, "datagrams out", func() uint64 { return g.Stats().DatagramsOut }, 3)
				counted(t, "datagrams in", func() uint64 { return g.Stats().DatagramsIn }, 3)
				if n := g.Stats().OpenAssociations; n != 1 {
					t.Errorf("%d associations are open, want 1", n)
				}
			})
		}
	}
}

// TestAssociateEndpointIndependent sends to two servers from one port, and gets replies from a port never asked.
func TestAssociateEndpointIndependent(t *testing.T) { bothKinds(t, testAssociateEndpointIndependent) }

func testAssociateEndpointIndependent(t *testing.T, kind func(*options)) {
	g := start(t, kind)
	other := listenUDP(t, "127.0.0.1:0")
	first := udpEcho(t, "127.0.0.1:0", other)
	otherPort := other.LocalAddr().(*net.UDPAddr).Port
	a := g.associate(t, 0)
	a.send(0, 0, 0, 1, 127, 0, 0, 1, sport(first.Port), "one")
	a.want(0, 0, 0, 1, 127, 0, 0, 1, sport(first.Port), "one")
	a.want(0, 0, 0, 1, 127, 0, 0, 1, sport(otherPort), "one")

	second := listenUDP(t, "127.0.0.1:0")
	a.send(0, 0, 0, 1, 127, 0, 0, 1, sport(second.LocalAddr().(*net.UDPAddr).Port), "two")
	b := make([]byte, 10)
	_, mapped, err := second.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	third := listenUDP(t, "127.0.0.1:0")
	if _, err := third.WriteToUDPAddrPort([]byte("unasked"), mapped); err != nil {
		t.Fatal(err)
	}
	a.want(0, 0, 0, 1, 127, 0, 0, 1, sport(third.LocalAddr().(*net.UDPAddr).Port), "unasked")
}

func TestAssociateDrops(t *testing.T) { bothKinds(t, testAssociateDrops) }

func testAssociateDrops(t *testing.T, kind func(*options)) {
	g := start(t, kind)
	to := udpEcho(t, "127.0.0.1:0", nil)
	ok := join(0, 0, 0, 1, 127, 0, 0, 1, sport(to.Port), "hi")
	drops := func(name string) func() uint64 { return func() uint64 { return g.Stats().Drops[name] } }

	a := g.associate(t, 0)
	a.send(ok)
	a.want(ok)
	a.send(0, 0, 1, 1, 127, 0, 0, 1, sport(to.Port), "hi")
	counted(t, "fragment", drops("fragment"), 1)
	for i, bad := range [][]byte{
		{},
		{0},
		{0, 0, 0, 1},
		{0, 0, 0, 1, 127, 0, 0, 1, 0},
		{0, 0, 0, 2, 1, 1, 1, 1, 1, 1},
		{0, 0, 0, 3, 0, 0, 80},
		{0, 0, 0, 3, 9, 'a', 0, 80},
		{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0},
	} {
		a.send(bad)
		counted(t, "malformed", drops("malformed"), uint64(i+1))
	}
	a.send(0, 0, 0, sname("none.test"), sport(to.Port), "hi")
	counted(t, "name", drops("name"), 1)
	a.send(0, 0, 0, sname("none.test"), sport(to.Port), "hi") // remembered
	counted(t, "name", drops("name"), 2)
	a.send(0, 0, 0, sname("a b"), sport(to.Port), "hi")
	counted(t, "name", drops("name"), 3)
	a.send(0, 0, 0, 1, 127, 0, 0, 1, 0, 0, "port 0")
	counted(t, "send", drops("send"), 1)

	stranger := listenUDP(t, "127.0.0.1:0")
	a.sendFrom(stranger, ok)
	counted(t, "stranger", drops("stranger"), 1)
	elsewhere := listenUDP(t, "127.0.0.2:0")
	fresh := g.associate(t, 0)
	fresh.sendFrom(elsewhere, ok) // another address, though it is the first to speak
	counted(t, "stranger", drops("stranger"), 2)
	fresh.send(ok)
	fresh.want(ok)

	declared := g.associate(t, -1)
	declared.sendFrom(stranger, ok)
	counted(t, "stranger", drops("stranger"), 3)
	declared.send(ok)
	declared.want(ok)

	a.send(ok) // after all that it still works
	a.want(ok)
}

func TestAssociateEnds(t *testing.T) { bothKinds(t, testAssociateEnds) }

func testAssociateEnds(t *testing.T, kind func(*options)) {
	t.Run("with its connection", func(t *testing.T) {
		g := start(t, kind)
		a := g.associate(t, 0)
		a.tcp.send("what is said here is ignored")
		a.tcp.Close()
		counted(t, "open associations", func() uint64 { return uint64(g.Stats().OpenAssociations) }, 0)
		if c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(a.relay)); err != nil {
			t.Errorf("the port is still taken: %v", err)
		} else {
			c.Close()
		}
	})
	t.Run("idle", func(t *testing.T) {
		g := start(t, kind, func(o *options) { o.socks.UDPIdleTimeout = 50 * time.Millisecond })
		a := g.associate(t, 0)
		a.tcp.wantEnd()
		counted(t, "idle associations", func() uint64 { return g.Stats().IdleAssociations }, 1)
	})
	t.Run("too many", func(t *testing.T) {
		g := start(t, kind, func(o *options) { o.socks.MaxAssociations = 1 })
		a := g.associate(t, 0)
		c := g.client(t)
		c.greet()
		c.send(5, 3, 0, 1, 0, 0, 0, 0, 0, 0)
		c.want(5, 1, 0, 1, 0, 0, 0, 0, 0, 0)
		c.wantEnd()
		a.tcp.Close()
		counted(t, "open associations", func() uint64 { return uint64(g.Stats().OpenAssociations) }, 0)
		g.associate(t, 0)
	})
}

// TestAssociateSlowName has a name server that does not answer; other datagrams go on.
func TestAssociateSlowName(t *testing.T) { bothKinds(t, testAssociateSlowName) }

func testAssociateSlowName(t *testing.T, kind func(*options)) {
	answer := make(chan struct{})
	g := start(t, kind, func(o *options) {
		o.net.hosts["slow.test"] = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		o.net.look = func(ctx context.Context, name string) error {
			if name != "four.test" {
				select {
				case <-answer:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		}
	})
	to := udpEcho(t, "127.0.0.1:0", nil)
	reply := func(s string) []byte { return join(0, 0, 0, 1, 127, 0, 0, 1, sport(to.Port), s) }
	a := g.associate(t, 0)
	for range 20 {
		a.send(0, 0, 0, sname("slow.test"), sport(to.Port), "slow")
	}
	counted(t, "queue", func() uint64 { return g.Stats().Drops["queue"] }, 4) // 16 wait
	for i := range 7 {
		a.send(0, 0, 0, sname(string(rune('a'+i))+".slow"), sport(to.Port), "x") // 8 look-ups at once
	}
	a.send(0, 0, 0, sname("z.slow"), sport(to.Port), "x")
	counted(t, "queue", func() uint64 { return g.Stats().Drops["queue"] }, 5)
	a.send(reply("address"))
	a.want(reply("address"))
	close(answer)
	for range 16 {
		a.want(reply("slow"))
	}
	counted(t, "name", func() uint64 { return g.Stats().Drops["name"] }, 7)
	a.send(0, 0, 0, sname("four.test"), sport(to.Port), "later")
	a.want(reply("later"))
}

func TestBind(t *testing.T) {
	t.Run("works", func(t *testing.T) {
		g := start(t)
		for _, tt := range []struct {
			name    string
			request []byte
			reply   []byte
			room    int
		}{
			{"socks5", join(5, 1, 0, 5, 2, 0, 1, 127, 0, 0, 1, 0, 0), join(5, 0, 5, 0, 0, 1, 127, 0, 0, 1), 2},
			{"socks5, name", join(5, 1, 0, 5, 2, 0, sname("four.test"), 0, 0), join(5, 0, 5, 0, 0, 1, 127, 0, 0, 1), 2},
			{"socks5, anybody", join(5, 1, 0, 5, 2, 0, 1, 0, 0, 0, 0, 0, 0), join(5, 0, 5, 0, 0, 1, 127, 0, 0, 1), 2},
		} {
			t.Run(tt.name, func(t *testing.T) {
				c := g.client(t)
				c.send(tt.request)
				c.want(tt.reply)
				port := int(binary.BigEndian.Uint16(c.read(2)))
				peer, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
				if err != nil {
					t.Fatal(err)
				}
				defer peer.Close()
				c.want(5, 0, 0, 1, 127, 0, 0, 1, sport(peer.LocalAddr().(*net.TCPAddr).Port))
				if _, err := peer.Write([]byte("from the peer")); err != nil {
					t.Fatal(err)
				}
				c.want("from the peer")
				c.send("to the peer")
				b := make([]byte, 11)
				if _, err := io.ReadFull(peer, b); err != nil || string(b) != "to the peer" {
					t.Errorf("%q, %v", b, err)
				}
			})
		}
	})
	t.Run("socks4", func(t *testing.T) {
		g := start(t)
		c := g.client(t)
		c.send(4, 2, 0, 0, 127, 0, 0, 1, 0)
		c.want(0, 0x5a)
		port := int(binary.BigEndian.Uint16(c.read(2)))
		c.want(127, 0, 0, 1)
		peer, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		c.want(0, 0x5a, sport(peer.LocalAddr().(*net.TCPAddr).Port), 127, 0, 0, 1)
	})
	t.Run("strangers", func(t *testing.T) {
		g := start(t)
		c := g.client(t)
		c.greet()
		c.send(5, 2, 0, 1, 127, 0, 0, 2, 0, 0)
		c.want(5, 0, 0, 1, 127, 0, 0, 1)
		at := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(binary.BigEndian.Uint16(c.read(2)))}
		// The reset may come before the dial has looked at its result.
		if stranger, err := net.DialTCP("tcp", nil, at); err == nil {
			defer stranger.Close()
			_ = stranger.SetDeadline(time.Now().Add(patience))
			if _, err := io.ReadAll(stranger); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the stranger's connection ended with %v, want a reset", err)
			}
		} else if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		counted(t, "strangers", func() uint64 { return g.Stats().BindStrangers }, 1)
		peer, err := net.DialTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, at)
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		c.want(5, 0, 0, 1, 127, 0, 0, 2)
	})
	t.Run("times out", func(t *testing.T) {
		g := start(t, func(o *options) { o.socks.BindTimeout = 30 * time.Millisecond })
		c := g.client(t)
		c.greet()
		c.send(5, 2, 0, 1, 127, 0, 0, 1, 0, 0)
		c.want(5, 0, 0, 1, 127, 0, 0, 1)
		c.read(2)
		c.want(5, 6, 0, 1, 0, 0, 0, 0, 0, 0)
		c.wantEnd()
	})
	t.Run("hang-up", func(t *testing.T) {
		g := start(t)
		c := g.client(t)
		c.greet()
		c.send(5, 2, 0, 1, 127, 0, 0, 1, 0, 0)
		c.want(5, 0)
		c.Close()
		counted(t, "canceled", func() uint64 { return g.Stats().Failures["canceled"] }, 1)
	})
	for _, tt := range []struct {
		name string
		err  error
		code int
	}{
		{"not supported", fmt.Errorf("no way in: %w", proxy.ErrNotSupported), 7},
		{"not allowed", os.NewSyscallError("listen", syscall.EACCES), 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, func(o *options) { o.net.listenErr = tt.err })
			c := g.client(t)
			c.greet()
			c.send(5, 2, 0, 1, 127, 0, 0, 1, 0, 0)
			c.want(5, tt.code, 0, 1, 0, 0, 0, 0, 0, 0)
			c.wantEnd()
		})
	}
}

// TestAssociateBatch sends many datagrams in one message, so that they come as a batch: some by address, some by a name
// that is known, some that are dropped. Their order is kept.
func TestAssociateBatch(t *testing.T) { bothKinds(t, testAssociateBatch) }

func testAssociateBatch(t *testing.T, kind func(*options)) {
	g := start(t, kind)
	to := udpEcho(t, "127.0.0.1:0", nil)
	sender, err := udp.ListenSocket(netip.MustParseAddrPort("127.0.0.1:0"), udp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	a := g.associate(t, sender.LocalAddr().(*net.UDPAddr).Port)
	question := join(0, 0, 0, sname("four.test"), sport(to.Port), "the name is known from now on")
	if _, err := sender.WriteBatch([][]byte{question}, a.relay); err != nil {
		t.Fatal(err)
	}
	if _, _, err := sender.ReadBatch(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var list [][]byte
		for i := range 30 {
			name := join(0, 0, 0, sname("four.test"), sport(to.Port), i)
			switch i % 3 {
			case 0:
				list = append(list, name)
			case 1: // as long as the others, so that one message takes all
				list = append(list, join(0, 0, 0, 1, 127, 0, 0, 1, sport(to.Port), i, bytes.Repeat([]byte("."), len(name)-11)))
			case 2:
				list = append(list, bytes.Repeat([]byte{0, 0, 1}, len(name))[:len(name)])
			}
		}
		if n, err := sender.WriteBatch(list, a.relay); n != len(list) || err != nil {
			t.Fatal(n, err)
		}
		var got []byte
		for len(got) < 20 {
			list, from, err := sender.ReadBatch()
			if err != nil || from != a.relay {
				t.Fatal(from, err)
			}
			for _, d := range list {
				got = append(got, d[10])
			}
		}
		for i, n := range got {
			if want := byte(i/2*3 + i%2); n != want {
				t.Fatalf("datagram %d is number %d, want %d", i, n, want)
			}
		}
	}
	counted(t, "datagrams out", func() uint64 { return g.Stats().DatagramsOut }, 61)
	counted(t, "datagrams in", func() uint64 { return g.Stats().DatagramsIn }, 61)
	counted(t, "fragment", func() uint64 { return g.Stats().Drops["fragment"] }, 30)
}
