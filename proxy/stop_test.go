package proxy_test

import (
	"net"
	"testing"
	"time"
)

// TestStopWithHalfClosedTunnel: a server that is stopped ends tunnels of which one side has finished sending.
func TestStopWithHalfClosedTunnel(t *testing.T) {
	stay := make(chan struct{})
	to := serveTCP(t, "127.0.0.1:0", func(*net.TCPConn) { <-stay })
	defer close(stay)
	g := start(t)
	c := g.client(t)
	c.connect4(to)
	_ = c.CloseWrite()
	time.Sleep(100 * time.Millisecond)
	g.stop()
	select {
	case err := <-g.served:
		g.served <- err
	case <-time.After(3 * time.Second):
		t.Error("Serve goes on with a tunnel that is half closed")
	}
}
