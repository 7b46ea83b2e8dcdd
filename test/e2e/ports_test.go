package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	ip "github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/test/simnet"
)

// kernel stands for the host behind a server's device: it answers every UDP
// datagram to where it came from.
type kernel struct {
	mu      sync.Mutex
	sources []netip.AddrPort
	back    chan []byte
	closed  chan struct{}
	once    sync.Once
}

func newKernel() *kernel { return &kernel{back: make(chan []byte, 64), closed: make(chan struct{})} }

func (k *kernel) ReadBatch() ([][]byte, error) {
	select {
	case b := <-k.back:
		return [][]byte{b}, nil
	case <-k.closed:
		return nil, net.ErrClosed
	}
}

func (k *kernel) WriteBatch(pkts [][]byte) {
	for _, p := range pkts {
		var v ip.View
		if v.Parse(p) != ip.OK || v.Protocol != ip.UDP {
			continue
		}
		k.mu.Lock()
		k.sources = append(k.sources, netip.AddrPortFrom(v.Source, v.SourcePort))
		k.mu.Unlock()
		b := make([]byte, wire.Overhead+len(p))
		copy(b[wire.DataHeaderLen:], p)
		v.Parse(b[wire.DataHeaderLen : len(b)-wire.TagLen])
		from, port := v.Source, v.SourcePort
		v.SetSource(v.Destination)
		v.SetSourcePort(v.DestinationPort)
		v.SetDestination(from)
		v.SetDestinationPort(port)
		k.back <- b
	}
}

func (k *kernel) Close() error { k.once.Do(func() { close(k.closed) }); return nil }

func (k *kernel) heard(from netip.AddrPort) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Contains(k.sources, from)
}

// until waits for something that takes as long as the real clock needs.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: waited in vain", what)
		}
	}
}

// A client that has used its ports up gets a further block, whose ports work at
// every server at once, out and back in, and are nobody else's. It runs by the
// real clock: the servers' own netstacks don't live in bubbles.
func TestPortsAreLeased(t *testing.T) {
	egress := []netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("203.0.113.3")}
	plan, err := portblock.NewPlan(portblock.Blocks{}, egress, nil, netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, 0)
	var kernels []*kernel
	var hosts []*simnet.Host
	var servers []*server.Server
	for i := range 3 {
		h := w.net.Host(name(uint16(i+1)), netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}))
		w.net.Announce(anycast, h)
		conn, err := h.Listen(service)
		if err != nil {
			t.Fatal(err)
		}
		key, err := session.ParseCluster(w.cluster.Marshal(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		k := newKernel()
		s, err := server.New(server.Config{
			Conns: []udp.Conn{conn}, Cluster: key, Clients: w.clients, Number: uint16(i + 1), Registry: w.hub.Join(name(uint16(i + 1))),
			Device: k, Plan: plan, DNS: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9")},
		})
		if err != nil {
			t.Fatal(err)
		}
		w.run(s.Run)
		hosts, kernels, servers = append(hosts, h), append(kernels, k), append(servers, s)
	}

	type tester struct {
		*client.Client
		host *simnet.Host
		mu   sync.Mutex
		list []client.PortRange
		in   []netip.AddrPort // where answers came to
	}
	start := func(number uint32) *tester {
		u := &tester{host: w.net.Host(name(uint16(100+number)), netip.AddrFrom4([4]byte{10, 0, 0, byte(number)}))}
		key := w.enrol(number)
		conn, err := u.host.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
		if err != nil {
			t.Fatal(err)
		}
		u.Client, err = client.New(client.Config{
			Conn: conn, Servers: []netip.AddrPort{service}, ServerKey: w.cluster.Public(), Key: key,
			Input: func(pkts [][]byte) {
				for _, p := range pkts {
					var v ip.View
					if v.Parse(p) == ip.OK && v.Protocol == ip.UDP {
						u.mu.Lock()
						u.in = append(u.in, netip.AddrPortFrom(v.Destination, v.DestinationPort))
						u.mu.Unlock()
					}
				}
			},
			OnPorts: func(list []client.PortRange) {
				u.mu.Lock()
				defer u.mu.Unlock()
				u.list = slices.Clone(list)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		w.run(u.Client.Run)
		until(t, "a session", func() bool { return u.Status().Connected })
		return u
	}
	send := func(u *tester, number uint32, port uint16) {
		b := make([]byte, wire.Overhead+40)
		p := b[wire.DataHeaderLen : wire.DataHeaderLen+40]
		copy(p, []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17})
		src, dst := w.inner.IPv4(number).As4(), far.As4()
		copy(p[12:], src[:])
		copy(p[16:], dst[:])
		binary.BigEndian.PutUint16(p[20:], port)
		binary.BigEndian.PutUint16(p[22:], 53)
		binary.BigEndian.PutUint16(p[24:], 20)
		var v ip.View
		v.Parse(p)
		v.FillChecksums()
		u.Output([][]byte{b})
	}

	u, other := start(2), start(3)
	w.net.SetRoute(u.host, anycast, hosts[0])
	u.RequestPorts()
	ranges := func() []client.PortRange {
		u.mu.Lock()
		defer u.mu.Unlock()
		return u.list
	}
	until(t, "a further block", func() bool { return len(ranges()) > 0 })
	block := ranges()[len(ranges())-1]
	port := block.First + 9
	until(t, "the other servers know of it", func() bool {
		for i := range servers {
			w.net.SetRoute(u.host, anycast, hosts[i])
			send(u, 2, port)
			time.Sleep(10 * time.Millisecond)
		}
		for _, k := range kernels {
			if !k.heard(netip.AddrPortFrom(egress[0], port)) && !k.heard(netip.AddrPortFrom(egress[1], port)) {
				return false
			}
		}
		return true
	})
	until(t, "an answer came", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		return slices.Contains(u.in, netip.AddrPortFrom(w.inner.IPv4(2), port))
	})

	// Nobody else's packets leave from there.
	drops := func() (n uint64) {
		for _, s := range servers {
			st, _ := s.Tun()
			n += st.Drops[server.TunDropPort.String()]
		}
		return n
	}
	before := drops()
	for i := range servers {
		w.net.SetRoute(other.host, anycast, hosts[i])
		send(other, 3, port)
		time.Sleep(10 * time.Millisecond)
	}
	until(t, "the others' packets are dropped", func() bool { return drops() >= before+3 })
	other.mu.Lock()
	defer other.mu.Unlock()
	if other.in != nil {
		t.Error("the other client got an answer")
	}
}
