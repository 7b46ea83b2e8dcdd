package httpproxy

import (
	"fmt"
	"net"
	"net/http"
	"strconv"

	"github.com/anytun-go/anytun/proxy"
)

// serveLocal answers requests addressed to the proxy itself. Nothing on these pages is secret, so they need no password:
// browsers fetch a PAC file without one.
func serveLocal(w http.ResponseWriter, r *http.Request, ss *session) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		refuse(w, http.StatusMethodNotAllowed, "http_request_error", "only GET and HEAD here")
		return
	}
	self := selfAddress(r.Host, ss.conn.LocalAddr())
	switch r.URL.Path {
	case "/":
		page(w, "text/plain; charset=utf-8", fmt.Sprintf(welcome, self))
	case "/proxy.pac":
		page(w, "application/x-ns-proxy-autoconfig", pac(self, ss.proxy.Auth() != nil))
	default:
		refuse(w, http.StatusNotFound, "http_request_error", "this is a proxy; there is / and /proxy.pac here")
	}
}

const welcome = `anytun-proxy

This port speaks SOCKS5, SOCKS4, SOCKS4a and HTTP proxy. For example:

    curl --proxy socks5h://%[1]s https://example.com/
    curl --proxy http://%[1]s https://example.com/

Browsers can be pointed at http://%[1]s/proxy.pac
`

func page(w http.ResponseWriter, contentType, body string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write([]byte(body)) // the client may have gone
}

// pac is the auto-configuration file. There is no DIRECT in it: what the proxy can't reach must not leave past it.
// Browsers have no passwords for SOCKS, so with passwords only HTTP is offered.
func pac(self string, passwords bool) string {
	proxies := "SOCKS5 " + self + "; PROXY " + self
	if passwords {
		proxies = "PROXY " + self
	}
	return "function FindProxyForURL(url, host) {\n  return \"" + proxies + "\";\n}\n"
}

// selfAddress is the address by which the client reached us: its Host header if that is harmless inside a script and a
// command line, or else the connection's own address.
func selfAddress(host string, local net.Addr) string {
	if host != "" && len(host) <= 255 {
		ok := true
		for i := range len(host) {
			c := host[i]
			ok = ok && ('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
				c == '.' || c == '-' || c == ':' || c == '[' || c == ']')
		}
		if _, port, err := net.SplitHostPort(host); ok && err == nil && port != "" {
			return host
		}
	}
	if a := proxy.AddrPortOf(local); a.IsValid() {
		return a.String()
	}
	return "127.0.0.1:1080"
}
