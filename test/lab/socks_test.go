//go:build linux

package lab

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// socks is the command line of the SOCKS client written in Python.
func socks(t *testing.T, args ...string) []string {
	t.Helper()
	require(t, "python3")
	// A version manager's python3 looks for itself below HOME: prefer Debian's.
	python := "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		python = "python3"
	}
	script, err := filepath.Abs(filepath.Join("testdata", "socks.py"))
	if err != nil {
		t.Fatal(err)
	}
	return append([]string{python, script}, args...)
}

// ask runs the Python client and returns what it printed, in one line.
func (p *place) ask(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(p.client.run(t, 90*time.Second, socks(t, args...)...))
}

// A talk is a program that is spoken to line by line.
type talk struct {
	t     *testing.T
	in    *io.PipeWriter
	lines chan string
}

// talk starts a program whose standard input and output are a conversation.
func (h *host) talk(t *testing.T, args ...string) *talk {
	t.Helper()
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	c := &talk{t: t, in: inW, lines: make(chan string, 1024)}
	ended := make(chan struct{})
	cmd := h.command(t.Context(), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, os.Stderr
	if err := start(cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		_ = outW.Close()
		_ = inR.Close()
	}()
	go func() {
		defer close(ended)
		defer close(c.lines)
		for s := bufio.NewScanner(outR); s.Scan(); {
			c.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = inW.Close()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Cancel()
			<-ended
		}
	})
	return c
}

// say sends one line.
func (c *talk) say(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

// hear is the next line, which must come before limit.
func (c *talk) hear(limit time.Duration) string {
	c.t.Helper()
	select {
	case line, ok := <-c.lines:
		if !ok {
			c.t.Fatal("the program ended")
		}
		return line
	case <-time.After(limit):
		c.t.Fatalf("no line after %v", limit)
	}
	return ""
}

// testDig: dig asks Debian's unbound over UDP ASSOCIATE, through a forwarder
// that is nothing but a SOCKS client.
func testDig(t *testing.T, p *place) {
	require(t, "dig")
	const near = 5300
	for _, resolver := range []any{p.site.v4, p.site.v6, webName} {
		t.Run(fmt.Sprint(resolver), func(t *testing.T) {
			f := p.client.talk(t, socks(t, "forward", fmt.Sprint(near), fmt.Sprint(resolver), fmt.Sprint(dnsPort))...)
			if line := f.hear(20 * time.Second); line != "ready" {
				t.Fatalf("forwarder: %s", line)
			}
			dig := func(args ...string) string {
				return p.client.run(t, 40*time.Second, append([]string{
					"dig", "@127.0.0.1", "-p", fmt.Sprint(near), "+time=10", "+tries=2", "+noall", "+answer", "+short", "+ignore",
				}, args...)...)
			}
			if got := strings.TrimSpace(dig(webName, "A")); got != p.site.v4.String() {
				t.Errorf("A: %q, want %s", got, p.site.v4)
			}
			from := strings.Fields(f.hear(time.Second))
			if len(from) != 3 || from[2] != fmt.Sprint(dnsPort) {
				t.Fatalf("the answer came from %q", from)
			}
			if a, err := netip.ParseAddr(from[1]); err != nil || a != p.site.v4 && a != p.site.v6 {
				t.Errorf("the answer came from %q", from)
			}
			if got := strings.TrimSpace(dig(webName, "AAAA")); got != p.site.v6.String() {
				t.Errorf("AAAA: %q, want %s", got, p.site.v6)
			}
			// About 3 kB in one datagram: in fragments, inside and outside.
			if got := strings.Count(dig(longName, "TXT", "+bufsize=4096"), strings.Repeat("x", 248)); got != 12 {
				t.Errorf("%d strings of the long answer arrived, want 12", got)
			}
		})
	}
}

// testPython: what the Python client can do that no Debian program does.
func testPython(t *testing.T, p *place) {
	const get = `GET /index.html HTTP/1.0\r\n\r\n`
	port := fmt.Sprint(httpPort)
	for _, target := range []string{webName, v4Name, v6Name, p.site.v4.String(), p.site.v6.String()} {
		got := p.ask(t, "connect", target, port, get)
		if !strings.HasPrefix(got, "0\nHTTP/1.1 200") || !strings.HasSuffix(got, "hello from nginx") {
			t.Errorf("connect %s: %q", target, got)
		}
		if !strings.Contains(target, ":") {
			if got := p.ask(t, "connect4", target, port); got != "90" {
				t.Errorf("connect4 %s: reply %s, want 90", target, got)
			}
		}
	}
	if got := p.ask(t, "connect4", webName, fmt.Sprint(closed)); got != "91" {
		t.Errorf("connect4 to a closed port: reply %s, want 91", got)
	}
	if got := p.ask(t, "resolve", v4Name); got != "0 "+p.site.v4.String() {
		t.Errorf("resolve %s: %q", v4Name, got)
	}
	if got := p.ask(t, "resolve", v6Name); got != "0 "+p.site.v6.String() {
		t.Errorf("resolve %s: %q", v6Name, got)
	}
	if got := strings.TrimSuffix(p.ask(t, "ptr", ptrAddress), "."); got != "0 "+webName {
		t.Errorf("ptr %s: %q", ptrAddress, got)
	}
	if got := p.ask(t, "resolve", noName); strings.HasPrefix(got, "0 ") || got == "" {
		t.Errorf("resolve %s: %q, want a refusal", noName, got)
	}
	// The peer is on the Internet, and sockets can't receive for it: the reply
	// has to say so at once, with a code that isn't success.
	if !p.public {
		if got := p.ask(t, "bind", p.site.v4.String(), port); strings.HasPrefix(got, "0 ") || got == "" {
			t.Errorf("bind for %s: %q, want a refusal", p.site.v4, got)
		}
	}
	kept := p.client.talk(t, socks(t, "kept", webName, port, "/index.html")...)
	if got := kept.hear(20 * time.Second); got != "connected" {
		t.Fatalf("kept: %q", got)
	}
	for range 20 {
		kept.say("again")
		if got := kept.hear(20 * time.Second); got != "200" {
			t.Fatalf("kept: %q", got)
		}
	}
}

// testMalformed: a request that can't be understood gets the protocol's own
// error, where it has one, and a closed connection.
func testMalformed(t *testing.T, p *place) {
	for _, c := range []struct{ name, send, want string }{
		{"no method in common", "05017f", "05ff"},
		{"unknown command", "050100" + "0509000100000000" + "0050", "0500" + "0507"},
		{"unknown address type", "050100" + "05010009" + "00000000" + "0050", "0500" + "0508"},
		{"socks4 unknown command", "0409" + "0050" + "7f000001" + "00", "005b"},
		// "GET oops" and "CONNECT nowhere HTTP/1.1", answered "HTTP/1.1 400"
		{"http request line", "474554206f6f70730d0a0d0a", "485454502f312e3120343030"},
		{"http connect without a port", "434f4e4e454354206e6f776865726520485454502f312e310d0a0d0a", "485454502f312e3120343030"},
		{"not a protocol", "ff00ff00ff00ff00", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got := p.ask(t, "raw", c.send)
			if !strings.HasPrefix(got, c.want) {
				t.Errorf("sent %s, got %s, want %s…", c.send, got, c.want)
			}
			if !strings.HasSuffix(got, "closed") {
				t.Errorf("sent %s, got %s, want the end of the connection", c.send, got)
			}
			if c.want == "" && got != "closed" {
				t.Errorf("sent %s, got %s, want nothing and the end", c.send, got)
			}
		})
	}
}
