package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

func TestSOCKS5Connect(t *testing.T) {
	g := start(t)
	four, six := serveTCP(t, "127.0.0.1:0", echo), serveTCP(t, "[::1]:0", echo)
	six16 := []byte(six.IP.To16())
	for _, tt := range []struct {
		name    string
		address []byte
		port    int
		asked   string
	}{
		{"ipv4", join(1, 127, 0, 0, 1), four.Port, "127.0.0.1"},
		{"ipv6", join(4, six16), six.Port, "[::1]"},
		{"ipv4 mapped", join(4, []byte(net.IPv4(127, 0, 0, 1).To16())), four.Port, "127.0.0.1"},
		{"name", sname("four.test"), four.Port, "four.test"},
		{"name of ipv6", sname("six.test"), six.Port, "six.test"},
		{"ipv4 as a name", sname("127.0.0.1"), four.Port, "127.0.0.1"},
		{"ipv6 as a name", sname("::1"), six.Port, "[::1]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.client(t)
			c.greet()
			c.send(5, 1, 0, tt.address, sport(tt.port))
			head := c.read(4)
			if head[0] != 5 || head[1] != 0 {
				t.Fatalf("reply % x", head)
			}
			size := map[byte]int{1: 4, 4: 16}[head[3]]
			bound, _ := netip.AddrFromSlice(c.read(size))
			if !bound.IsLoopback() || bytes.Equal(c.read(2), []byte{0, 0}) {
				t.Errorf("BND.ADDR is %v or its port 0", bound)
			}
			c.send("hello")
			c.want("hello")
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			c.wantEnd()
			want := fmt.Sprintf("%s:%d", tt.asked, tt.port)
			g.network.mu.Lock()
			defer g.network.mu.Unlock()
			if got := strings.Join(g.network.asked, " "); !strings.Contains(got, want) {
				t.Errorf("the network was asked for %s, want %s", got, want)
			}
		})
	}
}

// TestReplyCodes has one row per way to fail, and what each protocol says about it.
func TestReplyCodes(t *testing.T) {
	op := func(errno syscall.Errno) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
	}
	for _, tt := range []struct {
		name   string
		err    error
		socks5 byte
		socks4 byte
		http   string
		status string
		reason proxy.Reason
	}{
		{"refused", op(syscall.ECONNREFUSED), 5, 0x5b, "502", "connection_refused", proxy.ReasonRefused},
		{"host unreachable", op(syscall.EHOSTUNREACH), 4, 0x5b, "502", "destination_unavailable", proxy.ReasonHostUnreachable},
		{"net unreachable", op(syscall.ENETUNREACH), 3, 0x5b, "502", "destination_ip_unroutable", proxy.ReasonNetUnreachable},
		{"timed out", op(syscall.ETIMEDOUT), 6, 0x5b, "504", "connection_timeout", proxy.ReasonTimedOut},
		{"deadline", context.DeadlineExceeded, 6, 0x5b, "504", "connection_timeout", proxy.ReasonTimedOut},
		{"not allowed", op(syscall.EACCES), 2, 0x5b, "403", "destination_ip_prohibited", proxy.ReasonNotAllowed},
		{"no ports", op(syscall.EADDRNOTAVAIL), 1, 0x5b, "503", "connection_limit_reached", proxy.ReasonNoPorts},
		{"no such name", &net.DNSError{IsNotFound: true}, 4, 0x5b, "502", "dns_error", proxy.ReasonUnknownName},
		{"name timeout", &net.DNSError{IsTimeout: true}, 4, 0x5b, "504", "dns_timeout", proxy.ReasonNameTimeout},
		{"name failure", &net.DNSError{}, 4, 0x5b, "502", "dns_error", proxy.ReasonNameFailure},
		{"not supported", fmt.Errorf("x: %w", proxy.ErrNotSupported), 7, 0x5b, "501", "proxy_internal_error", proxy.ReasonNotSupported},
		{"other", errors.New("strange"), 1, 0x5b, "502", "proxy_internal_error", proxy.ReasonOther},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, func(o *options) { o.net.fails["fail.test:80"] = tt.err })
			c := g.client(t)
			c.greet()
			c.send(5, 1, 0, sname("fail.test"), sport(80))
			c.want(5, int(tt.socks5), 0, 1, 0, 0, 0, 0, 0, 0)
			c.wantEnd()

			c = g.client(t)
			c.send(4, 1, sport(80), 0, 0, 0, 1, "me", 0, "fail.test", 0)
			c.want(0, int(tt.socks4), 0, 0, 0, 0, 0, 0)
			c.wantEnd()

			c = g.client(t)
			c.send("CONNECT fail.test:80 HTTP/1.1\r\nHost: fail.test:80\r\n\r\n")
			got, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 "+tt.http+" ") ||
				!strings.Contains(string(got), "\r\nProxy-Status: anytun-proxy; error="+tt.status+"\r\n") {
				t.Errorf("CONNECT: %q, %v", got, err)
			}

			c = g.client(t)
			c.send("GET http://fail.test:80/ HTTP/1.1\r\nHost: fail.test:80\r\nConnection: close\r\n\r\n")
			got, err = io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 "+tt.http+" ") ||
				!strings.Contains(string(got), "\r\nProxy-Status: anytun-proxy; error="+tt.status+"\r\n") {
				t.Errorf("GET: %q, %v", got, err)
			}
			if n := g.Stats().Failures[tt.reason.String()]; n != 4 {
				t.Errorf("%d failures counted as %s, want 4", n, tt.reason)
			}
		})
	}
}

func TestSOCKS5Malformed(t *testing.T) {
	g := start(t)
	failed := []byte{5, 1, 0, 1, 0, 0, 0, 0, 0, 0}
	code := func(b byte) []byte { return []byte{5, b, 0, 1, 0, 0, 0, 0, 0, 0} }
	ok := []byte{5, 0}
	for _, tt := range []struct {
		name   string
		send   []byte
		want   []byte
		reason proxy.Reason
	}{
		{"greeting cut short", join(5), join(5, 0xff), proxy.ReasonMalformed},
		{"methods cut short", join(5, 3, 0), join(5, 0xff), proxy.ReasonMalformed},
		{"no methods", join(5, 0), join(5, 0xff), proxy.ReasonAuth},
		{"gssapi only", join(5, 1, 1), join(5, 0xff), proxy.ReasonAuth},
		{"wrong version", join(5, 1, 0, 4, 1, 0, 1, 127, 0, 0, 1, 0, 80), join(ok, failed), proxy.ReasonMalformed},
		{"request cut short", join(5, 1, 0, 5, 1, 0, 1, 127), join(ok, failed), proxy.ReasonMalformed},
		{"unknown command", join(5, 1, 0, 5, 9, 0, 1, 127, 0, 0, 1, 0, 80), join(ok, code(7)), proxy.ReasonCommand},
		{"unknown address type", join(5, 1, 0, 5, 1, 0, 2, 127, 0, 0, 1, 0, 80), join(ok, code(8)), proxy.ReasonAddressType},
		{"empty name", join(5, 1, 0, 5, 1, 0, 3, 0, 0, 80), join(ok, code(4)), proxy.ReasonUnknownName},
		{"name with a blank", join(5, 1, 0, 5, 1, 0, sname("a b"), 0, 80), join(ok, code(4)), proxy.ReasonUnknownName},
		{"name with a port", join(5, 1, 0, 5, 1, 0, sname("a:1"), 0, 80), join(ok, code(4)), proxy.ReasonUnknownName},
		{"address with a zone", join(5, 1, 0, 5, 1, 0, sname("fe80::1%lo"), 0, 80), join(ok, code(4)), proxy.ReasonUnknownName},
		{"password version", join(5, 1, 2, 9, 1, "u", 1, "p"), join(5, 2, 1, 1), proxy.ReasonMalformed},
		{"password cut short", join(5, 1, 2, 1, 9, "u"), join(5, 2, 1, 1), proxy.ReasonMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := g.Stats().Failures[tt.reason.String()]
			c := g.client(t)
			c.send(tt.send)
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			c.want(tt.want)
			c.wantEnd()
			if n := g.Stats().Failures[tt.reason.String()] - before; n != 1 {
				t.Errorf("%d failures counted as %s, want 1", n, tt.reason)
			}
		})
	}
	g.network.mu.Lock()
	defer g.network.mu.Unlock()
	if len(g.network.asked) > 0 {
		t.Errorf("the network was asked for %v", g.network.asked)
	}
}

// TestSOCKS5Pieces sends every byte by itself.
func TestSOCKS5Pieces(t *testing.T) {
	g := start(t)
	to := serveTCP(t, "127.0.0.1:0", echo)
	c := g.client(t)
	if err := c.SetNoDelay(true); err != nil {
		t.Fatal(err)
	}
	for _, b := range join(5, 2, 0, 2) {
		c.send(int(b))
		time.Sleep(time.Millisecond)
	}
	c.want(5, 0)
	for _, b := range join(5, 1, 0, sname("four.test"), sport(to.Port)) {
		c.send(int(b))
		time.Sleep(time.Millisecond)
	}
	c.want(5, 0, 0, 1)
	c.read(6)
	c.send("x")
	c.want("x")
}

func TestSOCKS4(t *testing.T) {
	g := start(t)
	to := serveTCP(t, "127.0.0.1:0", echo)
	long := strings.Repeat("x", 300)
	for _, tt := range []struct {
		name string
		send []byte
		code int
	}{
		{"address", join(4, 1, sport(to.Port), 127, 0, 0, 1, "me", 0), 0x5a},
		{"no user id", join(4, 1, sport(to.Port), 127, 0, 0, 1, 0), 0x5a},
		{"4a name", join(4, 1, sport(to.Port), 0, 0, 0, 1, "me", 0, "four.test", 0), 0x5a},
		{"4a unknown name", join(4, 1, sport(to.Port), 0, 0, 0, 9, 0, "none.test", 0), 0x5b},
		{"4a empty name", join(4, 1, sport(to.Port), 0, 0, 0, 9, 0, 0), 0x5b},
		{"4a name too long", join(4, 1, sport(to.Port), 0, 0, 0, 9, 0, long, 0), 0x5b},
		{"user id too long", join(4, 1, sport(to.Port), 127, 0, 0, 1, long, 0), 0x5b},
		{"unknown command", join(4, 7, sport(to.Port), 127, 0, 0, 1, 0), 0x5b},
		{"cut short", join(4, 1, 0), 0x5b},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.client(t)
			c.send(tt.send)
			if tt.code == 0x5b {
				if err := c.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				c.want(0, 0x5b, 0, 0, 0, 0, 0, 0)
				c.wantEnd()
				return
			}
			c.want(0, 0x5a)
			c.read(6)
			c.send("hello")
			c.want("hello")
		})
	}
}

func TestUnknownProtocol(t *testing.T) {
	g := start(t)
	for i, first := range []byte{0, 3, 6, 0x16, ' ', 0x80, 0xff} {
		c := g.client(t)
		c.send(int(first), "something")
		if rest, _ := io.ReadAll(c); len(rest) > 0 { // the end or a reset
			t.Errorf("first byte %#x: got %q", first, rest)
		}
		counted(t, "unknown_protocol", func() uint64 { return g.Stats().Failures["unknown_protocol"] }, uint64(i+1))
	}
}

func TestEarlyData(t *testing.T) {
	// More than is kept while dialing, so that the rest waits in the kernel.
	data := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
	received := make(chan []byte, 1)
	to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		received <- b
		_, _ = c.Write([]byte("done"))
	})
	for _, tt := range []struct {
		name  string
		send  []byte
		reply []byte
	}{
		{"socks5", join(5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, sport(to.Port)), join(5, 0, 5, 0, 0, 1, 127, 0, 0, 1)},
		{"socks4", join(4, 1, sport(to.Port), 127, 0, 0, 1, 0), join(0, 0x5a)},
		{"http", join(fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", to)), join("HTTP/1.1 200 Connection established\r\n\r\n")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			release := make(chan struct{})
			g := start(t, func(o *options) {
				o.net.dial = func(ctx context.Context, address string) (net.Conn, error) {
					<-release
					return (&net.Dialer{}).DialContext(ctx, "tcp", address)
				}
			})
			c := g.client(t)
			go func() { // ends with the connection
				_, _ = c.Write(append(tt.send, data...))
				_ = c.CloseWrite()
			}()
			time.Sleep(20 * time.Millisecond) // so that the data comes before the reply
			close(release)
			c.want(tt.reply)
			switch tt.name {
			case "socks5":
				c.read(2)
			case "socks4":
				c.read(6)
			}
			if got := <-received; !bytes.Equal(got, data) {
				t.Errorf("the server got %d bytes, want %d", len(got), len(data))
			}
			c.want("done")
			c.wantEnd()
		})
	}
}

// TestHangUp proves that an application's hang-up cancels the dial in progress.
func TestHangUp(t *testing.T) {
	for _, tt := range []struct {
		name  string
		send  []byte
		reset bool
	}{
		{"socks5", join(5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80), false},
		{"socks5, reset", join(5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80), true},
		{"socks5, reset behind early data", join(5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80, "early"), true},
		{"socks4", join(4, 1, 0, 80, 127, 0, 0, 1, 0), false},
		{"http connect", join("CONNECT 127.0.0.1:80 HTTP/1.1\r\n\r\n"), false},
		{"http forward", join("GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dialing, cancelled := make(chan struct{}), make(chan struct{})
			g := start(t, func(o *options) {
				o.net.dial = func(ctx context.Context, _ string) (net.Conn, error) {
					close(dialing)
					<-ctx.Done()
					close(cancelled)
					return nil, ctx.Err()
				}
			})
			c := g.client(t)
			c.send(tt.send)
			<-dialing
			if tt.reset {
				if err := c.SetLinger(0); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
			select {
			case <-cancelled:
			case <-time.After(patience):
				t.Fatal("the dial was not cancelled")
			}
			counted(t, "canceled", func() uint64 { return g.Stats().Failures["canceled"] }, 1)
		})
	}
}

// TestDialTimeout lets the network never answer.
func TestDialTimeout(t *testing.T) {
	g := start(t, func(o *options) {
		o.DialTimeout = 30 * time.Millisecond
		o.net.dial = func(ctx context.Context, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	c := g.client(t)
	c.greet()
	c.send(5, 1, 0, 1, 127, 0, 0, 1, 0, 80)
	c.want(5, 6)
	c = g.client(t)
	c.send("GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
	c.want("HTTP/1.1 504")
}

func TestResolve(t *testing.T) {
	g := start(t)
	six := netip.MustParseAddr("::1").As16()
	for _, tt := range []struct {
		name    string
		command int
		address []byte
		want    []byte
	}{
		{"name", 0xf0, sname("four.test"), join(5, 0, 0, 1, 127, 0, 0, 1, 0, 0)},
		{"name of ipv6", 0xf0, sname("six.test"), join(5, 0, 0, 4, six[:], 0, 0)},
		{"ipv4 is preferred", 0xf0, sname("both.test"), join(5, 0, 0, 1, 127, 0, 0, 1, 0, 0)},
		{"address", 0xf0, sname("192.0.2.7"), join(5, 0, 0, 1, 192, 0, 2, 7, 0, 0)},
		{"unknown", 0xf0, sname("none.test"), join(5, 4, 0, 1, 0, 0, 0, 0, 0, 0)},
		{"ptr", 0xf1, join(1, 192, 0, 2, 1), join(5, 0, 0, 3, 8, "one.test", 0, 0)},
		{"ptr of an address as a name", 0xf1, sname("192.0.2.1"), join(5, 0, 0, 3, 8, "one.test", 0, 0)},
		{"ptr unknown", 0xf1, join(1, 192, 0, 2, 2), join(5, 4, 0, 1, 0, 0, 0, 0, 0, 0)},
		{"ptr of a name", 0xf1, sname("four.test"), join(5, 8, 0, 1, 0, 0, 0, 0, 0, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.client(t)
			c.greet()
			c.send(5, tt.command, 0, tt.address, 0, 0)
			c.want(tt.want)
			c.wantEnd()
		})
	}
}
