package client

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// nowhere is an outer socket that loses everything.
type nowhere struct{}

func (nowhere) ReadBatch() ([]udp.Group, error)         { return nil, net.ErrClosed }
func (nowhere) WriteBatch([][]byte, udp.Endpoint) error { return nil }
func (nowhere) LocalAddr() netip.AddrPort               { return netip.AddrPort{} }
func (nowhere) Close() error                            { return nil }

// roadClient is a client with a session, and the server's side of that.
func roadClient(b *testing.B) (*Client, *session.Session) {
	b.Helper()
	now := time.Now()
	cluster, err := session.NewCluster(now)
	if err != nil {
		b.Fatal(err)
	}
	key, err := session.NewPrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	i, err := session.NewInitiator(cluster.Public(), key, wire.Offer{Ciphers: 1 << wire.AES128GCM}, nil, now)
	if err != nil {
		b.Fatal(err)
	}
	m, err := wire.ParseInitiation(i.Message())
	if err != nil {
		b.Fatal(err)
	}
	a, err := cluster.Accept(m)
	if err != nil {
		b.Fatal(err)
	}
	answer, err := a.Respond(wire.Grant{Client: 7, Server: 1, KeepAlive: 20, MTU: 1400, FirstPort: 1024, LastPort: 2047}, true, now)
	if err != nil {
		b.Fatal(err)
	}
	g, err := i.Finish(answer, now)
	if err != nil {
		b.Fatal(err)
	}
	s, err := cluster.Session(wire.DataHeader{SessionID: g.SessionID, Epoch: byte(g.Epoch)}, 1, now)
	if err != nil {
		b.Fatal(err)
	}
	c, err := New(Config{
		Conn: nowhere{}, Input: func([][]byte) {}, Servers: []netip.AddrPort{service}, ServerKey: cluster.Public(), Key: key,
	})
	if err != nil {
		b.Fatal(err)
	}
	c.current.Store(&active{Granted: g, to: udp.Endpoint{Addr: service}})
	return c, s
}

const roadBatch = 44

// roadPackets are packets of 1400 bytes with room for the tunnel.
func roadPackets() [][]byte {
	list := make([][]byte, roadBatch)
	for i := range list {
		list[i] = make([]byte, wire.Overhead+1400)
		list[i][wire.DataHeaderLen] = 0x45
	}
	return list
}

// BenchmarkOutput is the road out, from the netstack to the outer socket.
func BenchmarkOutput(b *testing.B) {
	c, _ := roadClient(b)
	list := roadPackets()
	b.SetBytes(roadBatch * 1400)
	b.ReportAllocs()
	for b.Loop() {
		c.Output(list)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*roadBatch), "ns/packet")
}

// BenchmarkInput is the road in, from the outer socket to the netstack; sealing
// isn't counted.
func BenchmarkInput(b *testing.B) {
	c, s := roadClient(b)
	list := roadPackets()
	group := udp.Group{From: udp.Endpoint{Addr: service}, Packets: list}
	var batch [][]byte
	var took time.Duration
	b.SetBytes(roadBatch * 1400)
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range list {
			p[wire.DataHeaderLen] = 0x45
		}
		s.Seal(list)
		start := time.Now()
		batch = c.receive(batch[:0], &group)
		took += time.Since(start)
		if len(batch) != roadBatch {
			b.Fatalf("%d packets: %+v", len(batch), c.Stats().Drops)
		}
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/op")
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N*roadBatch), "ns/packet")
}
