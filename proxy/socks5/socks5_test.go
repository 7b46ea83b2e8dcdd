package socks5

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/things-go/go-socks5/statute"

	"github.com/anytun-go/anytun/proxy"
)

// nowhere is a Network that refuses everything.
type nowhere struct{}

func (nowhere) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
}
func (nowhere) ListenPacket(context.Context) (proxy.PacketConn, error) { return nil, syscall.EACCES }
func (nowhere) Listen(context.Context, netip.AddrPort) (net.Listener, error) {
	return nil, proxy.ErrNotSupported
}

func (nowhere) LookupNetIP(_ context.Context, _, name string) ([]netip.Addr, error) {
	return nil, notFound(name)
}

func (nowhere) LookupAddr(_ context.Context, a netip.Addr) (string, error) {
	return "", notFound(a.String())
}

// pipeListener hands out the server's ends of pipes.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	return nil
}
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// converse sends input to a server over a pipe and returns its replies. The server must be quick with it and leave
// nothing behind.
func converse(t *testing.T, auth *proxy.Auth, input []byte) []byte {
	t.Helper()
	before := runtime.NumGoroutine()
	s, err := proxy.New(proxy.Config{Network: nowhere{}, SOCKS: New(Config{}), Auth: auth, HandshakeTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	l := &pipeListener{make(chan net.Conn), make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	client, server := net.Pipe()
	l.conns <- server
	read := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(client)
		read <- b
	}()
	_ = client.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = client.Write(input) // the server may have closed before all of it
	// A pipe has no half-close: a moment for the replies to what was complete, then the end.
	var out []byte
	select {
	case out = <-read:
	case <-time.After(20 * time.Millisecond):
		client.Close()
		out = <-read
	}
	client.Close()
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; {
		if time.Now().After(deadline) {
			t.Fatal("goroutines are left")
		}
		time.Sleep(time.Millisecond)
	}
	return out
}

// FuzzServe: whatever is sent, each reply is one of the protocol's.
func FuzzServe(f *testing.F) {
	for _, seed := range [][]byte{
		{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80},
		{5, 1, 0, 5, 1, 0, 3, 1, 'a', 0, 80},
		{5, 1, 0, 5, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80, 'x'},
		{5, 1, 0, 5, 2, 0, 1, 0, 0, 0, 0, 0, 0},
		{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0},
		{5, 1, 0, 5, 0xf0, 0, 3, 1, 'a', 0, 0},
		{5, 1, 0, 5, 0xf1, 0, 1, 1, 2, 3, 4, 0, 0},
		{5, 2, 0, 2, 1, 1, 'u', 1, 'p'},
		{5, 1, 2, 1, 1, 'u', 1, 'p', 5, 1, 0, 1, 127, 0, 0, 1, 0, 80},
		{5, 0},
		{5},
		{5, 255},
		{5, 1, 0, 5, 1, 0, 3, 255, 'a'},
		{5, 1, 0, 4},
		{4, 1, 0, 80, 127, 0, 0, 1, 0},
		{4, 1, 0, 80, 0, 0, 0, 1, 'u', 0, 'a', 0},
		{4, 2, 0, 80, 0, 0, 0, 0, 0},
		{4, 1, 0, 80, 0, 0, 0, 1, 'u', 0, 'a'},
		{4},
		{4, 9, 0, 80, 127, 0, 0, 1, 0},
		append([]byte{4, 1, 0, 80, 0, 0, 0, 1}, bytes.Repeat([]byte("x"), 600)...),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || input[0] != 4 && input[0] != 5 {
			return
		}
		out := converse(t, nil, input)
		if input[0] == 4 {
			if len(out) > 0 && (len(out) != 8 || out[0] != 0 || out[1] != 0x5b) {
				t.Errorf("SOCKS4 reply % x", out)
			}
			return
		}
		if len(out) == 0 {
			return
		}
		if len(out) < 2 || out[0] != 5 {
			t.Fatalf("reply % x", out)
		}
		rest := out[2:]
		switch out[1] {
		case statute.MethodNoAcceptable:
			if len(rest) > 0 {
				t.Errorf("more after 05 ff: % x", rest)
			}
			return
		case statute.MethodUserPassAuth:
			if len(rest) == 0 {
				return
			}
			if len(rest) < 2 || rest[0] != 1 || rest[1] > 1 {
				t.Fatalf("password reply % x", rest)
			}
			rest = rest[2:]
		case statute.MethodNoAuth:
		default:
			t.Fatalf("method % x", out)
		}
		if len(rest) == 0 {
			return
		}
		got, err := statute.ParseReply(bytes.NewReader(rest))
		if err != nil || got.Response > statute.RepAddrTypeNotSupported {
			t.Errorf("reply % x: %v", rest, err)
		}
	})
}

func TestServeOverPipe(t *testing.T) {
	auth, err := proxy.NewAuth([]string{"u:p"}, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		auth        *proxy.Auth
		input, want []byte
	}{
		{nil, []byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80}, []byte{5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0}},
		{auth, []byte{5, 1, 2, 1, 1, 'u', 1, 'p', 5, 3, 0, 1, 0, 0, 0, 0, 0, 0}, []byte{5, 2, 1, 0, 5, 2, 0, 1, 0, 0, 0, 0, 0, 0}},
		{auth, []byte{5, 1, 2, 1, 1, 'u', 1, 'q'}, []byte{5, 2, 1, 1}},
		{nil, []byte{4, 2, 0, 80, 1, 2, 3, 4, 0}, []byte{0, 0x5b, 0, 0, 0, 0, 0, 0}},
	} {
		if got := converse(t, tt.auth, tt.input); !bytes.Equal(got, tt.want) {
			t.Errorf("% x: got % x, want % x", tt.input, got, tt.want)
		}
	}
}

// TestHeader writes headers and reads them back, and cuts each one short at every length.
func TestHeader(t *testing.T) {
	for _, tt := range []struct {
		name string
		wire []byte
		addr string
		host string
		port uint16
		data string
	}{
		{"ipv4", []byte{0, 0, 0, 1, 192, 0, 2, 1, 0x1f, 0x90, 'x'}, "192.0.2.1", "", 8080, "x"},
		{"ipv6", []byte{0, 0, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 53}, "2001:db8::1", "", 53, ""},
		{"mapped", []byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 0, 53}, "192.0.2.1", "", 53, ""},
		{"name", []byte{0, 0, 0, 3, 3, 'a', '.', 'b', 0, 53, 'x', 'y'}, "", "a.b", 53, "xy"},
		{"reserved bytes set", []byte{1, 2, 0, 1, 192, 0, 2, 1, 0, 53}, "192.0.2.1", "", 53, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, data, _, ok := parseHeader(tt.wire)
			if !ok || h.port != tt.port || string(h.name) != tt.host || string(data) != tt.data ||
				h.addr.IsValid() != (tt.addr != "") || tt.addr != "" && h.addr.String() != tt.addr {
				t.Errorf("got %+v %q %v", h, data, ok)
			}
			for n := range len(tt.wire) - len(tt.data) {
				if _, _, why, ok := parseHeader(tt.wire[:n]); ok || why != proxy.DropMalformed {
					t.Errorf("%d bytes: %v, %v", n, ok, why)
				}
			}
			if h.addr.IsValid() {
				from := netip.AddrPortFrom(h.addr, h.port)
				b := appendHeader(nil, from)
				if len(b) != headerBytes(h.addr) {
					t.Errorf("a header of %d bytes, want %d", len(b), headerBytes(h.addr))
				}
				if back, _, _, ok := parseHeader(b); !ok || back.addr != h.addr || back.port != h.port {
					t.Errorf("% x: got %+v, %v", b, back, ok)
				}
			}
		})
	}
	if _, _, why, ok := parseHeader([]byte{0, 0, 1, 1, 192, 0, 2, 1, 0, 53}); ok || why != proxy.DropFragment {
		t.Errorf("a fragment: %v, %v", ok, why)
	}
}

func TestHeaderAllocations(t *testing.T) {
	wires := [][]byte{
		{0, 0, 0, 1, 192, 0, 2, 1, 0, 53, 'x'},
		{0, 0, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 53},
		{0, 0, 0, 3, 3, 'a', '.', 'b', 0, 53},
		{0, 0, 1, 3, 3, 'a'},
	}
	out := make([]byte, 0, maxHeaderBytes)
	sum := 0
	if n := testing.AllocsPerRun(100, func() {
		for _, w := range wires {
			h, data, _, _ := parseHeader(w)
			sum += len(data) + len(appendHeader(out, netip.AddrPortFrom(h.addr, h.port)))
		}
	}); n != 0 || sum == 0 {
		t.Errorf("%v allocations for %d headers", n, len(wires))
	}
}

// FuzzHeader compares with the library's parser, which reads the same but wants some payload behind IPv6 addresses and
// names.
func FuzzHeader(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 192, 0, 2, 1, 0, 53, 'x'})
	f.Add([]byte{0, 0, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 53, 'x'})
	f.Add([]byte{0, 0, 0, 3, 3, 'a', '.', 'b', 0, 53, 'x'})
	f.Add([]byte{0, 0, 7, 1, 192, 0, 2, 1, 0, 53})
	f.Add([]byte{0, 0, 0, 3, 0, 0, 53, 'x', 'x', 'x', 'x', 'x'})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, data, why, ok := parseHeader(b)
		want, err := statute.ParseDatagram(b)
		if !ok {
			known := why == proxy.DropMalformed || why == proxy.DropFragment
			// Not ours: fragments, empty names.
			if !known || err == nil && want.Frag == 0 && !(want.DstAddr.AddrType == statute.ATYPDomain && want.DstAddr.FQDN == "") {
				t.Errorf("refused (%v), the library reads %+v", why, want)
			}
			return
		}
		if err != nil {
			if len(data) > 0 && len(b) >= 10 {
				t.Errorf("accepted %+v, the library says %v", h, err)
			}
			return
		}
		ip, _ := netip.AddrFromSlice(want.DstAddr.IP)
		if int(h.port) != want.DstAddr.Port || string(h.name) != want.DstAddr.FQDN || h.addr != ip.Unmap() || !bytes.Equal(data, want.Data) {
			t.Errorf("got %+v %q, the library %+v", h, data, want)
		}
	})
}
