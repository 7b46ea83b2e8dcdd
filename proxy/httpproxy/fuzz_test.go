package httpproxy

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

// upstream is a Network whose every destination answers a request with its own bytes' length, if net/http can read it.
type upstream struct{ t *testing.T }

func (u upstream) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	if _, err := proxy.ParseTarget(address); err != nil {
		u.t.Errorf("dials %q", address)
	}
	if strings.HasPrefix(address, "refused") {
		return nil, syscall.ECONNREFUSED
	}
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		_ = theirs.SetDeadline(time.Now().Add(5 * time.Second))
		req, err := http.ReadRequest(bufio.NewReader(theirs))
		if err != nil {
			return
		}
		for _, name := range []string{"Proxy-Authorization", "Proxy-Connection", "Keep-Alive"} {
			if _, ok := req.Header[name]; ok {
				u.t.Errorf("%s went through", name)
			}
		}
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(theirs, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	}()
	return ours, nil
}

func (upstream) ListenPacket(context.Context) (proxy.PacketConn, error) {
	return nil, proxy.ErrNotSupported
}

func (upstream) Listen(context.Context, netip.AddrPort) (net.Listener, error) {
	return nil, proxy.ErrNotSupported
}

func (upstream) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	return nil, proxy.ErrNotSupported
}

func (upstream) LookupAddr(context.Context, netip.Addr) (string, error) {
	return "", proxy.ErrNotSupported
}

// FuzzServe: whatever begins with a letter is answered with HTTP responses, or with nothing if it is no whole request.
func FuzzServe(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /proxy.pac HTTP/1.0\r\n\r\n",
		"GET http://a/ HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eA==\r\nConnection: close\r\n\r\n",
		"POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"GET http://[::1]:80/ HTTP/1.1\r\nHost: a\r\n\r\nGET http://[fe80::1%25x]/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET http://a:b@c:d/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET http://refused/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"CONNECT refused:443 HTTP/1.1\r\n\r\n",
		"CONNECT a HTTP/1.1\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"G", "GET", "GET / HTTP/9.9\r\n\r\n", "GET http://a/ HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
		"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
		"GET http://%00/ HTTP/1.1\r\nHost: a\r\n\r\n", "GET http://a%20b/ HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || !bytes.ContainsAny(input[:1], "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") {
			return
		}
		out := converse(t, input)
		br := bufio.NewReader(bytes.NewReader(out))
		for {
			if _, err := br.Peek(1); err != nil {
				return
			}
			// HEAD's and CONNECT's responses have no body, whatever they say; so only the head is looked at there.
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatalf("not a response: %q: %v", out, err)
			}
			_, err = io.Copy(io.Discard, resp.Body)
			if err != nil || bytes.Contains(input, []byte("HEAD")) || bytes.Contains(input, []byte("CONNECT")) {
				return // cut short by the end of the conversation
			}
		}
	})
}

// converse sends input over a pipe and returns what came back.
func converse(t *testing.T, input []byte) []byte {
	t.Helper()
	s, err := proxy.New(proxy.Config{Network: upstream{t}, HTTP: New(Config{}), HandshakeTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	client, server := net.Pipe()
	l := &oneListener{conns: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conns <- server
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	read := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(client)
		read <- b
	}()
	_ = client.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = client.Write(input) // the server may have closed before all of it
	var out []byte
	select {
	case out = <-read:
	case <-time.After(20 * time.Millisecond): // it waits for more; there is none
		client.Close()
		out = <-read
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	return out
}

type oneListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *oneListener) Close() error {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	return nil
}
func (l *oneListener) Addr() net.Addr { return &net.TCPAddr{} }

func TestSelfAddress(t *testing.T) {
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1080}
	for host, want := range map[string]string{
		"proxy.lan:8080":                 "proxy.lan:8080",
		"[::1]:1080":                     "[::1]:1080",
		"":                               "127.0.0.1:1080",
		"proxy.lan":                      "127.0.0.1:1080",
		`x";alert(1)//:80`:               "127.0.0.1:1080",
		"a;b:80":                         "127.0.0.1:1080",
		strings.Repeat("x", 300) + ":80": "127.0.0.1:1080",
	} {
		if got := selfAddress(host, local); got != want {
			t.Errorf("%q: got %q, want %q", host, got, want)
		}
	}
	if got := selfAddress("", &net.UnixAddr{}); got != "127.0.0.1:1080" {
		t.Errorf("unix socket: %q", got)
	}
}

func TestBasic(t *testing.T) {
	for header, want := range map[string]string{
		"Basic dTpw":     "u p true",
		"basic dTpw":     "u p true",
		"Basic dTpwOnE=": "u p:q true",
		"Basic  dTpw ":   "u p true",
		"Basic":          "  false",
		"Basic dQ==":     "u  false",
		"Basic !":        "  false",
		"Digest dTpw":    "  false",
	} {
		user, password, ok := basic(header)
		if got := user + " " + password + " " + map[bool]string{true: "true", false: "false"}[ok]; got != want {
			t.Errorf("%q: got %q, want %q", header, got, want)
		}
	}
}

// TestFailure reads the response to a failed CONNECT with net/http's eyes.
func TestFailure(t *testing.T) {
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(failure(proxy.ReasonTimedOut))), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if resp.StatusCode != 504 || !resp.Close || err != nil || string(b) != "the destination did not answer in time\n" ||
		resp.Header.Get("Proxy-Status") != "anytun-proxy; error=connection_timeout" {
		t.Errorf("%v %q %v", resp, b, err)
	}
}
