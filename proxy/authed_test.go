package proxy_test

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/anytun-go/anytun/proxy"
)

// logBuffer collects log lines of several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestAuthentication(t *testing.T) {
	auth, err := proxy.NewAuth([]string{"alice:open:sesame"}, "")
	if err != nil {
		t.Fatal(err)
	}
	logs := &logBuffer{}
	g := start(t, func(o *options) {
		o.Auth = auth
		o.Logger = slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	to := serveTCP(t, "127.0.0.1:0", echo)
	connect := join(5, 1, 0, 1, 127, 0, 0, 1, sport(to.Port))
	password := func(user, pass string) []byte { return join(1, len(user), user, len(pass), pass) }

	t.Run("socks5", func(t *testing.T) {
		c := g.client(t)
		c.send(5, 2, 0, 2, password("alice", "open:sesame"), connect, "hi")
		c.want(5, 2, 1, 0, 5, 0, 0, 1, 127, 0, 0, 1)
		c.read(2)
		c.want("hi")
	})
	for _, tt := range []struct {
		name string
		send []byte
		want []byte
	}{
		{"socks5 wrong password", join(5, 1, 2, password("alice", "pa55word")), join(5, 2, 1, 1)},
		{"socks5 unknown user", join(5, 1, 2, password("bob", "open:sesame")), join(5, 2, 1, 1)},
		{"socks5 empty", join(5, 1, 2, password("", "")), join(5, 2, 1, 1)},
		{"socks5 without", join(5, 1, 0, connect), join(5, 0xff)},
		{"socks4", join(4, 1, sport(to.Port), 127, 0, 0, 1, "alice", 0), join(0, 0x5d, 0, 0, 0, 0, 0, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := g.Stats().Failures["auth"]
			c := g.client(t)
			c.send(tt.send)
			c.want(tt.want)
			c.wantEnd()
			if n := g.Stats().Failures["auth"] - before; n != 1 {
				t.Errorf("%d failures counted, want 1", n)
			}
		})
	}
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprint(w, "authorization:", r.Header.Get("Proxy-Authorization"))
	})
	t.Run("http", func(t *testing.T) {
		c := g.web(t, url.UserPassword("alice", "open:sesame"))
		if resp, body := do(t, c, request(t, "GET", at, nil)); resp.StatusCode != 200 || body != "authorization:" {
			t.Errorf("%d %q", resp.StatusCode, body)
		}
	})
	t.Run("http connect", func(t *testing.T) {
		c := g.client(t)
		c.send("CONNECT ", to.String(), " HTTP/1.1\r\nProxy-Authorization: ", basicAuth("alice:open:sesame"), "\r\n\r\n")
		c.want("HTTP/1.1 200 ")
	})
	for _, tt := range []struct {
		name, header string
		closed       bool
	}{
		{"http without", "", false},
		{"http wrong password", "Proxy-Authorization: " + basicAuth("alice:pa55word") + "\r\n", true},
		{"http other scheme", "Proxy-Authorization: Bearer xyz\r\n", true},
		{"http not base64", "Proxy-Authorization: Basic !!!\r\n", true},
	} {
		for _, what := range []string{"GET " + at + "/", "CONNECT " + to.String()} {
			t.Run(tt.name+" "+what[:3], func(t *testing.T) {
				before := g.Stats().Failures["auth"]
				c := g.client(t)
				c.send(what, " HTTP/1.1\r\nHost: x\r\n", tt.header, "\r\n")
				if !tt.closed {
					c.send("GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") // the connection stays
				}
				b, err := io.ReadAll(c)
				s := string(b)
				if err != nil || !strings.HasPrefix(s, "HTTP/1.1 407 ") || !strings.Contains(s, "\r\nProxy-Authenticate: Basic realm=") {
					t.Errorf("%q, %v", s, err)
				}
				if strings.Contains(s, "HTTP/1.1 404 ") == tt.closed {
					t.Errorf("closed: want %v, got %q", tt.closed, s)
				}
				if n := g.Stats().Failures["auth"] - before; n != 1 {
					t.Errorf("%d failures counted, want 1", n)
				}
			})
		}
	}
	t.Run("pac", func(t *testing.T) {
		c := g.client(t)
		c.send("GET /proxy.pac HTTP/1.1\r\nHost: p:1\r\nConnection: close\r\n\r\n")
		if b, err := io.ReadAll(c); err != nil || !strings.Contains(string(b), `return "PROXY p:1";`) {
			t.Errorf("%q, %v", b, err)
		}
	})
	if s := logs.String(); !strings.Contains(s, "authentication failed") || strings.Contains(s, "sesame") ||
		strings.Contains(s, "pa55word") {
		t.Errorf("the log has a password, or no word of failures: %s", s)
	}
}

// TestAnyPasswordWithoutAuth is for applications that offer a password whether it is wanted or not.
func TestAnyPasswordWithoutAuth(t *testing.T) {
	g := start(t)
	to := serveTCP(t, "127.0.0.1:0", echo)
	c := g.client(t)
	c.send(5, 1, 2, 1, 1, "u", 1, "p", 5, 1, 0, 1, 127, 0, 0, 1, sport(to.Port))
	c.want(5, 2, 1, 0, 5, 0)
}
