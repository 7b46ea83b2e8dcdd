package httpproxy

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strings"

	"github.com/anytun-go/anytun/proxy"
)

// serveHTTP is called by net/http for every well-formed request.
func (h *Handler) serveHTTP(w http.ResponseWriter, r *http.Request) {
	ss := r.Context().Value(sessionKey{}).(*session)
	ss.served.Add(1)
	defer ss.handled()
	switch {
	case r.ProtoMajor != 1: // the preface of HTTP/2
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusHTTPVersionNotSupported, "http_request_error", "this proxy speaks HTTP/1.1")
	case r.Method == http.MethodConnect:
		if allowed(w, r, ss) {
			h.serveConnect(w, r, ss)
		}
	case r.URL.Host != "" || r.URL.Scheme != "":
		if allowed(w, r, ss) {
			h.serveForward(w, r, ss)
		}
	default:
		ss.proxy.Counters().Request(proxy.KindHTTPLocal)
		serveLocal(w, r, ss)
	}
}

// handled runs at a request's end, deferred.
func (ss *session) handled() {
	if ss.taken.Load() {
		ss.end() // net/http tells nothing about the end of a connection taken away from it
	}
	if p := recover(); p != nil {
		// The response was cut short. To a client that takes the connection's end for the body's it must not look whole.
		ss.conn.Abort()
		panic(p)
	}
}

// allowed checks user name and password; if it returns false it has replied. A request without any is a browser's way of
// asking whether they are needed, so its connection stays; after wrong ones it is closed.
func allowed(w http.ResponseWriter, r *http.Request, ss *session) bool {
	auth := ss.proxy.Auth()
	if auth == nil {
		return true
	}
	given := r.Header.Get("Proxy-Authorization")
	if given != "" {
		ctx, cancel := context.WithTimeout(r.Context(), ss.proxy.HandshakeTimeout())
		defer cancel()
		if user, password, ok := basic(given); ok && auth.Verify(ctx, user, password) {
			return true
		}
		w.Header().Set("Connection", "close")
		ss.proxy.Logger().Debug("authentication failed", "remote", ss.conn.RemoteAddr())
	}
	ss.proxy.Counters().Failure(proxy.ReasonAuth)
	w.Header().Set("Proxy-Authenticate", `Basic realm="anytun", charset="UTF-8"`)
	refuse(w, http.StatusProxyAuthRequired, proxy.ReasonAuth.ProxyError(), proxy.ReasonAuth.Text())
	return false
}

// basic parses RFC 7617 credentials.
func basic(header string) (user, password string, ok bool) {
	scheme, encoded, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "Basic") {
		return "", "", false
	}
	pair, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	if err != nil {
		return "", "", false
	}
	return strings.Cut(string(pair), ":")
}

// serveConnect takes the connection away from net/http; Serve goes on with it.
func (h *Handler) serveConnect(w http.ResponseWriter, r *http.Request, ss *session) {
	target, err := proxy.ParseTarget(r.URL.Host)
	switch {
	case err != nil:
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusBadRequest, "http_request_error", "CONNECT needs a host and a port, such as example.com:443")
		return
	case r.ContentLength != 0 || len(r.TransferEncoding) > 0:
		// A body would end where the tunnel begins, and not everybody would agree where that is.
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusBadRequest, "http_request_error", "CONNECT has no body")
		return
	}
	_, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		ss.proxy.Counters().Failure(proxy.ReasonOther)
		refuse(w, http.StatusInternalServerError, "proxy_internal_error", "the connection can't become a tunnel")
		return
	}
	// What came behind the request belongs to the tunnel. It has to be taken here: the reader is net/http's.
	if n := buffered.Reader.Buffered(); n > 0 {
		p, _ := buffered.Reader.Peek(n) // can't fail: it is buffered
		ss.conn.GiveEarly(p)
	}
	ss.conn.GiveEarly(ss.inner.early) // not yet read by net/http
	ss.inner.early = nil
	ss.connect = &target // handled ends the session
}

const connectReply = "HTTP/1.1 200 Connection established\r\n\r\n"

// connect is CONNECT after its request: dial first, then reply, so that the reply tells the truth.
func connect(ctx context.Context, s *proxy.Server, c *proxy.Conn, to proxy.Target) {
	s.Counters().Request(proxy.KindHTTPConnect)
	c.EndHandshake()
	remote, err := s.Dial(ctx, c, to)
	if err != nil {
		c.CloseWith(failure(proxy.ReasonOf(err)))
		return
	}
	if err := c.Reply([]byte(connectReply)); err != nil {
		proxy.Abort(remote)
		return
	}
	s.Tunnel(c, remote)
}

// failure is a whole response for a CONNECT that failed.
func failure(reason proxy.Reason) []byte {
	text := reason.Text() + "\n"
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\n"+
		"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nProxy-Status: %s\r\nConnection: close\r\n\r\n%s",
		reason.Status(), http.StatusText(reason.Status()), len(text), proxyStatus(reason.ProxyError()), text)
}

// proxyStatus is the Proxy-Status header's value, RFC 9209 section 2.
func proxyStatus(kind string) string { return "anytun-proxy; error=" + kind }

// refuse replies with a status, the Proxy-Status header and one sentence. After a malformed request the connection ends:
// who can't write one request may not agree with us on where the next begins.
func refuse(w http.ResponseWriter, status int, kind, text string) {
	if status == http.StatusBadRequest {
		w.Header().Set("Connection", "close")
	}
	w.Header().Set("Proxy-Status", proxyStatus(kind))
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Content-Length", fmt.Sprint(len(text)+1))
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, text) // the client may have gone
}

// serveForward passes a plain request on.
func (h *Handler) serveForward(w http.ResponseWriter, r *http.Request, ss *session) {
	host, port := r.URL.Hostname(), r.URL.Port()
	if port == "" {
		port = "80"
	}
	// Braces around an address come back, so that ParseTarget sees what the transport will dial.
	if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
		host = "[" + host + "]"
	}
	_, err := proxy.ParseTarget(host + ":" + port)
	switch {
	case r.URL.Scheme == "https":
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusBadRequest, "http_request_error",
			"https can't be forwarded as a plain request; let the client use CONNECT")
	case r.URL.Scheme != "http":
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusBadRequest, "http_request_error", "this proxy forwards http:// only; use CONNECT for others")
	case err != nil:
		ss.proxy.Counters().Failure(proxy.ReasonMalformed)
		refuse(w, http.StatusBadRequest, "http_request_error", "the URL's host or port is none")
	default:
		ss.proxy.Counters().Request(proxy.KindHTTPForward)
		h.forward.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, r.Context())))
	}
}

// rewrite undoes what httputil's reverse proxy does to requests on behalf of the servers behind it: a forward proxy
// leaves the query and the client's own forwarding headers as they are. Nothing is added either, no Via and no
// X-Forwarded-For: who sits behind the tunnel is nobody's business.
func rewrite(pr *httputil.ProxyRequest) {
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery
	pr.Out.Trailer = pr.In.Trailer // not a copy: it is filled in when the body has been read
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := pr.In.Header[name]; ok {
			pr.Out.Header[name] = v
		}
	}
}

// forwardFailed replies when no response came.
func (h *Handler) forwardFailed(w http.ResponseWriter, r *http.Request, err error) {
	s := h.proxy
	reason := proxy.ReasonOf(err)
	if r.Context().Err() != nil || errors.Is(err, context.Canceled) {
		reason = proxy.ReasonCanceled
	}
	s.Counters().Failure(reason)
	s.Logger().Debug("forward failed", "error", err)
	refuse(w, reason.Status(), reason.ProxyError(), reason.Text())
}
