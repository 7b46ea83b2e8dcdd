package server

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
)

// The self-check fails while nobody reads a socket, and goes well once the server
// runs; a probe of somebody who doesn't know the token is dropped like all else.
func TestCheck(t *testing.T) {
	var conns []udp.Conn
	for range 2 {
		c, err := udp.Listen(netip.MustParseAddrPort("127.0.0.1:0"), udp.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Conns: conns, Cluster: cluster, Clients: NewDirectory(nil)})
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.Check(short); err == nil {
		t.Error("a server that doesn't run finds itself well")
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	long, cancelLong := context.WithTimeout(t.Context(), time.Minute)
	defer cancelLong()
	for range 3 {
		if err := s.Check(long); err != nil {
			t.Errorf("a server that runs: %v", err)
		}
	}
	forged := make([]byte, probeLen)
	forged[0] = probeType
	if s.prober.probe(forged) {
		t.Error("a probe without the token counts")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
