package proxy_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// FuzzFirstByte sends anything to the one port: a connection that is neither SOCKS nor HTTP gets no byte back, the
// others get their own protocol's, and all of them end.
func FuzzFirstByte(f *testing.F) {
	for _, seed := range []string{
		"", "\x05\x01\x00", "\x04\x01\x00\x50\x7f\x00\x00\x01\x00", "GET / HTTP/1.1\r\n\r\n", "get", "\x16\x03\x01\x00\x01", "\x00",
		"\x06\x01", " GET / HTTP/1.1\r\n\r\n", "\xff\xff", "CONNECT x:1 HTTP/1.1\r\n\r\n", "~",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		g := start(t, func(o *options) {
			o.HandshakeTimeout = time.Second
			o.net.dial = func(context.Context, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
		})
		c := g.client(t)
		_, _ = c.Write(input) // it may be closed before all is written
		_ = c.CloseWrite()
		got, _ := io.ReadAll(c) // to the end or a reset
		var ok bool
		switch {
		case len(input) == 0:
			ok = len(got) == 0
		case input[0] == 5:
			ok = len(got) == 0 || got[0] == 5
		case input[0] == 4:
			ok = len(got) == 0 || got[0] == 0
		case bytes.ContainsAny(input[:1], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"):
			ok = len(got) == 0 || strings.HasPrefix(string(got), "HTTP/1.")
		default:
			ok = len(got) == 0
		}
		if !ok {
			t.Errorf("%q got %q", input, got)
		}
	})
}
