// Package gateway tests the whole road in one process, SOCKS to a real server
// on loopback, over an outer network that misbehaves: the netstacks at both ends
// are gVisor's, so the clock is the real one.
package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	socks "golang.org/x/net/proxy"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/socks5"
	"github.com/anytun-go/anytun/test/simnet"
)

// limit ends an exchange that hangs; the slowest takes a few seconds when the
// machine has nothing else to do.
const limit = 2 * time.Minute

var service = netip.MustParseAddrPort("203.0.113.1:4444")

// gateway is one client with its SOCKS port, one server, and the network that
// joins them.
type gateway struct {
	net    *simnet.Network
	client *client.Client
	host   *simnet.Host // the client's
	server *simnet.Host
	nat    *simnet.NAT
	socks  string
}

// world is what package proxy reaches the world with: the client's netstack.
type world struct{ *netstack.Dialer }

func (w world) ListenPacket(context.Context) (proxy.PacketConn, error) {
	return w.Stack.ListenUDP(netip.AddrPort{})
}

func (world) Listen(context.Context, netip.AddrPort) (net.Listener, error) {
	return nil, proxy.ErrNotSupported
}

func (w world) LookupNetIP(ctx context.Context, network, name string) ([]netip.Addr, error) {
	return w.Resolver.LookupNetIP(ctx, network, name)
}

func (w world) LookupAddr(ctx context.Context, a netip.Addr) (string, error) {
	return w.Resolver.LookupAddr(ctx, a)
}

func start(t *testing.T) *gateway {
	t.Helper()
	g := &gateway{net: simnet.New(1)}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	run := func(name string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	key, err := session.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		t.Fatal(err)
	}

	g.server = g.net.Host("server", service.Addr())
	serverConn, err := g.server.Listen(service)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := server.New(server.Config{
		Conns: []udp.Conn{serverConn}, Cluster: cluster, AllowLocal: true,
		Clients: server.NewDirectory([]server.Enrolment{{Key: key.Public(), Name: "test", Number: 5}}),
	})
	if err != nil {
		t.Fatal(err)
	}
	run("server", srv.Run)

	g.host = g.net.Host("client", netip.MustParseAddr("10.0.0.2"))
	g.nat = g.net.NAT(netip.MustParseAddr("192.0.2.1"), 0)
	g.host.Behind(g.nat)
	clientConn, err := g.host.Listen(netip.MustParseAddrPort("0.0.0.0:0"))
	if err != nil {
		t.Fatal(err)
	}
	up := make(chan client.Session, 8)
	var stack *netstack.Stack
	g.client, err = client.New(client.Config{
		Conn: clientConn, Servers: []netip.AddrPort{service}, ServerKey: cluster.Public(), Key: key,
		KeepAlive: time.Second,
		Input:     func(pkts [][]byte) { stack.Input(pkts) },
		OnSession: func(s client.Session) { up <- s },
	})
	if err != nil {
		t.Fatal(err)
	}
	if stack, err = netstack.New(netstack.Config{
		MTU: 1400, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Output: g.client.Output,
	}); err != nil {
		t.Fatal(err)
	}
	run("client", g.client.Run)
	s := <-up
	if err := errors.Join(stack.SetAddresses(s.Addresses[:]), stack.SetPortRange(s.FirstPort, s.LastPort)); err != nil {
		t.Fatal(err)
	}
	resolver := stack.Resolver([]netip.AddrPort{netip.AddrPortFrom(s.Gateways[0], 53)})
	p, err := proxy.New(proxy.Config{Network: world{&netstack.Dialer{Stack: stack, Resolver: resolver}}, SOCKS: socks5.New(socks5.Config{
		ListenUDP: func(at netip.AddrPort) (socks5.AppConn, error) {
			return udp.ListenSocket(at, udp.Options{ShareBuffers: true})
		},
	})})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.socks = l.Addr().String()
	run("proxy", func(ctx context.Context) error { return p.Serve(ctx, l) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
		if err := stack.Close(); err != nil {
			t.Errorf("close the netstack: %v", err)
		}
		g.net.Close()
	})
	return g
}

// destination answers each connection: 8 bytes say how many it wants, then come
// as many as the client likes until it has finished sending; the answer is the
// wanted bytes and the hash of what came.
func destination(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
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
				_ = c.SetDeadline(time.Now().Add(limit))
				var n [8]byte
				if _, err := io.ReadFull(c, n[:]); err != nil {
					return
				}
				sum := sha256.New()
				done := make(chan error, 1)
				go func() { _, err := io.Copy(sum, c); done <- err }()
				if _, err := c.Write(pattern(int(binary.BigEndian.Uint64(n[:])))); err != nil {
					return
				}
				if err := <-done; err != nil {
					return
				}
				_, _ = c.Write(sum.Sum(nil))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// pattern is n bytes of which no two stretches look alike.
func pattern(n int) []byte {
	b := make([]byte, (n+3)&^3)
	x := uint32(2463534242)
	for i := 0; i < len(b); i += 4 {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		binary.LittleEndian.PutUint32(b[i:], x)
	}
	return b[:n]
}

// exchange moves down and up bytes through the gateway at once and checks all.
func (g *gateway) exchange(t *testing.T, to string, down, up int) {
	t.Helper()
	d, err := socks.SOCKS5("tcp", g.socks, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial("tcp", to)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	sent := pattern(up)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Write(binary.BigEndian.AppendUint64(nil, uint64(down))); err != nil {
			t.Errorf("write: %v", err)
			return
		}
		if _, err := c.Write(sent); err != nil {
			t.Errorf("write: %v", err)
		}
	})
	got := make([]byte, down)
	n, err := io.ReadFull(c, got)
	wg.Wait()
	if err != nil {
		t.Fatalf("read after %d of %d bytes: %v", n, down, err)
	}
	if !bytes.Equal(got, pattern(down)) {
		t.Fatal("what came is not what was sent")
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatalf("half-close: %v", err)
	}
	sum, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("read after the half-close: %v", err)
	}
	if want := sha256.Sum256(sent); !bytes.Equal(sum, want[:]) {
		t.Fatal("what arrived there is not what was sent")
	}
}

func TestByteExact(t *testing.T) {
	for _, c := range []struct {
		name string
		link simnet.Link
		size int
	}{
		{"perfect", simnet.Link{}, 16 << 20},
		{"delay", simnet.Link{Delay: 5 * time.Millisecond}, 8 << 20},
		{"loss", simnet.Link{Delay: time.Millisecond, Loss: 0.01}, 2 << 20},
		{"reordering", simnet.Link{Delay: time.Millisecond, Jitter: 2 * time.Millisecond, Reorder: 0.05}, 4 << 20},
		{"duplicates and damage", simnet.Link{Duplicate: 0.05, Corrupt: 0.01}, 2 << 20},
		{"all of it", simnet.Link{Delay: 2 * time.Millisecond, Jitter: time.Millisecond, Loss: 0.005, Reorder: 0.02, Duplicate: 0.02, Corrupt: 0.002}, 1 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := start(t)
			to := destination(t)
			g.host.SetLinks(c.link, c.link)
			g.exchange(t, to, c.size, c.size)
			g.exchange(t, to, 0, 1)
			g.exchange(t, to, 1, 0)
		})
	}
}

// Connections outlive outages of the path and changes of the client's outer
// address while bytes flow both ways.
func TestOutagesAndRoaming(t *testing.T) {
	g := start(t)
	to := destination(t)
	// Slow enough that the exchange is still under way when things happen.
	slow := simnet.Link{Delay: 10 * time.Millisecond}
	lossy := simnet.Link{Delay: 10 * time.Millisecond, Loss: 1}
	g.host.SetLinks(slow, slow)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var events atomic.Int32
	wg.Go(func() {
		// Long enough between two events that what one broke can mend.
		tick := time.NewTicker(1200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			switch n := events.Add(1); n % 3 {
			case 0:
				g.nat.Rebind(netip.Addr{})
			case 1:
				g.nat.Rebind(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}))
			case 2:
				g.host.SetLinks(lossy, lossy)
				time.Sleep(200 * time.Millisecond)
				g.host.SetLinks(slow, slow)
			}
		}
	})
	for events.Load() < 6 {
		g.exchange(t, to, 4<<20, 2<<20)
	}
	close(stop)
	wg.Wait()
	// Nothing at all for longer than two keep-alive intervals: the session is
	// made anew, the connection lives on.
	g.host.SetLinks(slow, slow)
	done := make(chan struct{})
	go func() { defer close(done); g.exchange(t, to, 16<<20, 16<<20) }()
	time.Sleep(100 * time.Millisecond)
	g.server.Kill()
	time.Sleep(3 * time.Second)
	g.server.Revive()
	<-done
	if n := g.client.Stats().DeadPaths; n == 0 {
		t.Error("a path that was dead for three intervals wasn't noticed")
	}
}

// Names are resolved by the server; errors come back as what they are.
func TestDialErrors(t *testing.T) {
	g := start(t)
	d, err := socks.SOCKS5("tcp", g.socks, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	for _, c := range []struct{ to, want string }{
		{closed, "connection refused"},
		{"100.64.1.1:80", "host unreachable"}, // another client, which isn't there
		{"100.127.0.1:80", "host unreachable"},
		{"224.0.0.1:80", "network unreachable"},
		{"name.invalid:80", "host unreachable"},
	} {
		conn, err := d.Dial("tcp", c.to)
		if err == nil {
			conn.Close()
			t.Errorf("%s: connected", c.to)
			continue
		}
		if !bytes.Contains([]byte(err.Error()), []byte(c.want)) {
			t.Errorf("%s: %v, want %q", c.to, err, c.want)
		}
	}
	to := destination(t)
	_, port, _ := net.SplitHostPort(to)
	g.exchange(t, "localhost:"+port, 1000, 1000)
}
