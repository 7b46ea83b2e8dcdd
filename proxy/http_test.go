package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strings"
	"testing"
	"time"
)

// web returns a client of the gateway's HTTP proxy.
func (g *gateway) web(t *testing.T, user *url.Userinfo) *http.Client {
	t.Helper()
	tr := &http.Transport{
		Proxy:                 http.ProxyURL(&url.URL{Scheme: "http", Host: g.addr, User: user}),
		TLSClientConfig:       &tls.Config{InsecureSkipVerify: true},
		ExpectContinueTimeout: patience,
		DisableCompression:    true,
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func site(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func do(t *testing.T, c *http.Client, req *http.Request) (*http.Response, string) {
	t.Helper()
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func request(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func TestForwardMethods(t *testing.T) {
	g := start(t)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Method", r.Method)
		_, _ = fmt.Fprintf(w, "%s %s %s", r.Method, r.URL.RequestURI(), b)
	})
	c := g.web(t, nil)
	for _, method := range []string{"GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "HEAD"} {
		// The query is one that a URL parser may refuse, and that must pass as it is.
		resp, body := do(t, c, request(t, method, at+"/a%2fb?x=1;y=%zz&z", strings.NewReader("data")))
		want := method + " /a%2fb?x=1;y=%zz&z data"
		if method == "HEAD" {
			want = ""
		}
		if resp.StatusCode != 200 || body != want || resp.Header.Get("Method") != method {
			t.Errorf("%s: %d %q, want %q", method, resp.StatusCode, body, want)
		}
	}
	if n := g.Stats().Requests["http_forward"]; n != 8 {
		t.Errorf("%d requests counted, want 8", n)
	}
	if n := g.Stats().Accepted; n != 1 {
		t.Errorf("%d connections, want one that is kept", n)
	}
}

// TestForwardHeaders checks what may pass: everything but what belongs to one connection.
func TestForwardHeaders(t *testing.T) {
	g := start(t)
	got := make(chan http.Header, 1)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Clone()
		w.Header().Set("Connection", "X-Response-Hop")
		w.Header().Set("X-Response-Hop", "1")
		w.Header().Set("Proxy-Authenticate", "Basic")
		w.Header().Set("Keep-Alive", "timeout=5")
		w.Header().Set("X-Kept", "1")
	})
	c := g.client(t)
	c.send("GET ", at, "/ HTTP/1.1\r\nHost: ignored.test\r\n",
		"Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\n",
		"Keep-Alive: 5\r\nTE: gzip\r\nUpgrade: nothing\r\nX-Forwarded-For: 192.0.2.9\r\nForwarded: for=x\r\nX-End: 1\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	h := <-got
	for _, name := range []string{
		"Proxy-Authorization", "Proxy-Connection", "Connection", "X-Hop", "Keep-Alive", "Te", "Upgrade", "User-Agent", "Via",
	} {
		if v, ok := h[name]; ok {
			t.Errorf("the server got %s: %v", name, v)
		}
	}
	if h.Get("X-End") != "1" || h.Get("X-Forwarded-For") != "192.0.2.9" || h.Get("Forwarded") != "for=x" {
		t.Errorf("the server got %v", h)
	}
	for _, name := range []string{"X-Response-Hop", "Proxy-Authenticate", "Keep-Alive"} {
		if v, ok := resp.Header[name]; ok {
			t.Errorf("the client got %s: %v", name, v)
		}
	}
	if resp.Header.Get("X-Kept") != "1" {
		t.Errorf("the client got %v", resp.Header)
	}
}

func TestForwardBodies(t *testing.T) {
	g := start(t)
	c := g.web(t, nil)
	t.Run("chunks and trailers", func(t *testing.T) {
		at := site(t, func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			w.Header().Set("Trailer", "X-Sum")
			_, _ = w.Write(b)
			w.(http.Flusher).Flush()
			w.Header().Set("X-Sum", fmt.Sprint(len(b), r.ContentLength, r.Trailer.Get("X-Up")))
		})
		body := bytes.Repeat([]byte("z"), 300_000)
		req := request(t, "POST", at, io.MultiReader(bytes.NewReader(body))) // of unknown length
		req.Trailer = http.Header{"X-Up": {"up"}}
		resp, got := do(t, c, req)
		if got != string(body) || resp.Trailer.Get("X-Sum") != "300000 -1up" {
			t.Errorf("%d bytes, trailer %v", len(got), resp.Trailer)
		}
	})
	t.Run("streams", func(t *testing.T) {
		more := make(chan struct{})
		at := site(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("first"))
			w.(http.Flusher).Flush()
			<-more
		})
		resp, err := c.Do(request(t, "GET", at, nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := make([]byte, 5)
		if _, err := io.ReadFull(resp.Body, b); err != nil { // while the response is not over
			t.Error(err)
		}
		close(more)
	})
	t.Run("expect", func(t *testing.T) {
		at := site(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("X-Refuse") != "" {
				w.WriteHeader(http.StatusExpectationFailed)
				return
			}
			b, _ := io.ReadAll(r.Body)
			_, _ = w.Write(b)
		})
		continued := false
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got100Continue: func() { continued = true }})
		req := request(t, "POST", at, strings.NewReader("body")).WithContext(ctx)
		req.Header.Set("Expect", "100-continue")
		if _, got := do(t, c, req); got != "body" || !continued {
			t.Errorf("got %q, continued %v", got, continued)
		}
	})
	t.Run("early hints", func(t *testing.T) {
		at := site(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", "</a>")
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusOK)
		})
		hints := ""
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
				hints = fmt.Sprint(code, h.Get("Link"))
				return nil
			},
		})
		if do(t, c, request(t, "GET", at, nil).WithContext(ctx)); hints != "103</a>" {
			t.Errorf("hints: %q", hints)
		}
	})
	t.Run("cut short", func(t *testing.T) {
		at := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"))
		})
		raw := g.client(t)
		raw.send("GET http://", at.String(), "/ HTTP/1.0\r\n\r\n") // no length can be relied on here
		if b, err := io.ReadAll(raw); err == nil {
			t.Errorf("got %q and a proper end, want a reset", b)
		}
	})
}

func TestForwardUpgrade(t *testing.T) {
	g := start(t)
	at := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		req, err := http.ReadRequest(br)
		if err != nil || req.Header.Get("Upgrade") != "websocket" {
			return
		}
		_, _ = c.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"))
		_, _ = io.Copy(c, br)
	})
	c := g.client(t)
	c.send("GET http://", at.String(), "/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v, %v", resp, err)
	}
	c.send("ping")
	b := make([]byte, 9)
	if _, err := io.ReadFull(br, b); err != nil || string(b) != "helloping" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestHTTPRefused has requests that get an answer from the proxy itself.
func TestHTTPRefused(t *testing.T) {
	g := start(t)
	var hits int
	at := serveTCP(t, "127.0.0.1:0", func(*net.TCPConn) { hits++ })
	for _, tt := range []struct {
		name, send, status, text string
	}{
		{"https", "GET https://x.test/ HTTP/1.1\r\nHost: x.test\r\n\r\n", "400", "use CONNECT"},
		{"ftp", "GET ftp://x.test/ HTTP/1.1\r\nHost: x.test\r\n\r\n", "400", "http:// only"},
		{"no host", "GET http:///x HTTP/1.1\r\nHost: x.test\r\n\r\n", "400", "none"},
		{"bad port", "GET http://x:99999/ HTTP/1.1\r\nHost: x\r\n\r\n", "400", "none"},
		{"connect without port", "CONNECT x.test HTTP/1.1\r\nHost: x.test\r\n\r\n", "400", "host and a port"},
		{"connect to a path", "CONNECT /x HTTP/1.1\r\nHost: x.test\r\n\r\n", "400", "host and a port"},
		{"connect with a body", fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", at), "400", "no body"},
		{"connect with chunks", fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", at), "400", "no body"},
		{"garbage", "nonsense\r\n\r\n", "400", ""},
		{"bad header", "GET http://x/ HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", "400", ""},
		{"two lengths", fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", at), "400", ""},
		{"length with a sign", fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", at), "400", ""},
		{"unknown coding", fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n", at), "501", ""},
		{"blank before colon", fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\nabc", at), "400", ""},
		{"header too large", "GET http://x/ HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 100<<10) + "\r\n\r\n", "431", ""},
		{"http2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505", "HTTP/1.1"},
		{"options", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "405", "GET and HEAD"},
		{"post to the proxy", "POST / HTTP/1.1\r\nHost: x\r\n\r\n", "405", "GET and HEAD"},
		{"no such page", "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", "404", "this is a proxy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.client(t)
			c.send(tt.send)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if !strings.HasPrefix(resp.Status, tt.status) || !strings.Contains(string(b), tt.text) {
				t.Errorf("got %s %q, want %s %q", resp.Status, b, tt.status, tt.text)
			}
		})
	}
	if hits > 0 {
		t.Errorf("%d connections reached the server", hits)
	}
	counted(t, "malformed", func() uint64 { return g.Stats().Failures["malformed"] }, 16)
}

// TestForwardSmuggling sends a request that two parsers may read in two ways; the server must see it in one.
func TestForwardSmuggling(t *testing.T) {
	g := start(t)
	got := make(chan string, 2)
	at := site(t, func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got <- fmt.Sprint(r.URL.Path, " ", string(b), " ", r.Header.Get("Content-Length"), r.TransferEncoding)
	})
	c := g.client(t)
	c.send("POST ", at, "/one HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
		"3\r\nabc\r\n0\r\n\r\n", "GET ", at, "/two HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if s := <-got; s != "/one abc [chunked]" {
		t.Errorf("the server saw %q", s)
	}
	br := bufio.NewReader(c)
	for range 2 {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			break // the proxy may close after such a request
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	select {
	case s := <-got:
		if s != "/two  []" {
			t.Errorf("the server saw %q", s)
		}
	default:
	}
}

func TestLocalPages(t *testing.T) {
	g := start(t)
	get := func(path, host string) string {
		t.Helper()
		c := g.client(t)
		c.send("GET ", path, " HTTP/1.1\r\nHost: ", host, "\r\nConnection: close\r\n\r\n")
		b, err := io.ReadAll(c)
		if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 OK\r\n") {
			t.Fatalf("%s: %q, %v", path, b, err)
		}
		return string(b)
	}
	if s := get("/", "proxy.lan:1080"); !strings.Contains(s, "socks5h://proxy.lan:1080 ") {
		t.Errorf("page: %s", s)
	}
	pac := get("/proxy.pac", "proxy.lan:1080")
	if !strings.Contains(pac, `return "SOCKS5 proxy.lan:1080; PROXY proxy.lan:1080";`) ||
		!strings.Contains(pac, "Content-Type: application/x-ns-proxy-autoconfig\r\n") || strings.Contains(pac, "DIRECT") {
		t.Errorf("pac: %s", pac)
	}
	if s := get("/proxy.pac", "a'b;c(d):1080"); !strings.Contains(s, `"SOCKS5 `+g.addr+`; PROXY `+g.addr+`"`) {
		t.Errorf("pac with a strange Host: %s", s)
	}
}

func TestHTTPConnectKeepsGoing(t *testing.T) {
	g := start(t)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("secret")) }))
	defer s.Close()
	for range 3 {
		if _, body := do(t, g.web(t, nil), request(t, "GET", s.URL, nil)); body != "secret" {
			t.Errorf("got %q", body)
		}
	}
	// CONNECT may follow another request on one connection.
	to := serveTCP(t, "127.0.0.1:0", echo)
	c := g.client(t)
	c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT ", to.String(), " HTTP/1.1\r\n\r\nearly")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp, err = http.ReadResponse(br, &http.Request{Method: "CONNECT"}); err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v, %v", resp, err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(br, b); err != nil || string(b) != "early" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestHTTPKeepAliveTimeout(t *testing.T) {
	g := start(t, func(o *options) { o.http.KeepAlive = 30 * time.Millisecond })
	c := g.client(t)
	c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if b, err := io.ReadAll(c); err != nil || len(b) == 0 { // the page, and then the end
		t.Errorf("%q, %v", b, err)
	}
}

// TestForwardHangUpWhileStreaming ends the application in the middle of a response; the server must hear of it.
func TestForwardHangUpWhileStreaming(t *testing.T) {
	g := start(t)
	ended := make(chan struct{})
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(ended)
	})
	ctx, cancel := context.WithCancel(t.Context())
	resp, err := g.web(t, nil).Do(request(t, "GET", at, nil).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cancel()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the server was not told")
	}
}

func basicAuth(pair string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(pair)) }
