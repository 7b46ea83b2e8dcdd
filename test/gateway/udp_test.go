package gateway

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// Package proxy looks for these at run time.
var (
	_ proxy.BatchConn = (*netstack.PacketConn)(nil)
	_ socks5.AppConn  = (*udp.Socket)(nil)
)

// Bursts of datagrams, some of them longer than the tunnel's packets, go through
// a SOCKS association and come back from the far end whole. (The server's sockets
// take fragments another way, so those may be overtaken.)
func TestDatagrams(t *testing.T) {
	g := start(t)
	g.exchange(t, destination(t), 1, 1) // unlike these, datagrams don't wait for the session
	echo, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	defer func() { echo.Close(); <-done }()
	c, err := net.Dial("tcp", g.socks)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(limit))
	if _, err := c.Write([]byte{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 2+10)
	if _, err := io.ReadFull(c, reply); err != nil || reply[3] != 0 {
		t.Fatalf("% x, %v", reply, err)
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[6:])), binary.BigEndian.Uint16(reply[10:]))
	app, err := udp.ListenSocket(netip.MustParseAddrPort("127.0.0.1:0"), udp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	watchdog := time.AfterFunc(limit, func() { app.Close() })
	defer watchdog.Stop()
	at := echo.LocalAddr().(*net.UDPAddr).AddrPort()
	for round := range 20 {
		var want [][]byte
		for i := range 16 {
			head := append([]byte{0, 0, 0, 1}, at.Addr().AsSlice()...)
			head = binary.BigEndian.AppendUint16(head, at.Port())
			size := []int{1200, 1200, 1200, 3, 1372, 1373, 0, 5000}[(i+round)%8]
			want = append(want, append(append(head, byte(round), byte(i)), pattern(size)...))
		}
		if n, err := app.WriteBatch(want, relay); n != len(want) || err != nil {
			t.Fatal(n, err)
		}
		for left := len(want); left > 0; {
			list, _, err := app.ReadBatch()
			if err != nil {
				t.Fatalf("round %d, %d datagrams are missing: %v", round, left, err)
			}
			for _, d := range list {
				if len(d) < 12 || d[10] != byte(round) || int(d[11]) >= len(want) || !bytes.Equal(d, want[d[11]]) {
					t.Fatalf("round %d: %d bytes, % x", round, len(d), d[:min(len(d), 12)])
				}
				want[d[11]] = nil // once
				left--
			}
		}
	}
}
