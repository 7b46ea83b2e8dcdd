package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/test/simnet"
)

// An anycast cluster with egress by devices, all of it in memory: the client's
// netstack, the simulated network, three servers, and behind their devices an
// Internet that is one host with a netstack. What that host sends enters at
// whichever server the test says.

var (
	egress = netip.MustParseAddr("203.0.113.2")
	far    = netip.MustParseAddr("192.0.2.80")
)

// servers is how many a cluster has.
const servers = 3

// internet is the far host and the ways to it.
type internet struct {
	stack   *netstack.Stack
	devices []*device
	// way is the server at which packets to the egress address enter; -1: each
	// packet at any.
	way atomic.Int32
}

// device is a server's. Packets wait in a bounded queue, as in a real one.
type device struct {
	net    *internet
	queue  chan []byte // whole buffers, with room around the packet
	dead   atomic.Bool // the server's host is
	once   sync.Once
	closed chan struct{}
}

func (d *device) ReadBatch() ([][]byte, error) {
	var list [][]byte
	select {
	case <-d.closed:
		return nil, net.ErrClosed
	case b := <-d.queue:
		list = append(list, b)
	}
	for len(list) < 128 {
		select {
		case b := <-d.queue:
			list = append(list, b)
			continue
		default:
		}
		break
	}
	return list, nil
}

func (d *device) WriteBatch(pkts [][]byte) {
	if !d.dead.Load() {
		d.net.stack.Input(pkts)
	}
}

func (d *device) Close() error { d.once.Do(func() { close(d.closed) }); return nil }

// output takes what the far host sends.
func (n *internet) output(bufs [][]byte) {
	for _, b := range bufs {
		way := int(n.way.Load())
		if way < 0 {
			way = rand.IntN(len(n.devices))
		}
		d := n.devices[way]
		if d.dead.Load() {
			continue
		}
		select {
		case d.queue <- slices.Clone(b):
		default: // full: lost
		}
	}
}

// cluster is all of it.
type cluster struct {
	*internet
	net    *simnet.Network
	host   *simnet.Host // the client's
	nat    *simnet.NAT
	hosts  []*simnet.Host
	hub    *registry.Hub
	client *client.Client
	near   *netstack.Stack // the client's
	other  *netstack.Stack // and that of another client
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{net: simnet.New(1), internet: new(internet), hub: registry.NewHub()}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	run := func(name string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := session.NewPrivateKey()
	must(err)
	otherKey, err := session.NewPrivateKey()
	must(err)
	enrolled := server.NewDirectory([]server.Enrolment{
		{Key: key.Public(), Name: "test", Number: 5}, {Key: otherKey.Public(), Name: "other", Number: 6},
	})
	keys, err := session.NewCluster(time.Now())
	must(err)
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{egress}, nil, netip.Prefix{})
	must(err)
	c.stack, err = netstack.New(netstack.Config{MTU: 1400, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Output: c.output})
	must(err)
	must(c.stack.SetAddresses([]netip.Addr{far}))
	for i := range servers {
		h := c.net.Host(fmt.Sprint("server ", i+1), netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 1)}))
		c.net.Announce(service.Addr(), h)
		conn, err := h.Listen(service)
		must(err)
		d := &device{net: c.internet, queue: make(chan []byte, 4096), closed: make(chan struct{})}
		srv, err := server.New(server.Config{
			Conns: []udp.Conn{conn}, Cluster: keys, Number: uint16(i + 1), Registry: c.hub.Join(fmt.Sprint(i)), Device: d, Plan: plan,
			Clients: enrolled,
		})
		must(err)
		c.hosts, c.devices = append(c.hosts, h), append(c.devices, d)
		run("server", srv.Run)
	}
	connect := func(h *simnet.Host, key session.PrivateKey, number uint16) (*client.Client, *netstack.Stack) {
		conn, err := h.Listen(netip.MustParseAddrPort("0.0.0.0:0"))
		must(err)
		up := make(chan client.Session, 8)
		var stack *netstack.Stack
		engine, err := client.New(client.Config{
			Conn: conn, Servers: []netip.AddrPort{service}, ServerKey: keys.Public(), Key: key, KeepAlive: time.Second,
			Input:     func(pkts [][]byte) { stack.Input(pkts) },
			OnSession: func(s client.Session) { up <- s },
		})
		must(err)
		stack, err = netstack.New(netstack.Config{MTU: 1400, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Output: engine.Output})
		must(err)
		run("client", engine.Run)
		s := <-up
		if !s.PublicPort || s.FirstPort != 1024*number || s.Public[0] != egress {
			t.Fatalf("client %d was given ports from %d of %v, public %v", number, s.FirstPort, s.Public[0], s.PublicPort)
		}
		must(errors.Join(stack.SetAddresses(s.Addresses[:1]), stack.SetPortRange(s.FirstPort, s.LastPort)))
		return engine, stack
	}
	c.host = c.net.Host("client", netip.MustParseAddr("10.0.0.2"))
	c.nat = c.net.NAT(netip.MustParseAddr("192.0.2.1"), 0)
	c.host.Behind(c.nat)
	c.client, c.near = connect(c.host, key, 5)
	_, c.other = connect(c.net.Host("other client", netip.MustParseAddr("10.0.0.3")), otherKey, 6)
	t.Cleanup(func() {
		stop()
		wg.Wait()
		for _, s := range []*netstack.Stack{c.near, c.other, c.stack} {
			if err := s.Close(); err != nil {
				t.Errorf("close a netstack: %v", err)
			}
		}
		c.net.Close()
	})
	return c
}

// kill makes a server's host vanish.
func (c *cluster) kill(i int) {
	c.hosts[i].Kill()
	c.devices[i].dead.Store(true)
}

// via leads both the client's packets and the far host's to one server each.
func (c *cluster) via(client, far int) {
	c.net.SetRoute(c.host, service.Addr(), c.hosts[client])
	c.way.Store(int32(far))
}

// listen makes the far host answer connections as destination does.
func (c *cluster) listen(t *testing.T, n int) netip.AddrPort {
	t.Helper()
	at := netip.AddrPortFrom(far, 80)
	answer(t, c.stack, at, n)
	return at
}

func answer(t *testing.T, s *netstack.Stack, at netip.AddrPort, n int) net.Addr {
	t.Helper()
	l, err := s.ListenTCP(at)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serveOne(conn, n) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr()
}

// serveOne sends n bytes while it hashes what comes, and the hash in the end.
func serveOne(conn net.Conn, n int) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(limit))
	sum := sha256.New()
	done := make(chan error, 1)
	go func() { _, err := io.Copy(sum, conn); done <- err }()
	if _, err := conn.Write(pattern(n)); err != nil {
		return
	}
	if err := <-done; err == nil {
		_, _ = conn.Write(sum.Sum(nil))
	}
}

// transfer moves n bytes each way over one connection, and checks them all. at is
// called once, in the middle.
func (c *cluster) transfer(t *testing.T, to netip.AddrPort, n int, at func()) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := c.near.DialTCP(ctx, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	sent := pattern(n)
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- errors.Join(err, conn.CloseWrite())
	}()
	got := make([]byte, n)
	if _, err := io.ReadFull(conn, got[:n/2]); err != nil {
		return fmt.Errorf("first half: %w", err)
	}
	if at != nil {
		at()
	}
	if _, err := io.ReadFull(conn, got[n/2:]); err != nil {
		return fmt.Errorf("second half: %w", err)
	}
	if !bytes.Equal(got, sent) {
		return errors.New("other bytes came than were sent")
	}
	if err := <-wrote; err != nil {
		return err
	}
	sum := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, sum); err != nil {
		return fmt.Errorf("hash: %w", err)
	}
	if want := sha256.Sum256(sent); !bytes.Equal(sum, want[:]) {
		return errors.New("other bytes arrived than were sent")
	}
	return nil
}

func TestClusterServerDies(t *testing.T) {
	c := startCluster(t)
	const n = 4 << 20
	to := c.listen(t, n)
	c.via(0, 1)
	if err := c.transfer(t, to, n, func() {
		c.kill(0) // which the client uses
		c.via(2, 1)
	}); err != nil {
		t.Errorf("the client's server died: %v", err)
	}
	if err := c.transfer(t, to, n, func() {
		c.kill(1) // which the far host uses
		c.via(2, 2)
	}); err != nil {
		t.Errorf("the far host's server died: %v", err)
	}
}

func TestClusterSprayed(t *testing.T) {
	c := startCluster(t)
	const n = 4 << 20
	to := c.listen(t, n)
	c.net.Spray(service.Addr(), true)
	c.way.Store(-1)
	if err := c.transfer(t, to, n, nil); err != nil {
		t.Error(err)
	}
	// Segments are large, so 4 MiB each way may be no more than some hundred packets.
	if n := c.client.Status().ServerChanges; n < 10 {
		t.Errorf("%d changes of server: the packets came from one", n)
	}
}

func TestClusterRoutesFlip(t *testing.T) {
	c := startCluster(t)
	const n = 8 << 20
	to := c.listen(t, n)
	c.via(0, 0)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for i := 1; ; i++ {
			select {
			case <-done:
				return
			case <-tick.C:
				c.via(i%servers, i/2%servers)
			}
		}
	})
	for range 3 {
		if err := c.transfer(t, to, n, nil); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

func TestClusterClientMoves(t *testing.T) {
	c := startCluster(t)
	const n = 4 << 20
	to := c.listen(t, n)
	c.via(0, 1)
	for i := range 3 {
		if err := c.transfer(t, to, n, func() { c.nat.Rebind(netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)})) }); err != nil {
			t.Error(err)
		}
	}
}

// One client reaches another by its public port: nothing leaves the cluster, not
// even when every packet takes another server.
func TestClusterHairpin(t *testing.T) {
	c := startCluster(t)
	const n = 1 << 20
	port := answer(t, c.other, netip.AddrPort{}, n).(*net.TCPAddr).AddrPort().Port()
	for _, sprayed := range []bool{false, true} {
		c.net.Spray(service.Addr(), sprayed)
		if err := c.transfer(t, netip.AddrPortFrom(egress, port), n, nil); err != nil {
			t.Errorf("sprayed %v: %v", sprayed, err)
		}
	}
	if in := c.stack.Stats().PacketsIn; in != 0 {
		t.Errorf("%d packets left the cluster", in)
	}
}
