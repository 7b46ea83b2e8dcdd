package proxy_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/httpproxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// The proxy's own stages of the road, with the host's sockets as the network.
// Relaying is BenchmarkRelay.

// roadServer runs a proxy and returns its address.
func roadServer(b *testing.B, n proxy.Network) string {
	b.Helper()
	s, err := proxy.New(proxy.Config{Network: n, SOCKS: socks5.New(socks5.Config{}), HTTP: httpproxy.New(httpproxy.Config{})})
	if err != nil {
		b.Fatal(err)
	}
	l, err := proxy.Listen(b.Context(), "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return l.Addr().String()
}

// BenchmarkConnect is a tunnel opened and reset, without the dial: accept,
// handshake, answer, relay, end.
func BenchmarkConnect(b *testing.B) {
	for _, protocol := range []string{"socks5", "http"} {
		b.Run(protocol, func(b *testing.B) {
			n := newNetwork()
			far := make(chan net.Conn, 1)
			n.dial = func(context.Context, string) (net.Conn, error) {
				n.mu.Lock()
				n.asked = n.asked[:0]
				n.mu.Unlock()
				near, c := net.Pipe()
				far <- c
				return near, nil
			}
			at := roadServer(b, n)
			reply := make([]byte, 12)
			b.ReportAllocs()
			for b.Loop() {
				c, err := net.Dial("tcp", at)
				if err != nil {
					b.Fatal(err)
				}
				if protocol == "socks5" {
					_, _ = c.Write([]byte{5, 1, 0, 5, 1, 0, 1, 192, 0, 2, 1, 0, 80})
					_, err = io.ReadFull(c, reply)
				} else {
					_, _ = io.WriteString(c, "CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n")
					var r *http.Response
					if r, err = http.ReadResponse(bufio.NewReader(c), nil); err == nil && r.StatusCode != http.StatusOK {
						err = fmt.Errorf("status %s", r.Status)
					}
				}
				if err != nil {
					b.Fatal(err)
				}
				_ = c.(*net.TCPConn).SetLinger(0)
				c.Close()
				(<-far).Close()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
		})
	}
}

// BenchmarkUDP is 32 datagrams of 1200 bytes through an association and their
// answers back.
func BenchmarkUDP(b *testing.B) {
	at := roadServer(b, newNetwork())
	c, err := net.Dial("tcp", at)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	reply := make([]byte, 12)
	_, _ = c.Write([]byte{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0})
	if _, err := io.ReadFull(c, reply); err != nil || reply[3] != 0 {
		b.Fatal(reply, err)
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[6:])), binary.BigEndian.Uint16(reply[10:]))
	listen := func() *net.UDPConn {
		u, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			b.Fatal(err)
		}
		_ = u.SetReadBuffer(1 << 20)
		b.Cleanup(func() { u.Close() })
		return u
	}
	app, echo := listen(), listen()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	to := echo.LocalAddr().(*net.UDPAddr).AddrPort()
	msg := append([]byte{0, 0, 0, 1}, to.Addr().AsSlice()...)
	msg = append(binary.BigEndian.AppendUint16(msg, to.Port()), make([]byte, 1200)...)
	buf := make([]byte, 2048)
	const batch = 32
	_ = app.SetReadDeadline(time.Now().Add(time.Minute))
	b.SetBytes(batch * 1200)
	b.ReportAllocs()
	for b.Loop() {
		for range batch {
			if _, err := app.WriteToUDPAddrPort(msg, relay); err != nil {
				b.Fatal(err)
			}
		}
		for range batch {
			if n, _, err := app.ReadFromUDPAddrPort(buf); err != nil || n != len(msg) {
				b.Fatal(n, err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}
