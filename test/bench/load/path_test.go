package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// script is the other end of a SOCKS dialogue: what it says is settled before.
type script struct {
	said  bytes.Buffer // by us
	reply io.Reader
}

func (s *script) Read(b []byte) (int, error)  { return s.reply.Read(b) }
func (s *script) Write(b []byte) (int, error) { return s.said.Write(b) }

func TestSocksRequest(t *testing.T) {
	const asked = "\x05\x01\x00" + "\x05\x01\x00\x01\x0a\x47\x03\x02\x23\x29"
	for _, c := range []struct {
		name, reply string
		bound, err  string
	}{
		{"IPv4", "\x05\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38", "127.0.0.1:1080", ""},
		{"IPv6", "\x05\x00\x05\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x04\x38", "[::1]:1080", ""},
		{"mapped", "\x05\x00\x05\x00\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x04\x38", "127.0.0.1:1080", ""},
		{"name", "\x05\x00\x05\x00\x00\x03\x04name\x04\x38", "invalid AddrPort", ""},
		{"refused", "\x05\x00\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00", "", "socks reply 5"},
		{"password", "\x05\xff", "", "answered with 05ff"},
		{"SOCKS4", "\x00\x5a", "", "answered with 005a"},
		{"type", "\x05\x00\x05\x00\x00\x02", "", "address of type 2"},
	} {
		s := &script{reply: strings.NewReader(c.reply + "next")}
		bound, err := socksRequest(s, socksConnect, "10.71.3.2", 9001)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v, want %s", c.name, err, c.err)
			}
			continue
		}
		if err != nil || bound.String() != c.bound || s.said.String() != asked {
			t.Errorf("%s: bound %v, error %v, asked % x", c.name, bound, err, s.said.Bytes())
		}
		if rest, _ := io.ReadAll(s.reply); string(rest) != "next" {
			t.Errorf("%s: %q is left of what follows", c.name, rest)
		}
		for n := range c.reply {
			if _, err := socksRequest(&script{reply: strings.NewReader(c.reply[:n])}, socksConnect, "10.71.3.2", 9001); err == nil {
				t.Errorf("%s: %d of %d bytes are enough", c.name, n, len(c.reply))
			}
		}
	}
	if _, err := socksRequest(&script{}, socksConnect, "::1", 9001); err == nil {
		t.Error("an IPv6 destination was asked for")
	}
}

// A fake proxy that answers everything from the sink's own loops: the tests take
// the whole way without a network.
func TestDial(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		_ = acceptLoop(l, func(c net.Conn) {
			ask := make([]byte, 13)
			if _, err := io.ReadFull(c, ask[:3]); err != nil {
				return
			}
			_, _ = c.Write([]byte{5, 0})
			if _, err := io.ReadFull(c, ask[3:]); err != nil {
				return
			}
			_, _ = c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
			serveHTTP(c)
		}) // until the listener is closed
	}()
	p := &path{dst: "192.0.2.1", socks: l.Addr().String(), timeout: 10e9}
	c, err := p.dial(portHTTP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for _, size := range []int{1024, 0, 5000} {
		if err := get(c, in, size, false); err != nil {
			t.Errorf("get %d bytes: %v", size, err)
		}
	}
	if err := p.tryOnce(); err != nil {
		t.Error(err)
	}
}

func TestGetWrongSize(t *testing.T) {
	answer := bufio.NewReader(strings.NewReader("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"))
	if err := get(io.Discard, answer, 4, true); err == nil {
		t.Error("3 bytes passed for 4")
	}
}

// echoPath is a UDP path to a socket of ours.
func echoPath(t *testing.T) (*datagramPath, *net.UDPConn) {
	t.Helper()
	far, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	near, err := net.DialUDP("udp4", nil, far.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	return newDatagramPath(near, []byte("socks header")), far
}

func TestEchoes(t *testing.T) {
	d, far := echoPath(t)
	w := newEchoes(d, 2)
	receive := func() []byte {
		b := make([]byte, 2000)
		n, err := far.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return b[:n]
	}
	if n := w.resend(0, -1); n != 2 {
		t.Fatalf("%d were sent at first, want 2", n)
	}
	first, second := receive(), receive()
	if flight, ok := w.back(first, 30); !ok || flight != 30 {
		t.Errorf("flight of %v %v, want 30", flight, ok)
	}
	if _, ok := w.back(first, 31); ok {
		t.Error("one datagram came back twice")
	}
	w.flush()
	again := receive()
	if n := w.resend(100, 80); n != 1 {
		t.Errorf("%d were taken for lost, want the second", n)
	}
	if _, ok := w.back(second, 101); ok {
		t.Error("a lost datagram counts when it comes back after all")
	}
	if _, ok := w.back(again, 102); !ok {
		t.Error("the other one no longer counts")
	}
	for n := range again {
		if _, ok := w.back(again[:n], 103); ok {
			t.Fatalf("%d bytes of a datagram count", n)
		}
	}
}
