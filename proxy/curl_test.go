package proxy_test

import (
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"

	"github.com/anytun-go/anytun/proxy"
)

// TestCurl lets a client that we didn't write talk to every protocol.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skipf("curl is not installed: %v", err)
	}
	auth, err := proxy.NewAuth([]string{"alice:sesame"}, "")
	if err != nil {
		t.Fatal(err)
	}
	open, closed := start(t), start(t, func(o *options) { o.Auth = auth })
	page := strings.Repeat("0123456789abcdef", 100_000)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_ = r.Write(w)
			return
		}
		_, _ = w.Write([]byte(page))
	})
	plain, secure := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	defer plain.Close()
	defer secure.Close()
	named := strings.Replace(plain.URL, "127.0.0.1", "four.test", 1)
	namedTLS := strings.Replace(secure.URL, "127.0.0.1", "four.test", 1)
	six := strings.Replace(named, "four.test", "six.test", 1) // nothing listens there

	for _, tt := range []struct {
		name string
		args []string
		exit int
	}{
		{"socks5", []string{"--proxy", "socks5://" + open.addr, plain.URL}, 0},
		{"socks5h", []string{"--proxy", "socks5h://" + open.addr, named}, 0},
		{"socks5h and tls", []string{"--proxy", "socks5h://" + open.addr, namedTLS}, 0},
		{"socks5h, unknown name", []string{"--proxy", "socks5h://" + open.addr, "http://none.test/"}, 97},
		{"socks5h, refused", []string{"--proxy", "socks5h://" + open.addr, six}, 97},
		{"socks4", []string{"--proxy", "socks4://" + open.addr, plain.URL}, 0},
		{"socks4a", []string{"--proxy", "socks4a://" + open.addr, named}, 0},
		{"socks4a, unknown name", []string{"--proxy", "socks4a://" + open.addr, "http://none.test/"}, 97},
		{"http", []string{"--proxy", "http://" + open.addr, named}, 0},
		{"http connect", []string{"--proxy", "http://" + open.addr, namedTLS}, 0},
		{"http connect to plain", []string{"--proxytunnel", "--proxy", "http://" + open.addr, named}, 0},
		{"http connect, refused", []string{"--proxytunnel", "--proxy", "http://" + open.addr, six}, 56},
		{"http/1.0", []string{"--http1.0", "--proxy", "http://" + open.addr, named}, 0},
		{"socks5 with password", []string{"--proxy", "socks5h://alice:sesame@" + closed.addr, named}, 0},
		{"socks5, wrong password", []string{"--proxy", "socks5h://alice:x@" + closed.addr, named}, 97},
		{"socks5 without password", []string{"--proxy", "socks5h://" + closed.addr, named}, 97},
		{"http with password", []string{"--proxy", "http://alice:sesame@" + closed.addr, named}, 0},
		{"http, wrong password", []string{"--fail", "--proxy", "http://alice:x@" + closed.addr, named}, 22},
		{"http connect with password", []string{"--proxy", "http://alice:sesame@" + closed.addr, namedTLS}, 0},
		{"http connect, any auth", []string{"--proxy-anyauth", "--proxy", "http://alice:sesame@" + closed.addr, namedTLS}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"--silent", "--show-error", "--insecure", "--noproxy", "", "--max-time", "10"}, tt.args...)
			cmd := exec.CommandContext(t.Context(), curl, args...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if code := cmd.ProcessState.ExitCode(); code != tt.exit {
				t.Fatalf("exit %d (%v), want %d: %s", code, err, tt.exit, &stderr)
			}
			if tt.exit == 0 && string(out) != page {
				t.Errorf("got %d bytes, want %d", len(out), len(page))
			}
		})
	}
}
