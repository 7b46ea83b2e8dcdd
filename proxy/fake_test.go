package proxy_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/httpproxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// patience is how long a test waits for what should happen at once.
const patience = 10 * time.Second

// network is a proxy.Network made of the host's own sockets, with its own names and its own errors.
type network struct {
	mu    sync.Mutex
	hosts map[string][]netip.Addr
	fails map[string]error // by "host:port", for DialContext
	dial  func(ctx context.Context, address string) (net.Conn, error)
	look  func(ctx context.Context, name string) error // before each look-up

	listenErr error
	asked     []string                         // every address and name the proxy wanted
	packets   func() (proxy.PacketConn, error) // nil: a socket of package net
}

func newNetwork() *network {
	return &network{
		hosts: map[string][]netip.Addr{
			"four.test": {netip.MustParseAddr("127.0.0.1")},
			"six.test":  {netip.MustParseAddr("::1")},
			"both.test": {netip.MustParseAddr("::1"), netip.MustParseAddr("127.0.0.1")},
		},
		fails: map[string]error{},
	}
}

func (n *network) note(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, s)
}

func (n *network) DialContext(ctx context.Context, nw, address string) (net.Conn, error) {
	n.note(address)
	if nw != "tcp" {
		return nil, errors.New("not tcp")
	}
	if n.dial != nil {
		return n.dial(ctx, address)
	}
	if err := n.fails[address]; err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err != nil {
		addrs, err := n.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: nw, Err: err}
		}
		address = net.JoinHostPort(addrs[0].String(), port)
	}
	var d net.Dialer
	return d.DialContext(ctx, nw, address)
}

func (n *network) ListenPacket(context.Context) (proxy.PacketConn, error) {
	if n.packets != nil {
		return n.packets()
	}
	return net.ListenUDP("udp", nil)
}

func (n *network) Listen(ctx context.Context, peer netip.AddrPort) (net.Listener, error) {
	n.note(peer.String())
	if n.listenErr != nil {
		return nil, n.listenErr
	}
	var lc net.ListenConfig
	if peer.Addr().Is6() {
		return lc.Listen(ctx, "tcp", "[::1]:0")
	}
	return lc.Listen(ctx, "tcp", "127.0.0.1:0")
}

func (n *network) LookupNetIP(ctx context.Context, _, name string) ([]netip.Addr, error) {
	n.note(name)
	if n.look != nil {
		if err := n.look(ctx, name); err != nil {
			return nil, err
		}
	}
	if addrs, ok := n.hosts[name]; ok {
		return addrs, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

func (n *network) LookupAddr(_ context.Context, addr netip.Addr) (string, error) {
	if addr == netip.MustParseAddr("192.0.2.1") {
		return "one.test.", nil
	}
	return "", &net.DNSError{Err: "no such host", Name: addr.String(), IsNotFound: true}
}

// gateway is a running server.
type gateway struct {
	*proxy.Server
	addr    string
	network *network
	stop    context.CancelFunc
	served  chan error
}

type options struct {
	proxy.Config
	socks  socks5.Config
	http   httpproxy.Config
	listen string
	net    *network
}

// start runs a server until the test ends, and then looks for goroutines it left.
func start(t *testing.T, change ...func(*options)) *gateway {
	t.Helper()
	before := runtime.NumGoroutine()
	o := options{listen: "127.0.0.1:0", net: newNetwork()}
	for _, f := range change {
		f(&o)
	}
	o.Network = o.net
	o.SOCKS = socks5.New(o.socks)
	o.HTTP = httpproxy.New(o.http)
	s, err := proxy.New(o.Config)
	if err != nil {
		t.Fatal(err)
	}
	l, err := proxy.Listen(t.Context(), o.listen)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &gateway{Server: s, addr: l.Addr().String(), network: o.net, stop: cancel, served: make(chan error, 1)}
	go func() { g.served <- s.Serve(ctx, l) }()
	// All its goroutines must be there before somebody else takes the number of goroutines for the state of rest.
	n := running.Add(1)
	eventually(t, func() bool { return int64(strings.Count(stacks(), ").acceptLoop(")) >= n }, func() {
		t.Error("the server does not begin to accept")
	})
	t.Cleanup(func() {
		running.Add(-1)
		cancel()
		select {
		case err := <-g.served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Fatal("Serve did not return")
		}
		if n := s.Stats().OpenConns; n != 0 {
			t.Errorf("%d connections are still open", n)
		}
		eventually(t, func() bool { return runtime.NumGoroutine() <= before }, func() {
			t.Errorf("goroutines left:\n%s", stacks())
		})
	})
	return g
}

// running is the number of gateways.
var running atomic.Int64

func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// eventually waits for a condition, and complains if it never comes.
func eventually(t *testing.T, ok func() bool, complain func()) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			complain()
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// counted waits until a counter has a value.
func counted(t *testing.T, what string, get func() uint64, want uint64) {
	t.Helper()
	eventually(t, func() bool { return get() == want }, func() { t.Errorf("%s is %d, want %d", what, get(), want) })
}

// client is an application's connection with a deadline and checks.
type client struct {
	*net.TCPConn
	t *testing.T
}

func (g *gateway) client(t *testing.T) *client {
	t.Helper()
	nc, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &client{nc.(*net.TCPConn), t}
}

func (c *client) send(p ...any) {
	c.t.Helper()
	if _, err := c.Write(join(p...)); err != nil {
		c.t.Fatal(err)
	}
}

// join makes bytes of numbers, strings and byte slices.
func join(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			b = append(b, byte(p))
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic("join: not a part")
		}
	}
	return b
}

func (c *client) want(parts ...any) {
	c.t.Helper()
	want := join(parts...)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil {
		c.t.Fatalf("got % x and %v, want % x", got[:n], err, want)
	}
	if string(got) != string(want) {
		c.t.Fatalf("got % x (%q), want % x", got, got, want)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if n, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("got % x and %v", b[:n], err)
	}
	return b
}

// wantEnd checks that nothing more comes and the connection ends properly.
func (c *client) wantEnd() {
	c.t.Helper()
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		c.t.Fatalf("got %q and %v, want the end", rest, err)
	}
}

func (c *client) wantReset() {
	c.t.Helper()
	if rest, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("got %d bytes and %v, want a reset", len(rest), err)
	}
}

// greet does the SOCKS5 greeting without a password.
func (c *client) greet() {
	c.t.Helper()
	c.send(5, 1, 0)
	c.want(5, 0)
}

// sport is a port as SOCKS writes it.
func sport(port int) []byte { return []byte{byte(port >> 8), byte(port)} }

// sname is a name as SOCKS5 writes it.
func sname(s string) []byte { return join(3, len(s), s) }

// serveTCP runs a server until the test ends; its connections are closed when handle returns.
func serveTCP(t *testing.T, address string, handle func(*net.TCPConn)) *net.TCPAddr {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		if strings.Contains(address, "::1") && !errors.Is(err, syscall.EADDRINUSE) {
			t.Skipf("this host has no IPv6 loopback: %v", err)
		}
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience))
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr)
}

// echo returns what it gets until the end, and then ends.
func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

// connect4 opens a SOCKS5 tunnel to an IPv4 server.
func (c *client) connect4(to *net.TCPAddr) {
	c.t.Helper()
	c.greet()
	c.send(5, 1, 0, 1, []byte(to.IP.To4()), sport(to.Port))
	c.want(5, 0, 0, 1, 127, 0, 0, 1)
	c.read(2)
}
