//go:build linux

package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestServerRestart: the server dies and comes back with the same key, and the
// client, which nobody touches, carries new connections again.
func TestServerRestart(t *testing.T) {
	require(t, "curl")
	n := lab(t, netip.AddrPortFrom(srv4, serverPort).String())
	get := func() result {
		return n.client.try(t, 30*time.Second, curlArgs(20*time.Second, "-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/"))...)
	}
	if r := get(); r.code != 0 {
		t.Fatalf("before: %s", r.stderr)
	}
	for _, how := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		n.server.signal(t, how)
		select {
		case <-n.server.done:
		case <-time.After(30 * time.Second):
			t.Fatalf("the server is still there 30 s after %v", how)
		}
		if how == syscall.SIGTERM && n.server.cmd.ProcessState.ExitCode() != 0 {
			t.Errorf("after SIGTERM the server's exit status is %d", n.server.cmd.ProcessState.ExitCode())
		}
		n.server = n.cluster.startServer(t)
		began := time.Now()
		eventually(t, time.Minute, func() error {
			if r := get(); r.code != 0 {
				return fmt.Errorf("after %v: %s", how, r.stderr)
			}
			return nil
		})
		t.Logf("after %v and a restart, a new connection worked within %.1f s", how, time.Since(began).Seconds())
	}
}

// TestServerReload: a client added to the file is let in after SIGHUP, one taken
// out is not, and the download of a third goes on all the while.
func TestServerReload(t *testing.T) {
	require(t, "curl")
	address := netip.AddrPortFrom(srv4, serverPort).String()
	n := lab(t, address)
	noise(t, filepath.Join(n.site.web, "slow.bin"), 12<<20, 3)

	h := &counter{}
	done := make(chan result, 1)
	go func() {
		done <- n.client.stream(t, 90*time.Second, nil, h, curlArgs(80*time.Second,
			"-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/slow/slow.bin"))...)
	}()
	second := n.cluster.invite(t, "second", address)
	n.server.signal(t, syscall.SIGHUP)

	n.secondClient(t, second)
	get := curlArgs(20*time.Second, "-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/"))
	eventually(t, 40*time.Second, func() error {
		if r := n.router.try(t, 30*time.Second, get...); r.code != 0 {
			return fmt.Errorf("the added client: %s", r.stderr)
		}
		return nil
	})

	// A broken file must not throw anybody out.
	good, err := os.ReadFile(n.cluster.clients)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.cluster.clients, []byte("this is no clients file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.server.signal(t, syscall.SIGHUP)
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(n.server.printed(), "ERROR") && !strings.Contains(n.server.printed(), "WARN") {
			return fmt.Errorf("the server doesn't complain about its clients file")
		}
		return nil
	})
	if r := n.router.try(t, 30*time.Second, get...); r.code != 0 {
		t.Errorf("after a broken clients file: %s", r.stderr)
	}
	if err := os.WriteFile(n.cluster.clients, good, 0o600); err != nil {
		t.Fatal(err)
	}
	n.server.signal(t, syscall.SIGHUP)

	select {
	case r := <-done:
		if r.code != 0 || h.bytes != 12<<20 {
			t.Errorf("the download meanwhile: exit status %d, %d bytes: %s", r.code, h.bytes, r.stderr)
		}
	case <-time.After(100 * time.Second):
		t.Fatal("the download doesn't end")
	}
}

// secondClient starts a proxy on the router: another client of the same server,
// not behind the NAT.
func (n *network) secondClient(t *testing.T, invite string) *place {
	t.Helper()
	d := n.router.start(t, "anytun-proxy-2", ordinary(program(t, "anytun-proxy"),
		"--listen", proxyAddr, "--server", invite, "--log-level", "debug")...)
	d.listening(t, "tcp", socksPort)
	return &place{client: n.router, site: n.site, proxy: d}
}

// TestBind: an application waits for a connection with BIND, and one comes from
// a peer inside the tunnel, and only from the peer that was named.
func TestBind(t *testing.T) {
	address := netip.AddrPortFrom(srv4, serverPort).String()
	n := lab(t, address)
	invite := n.cluster.invite(t, "second", address)
	n.server.signal(t, syscall.SIGHUP)
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(n.server.printed(), "clients=2") {
			return fmt.Errorf("the server hasn't read its clients file again")
		}
		return nil
	})
	second := n.secondClient(t, invite)
	for _, inner := range []string{"100.64.0.2", "100.64.0.77"} {
		waiting := n.client.talk(t, socks(t, "bind", inner, "0")...)
		var code, port int
		var host string
		line := waiting.hear(20 * time.Second)
		if _, err := fmt.Sscan(line, &code, &host, &port); err != nil || code != 0 || host != "100.64.0.1" || port == 0 {
			t.Fatalf("bind for %s: %q", inner, line)
		}
		r := second.client.try(t, 30*time.Second, socks(t, "connect", host, fmt.Sprint(port), "ping!")...)
		if inner != "100.64.0.2" {
			if strings.Contains(r.stdout, "pong") {
				t.Errorf("a peer that wasn't named was let in: %q", r.stdout)
			}
			continue
		}
		if r.stdout != "0\npong\n" {
			t.Errorf("the peer got %q, want the answer\n%s", r.stdout, r.stderr)
		}
		if line := waiting.hear(20 * time.Second); !strings.HasPrefix(line, "0 100.64.0.2 ") {
			t.Errorf("second reply %q, want the peer's address", line)
		}
		if line := waiting.hear(20 * time.Second); line != "ping!" {
			t.Errorf("heard %q, want what the peer sent", line)
		}
	}
}

// TestDrain: asked to end, the proxy lets a transfer end first, and then does.
func TestDrain(t *testing.T) {
	require(t, "curl")
	p := loopback(t)
	noise(t, filepath.Join(p.site.web, "slow.bin"), 3<<20, 4)
	h := &counter{}
	done := make(chan result, 1)
	go func() {
		done <- p.client.stream(t, 60*time.Second, nil, h, curlArgs(50*time.Second,
			"-x", "socks5h://"+proxyAddr, url("http", webName, httpPort, "/slow/slow.bin"))...)
	}()
	eventually(t, 10*time.Second, func() error {
		if r := p.client.run(t, 5*time.Second, "ss", "-Htn", "state", "established", fmt.Sprintf("dport = :%d", httpPort)); r == "" {
			return fmt.Errorf("the transfer hasn't begun")
		}
		return nil
	})
	p.proxy.signal(t, syscall.SIGTERM)
	if r := <-done; r.code != 0 || h.bytes != 3<<20 {
		t.Errorf("the transfer in progress: exit status %d, %d bytes: %s", r.code, h.bytes, r.stderr)
	}
	select {
	case <-p.proxy.done:
		if code := p.proxy.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("exit status %d, want 0", code)
		}
	case <-time.After(30 * time.Second):
		t.Error("the proxy hasn't ended 30 s after its last connection did")
	}
}

// TestMistakes: what a person gets wrong is answered in a sentence and a hint,
// with the exit status that says whose fault it was.
func TestMistakes(t *testing.T) {
	h := newOne(t)
	c := newCluster(t, h)
	invite := c.invite(t, "laptop", "127.0.0.1:4444")
	wrong := filepath.Join(h.dir, "wrong.key")
	write(t, wrong, "this is no key\n")
	unreadable := filepath.Join(h.dir, "unreadable.txt")
	write(t, unreadable, "")
	if err := os.Chmod(unreadable, 0); err != nil {
		t.Fatal(err)
	}
	c.startServer(t)
	startProxy(t, h)

	proxy, server := "anytun-proxy", "anytun-server"
	for _, m := range []struct {
		name string
		code int
		says []string // what the sentence has to name
		args []string
	}{
		{"wrong key file", 2, []string{wrong}, []string{server, "--listen", "127.0.0.1:4445", "--cluster-key", wrong, "--clients", c.clients}},
		{"no key file", 2, []string{"missing.key", "keygen"}, []string{server, "--listen", "127.0.0.1:4445", "--cluster-key", "missing.key", "--clients", c.clients}},
		{"unreadable clients file", 2, []string{unreadable}, []string{server, "--listen", "127.0.0.1:4445", "--cluster-key", c.key, "--clients", unreadable}},
		{"server port taken", 1, []string{"4444", "in use"}, []string{server, "--listen", "127.0.0.1:4444", "--cluster-key", c.key, "--clients", c.clients}},
		{"proxy port taken", 1, []string{proxyAddr, "in use"}, []string{proxy, "--listen", proxyAddr}},
		{"key over an existing key", 2, []string{c.key, "exists"}, []string{server, "keygen", "--out", c.key}},
		{"no such flag", 2, []string{"--lisen"}, []string{proxy, "--lisen", "127.0.0.1:1081"}},
		{"bad address", 2, []string{"nonsense"}, []string{proxy, "--listen", "nonsense"}},
		{"not an invite", 2, []string{"anytun://"}, []string{proxy, "--listen", "127.0.0.1:1081", "--server", "http://127.0.0.1"}},
		{"half an invite", 2, []string{"key"}, []string{proxy, "--listen", "127.0.0.1:1081", "--server", "anytun://127.0.0.1:4444"}},
	} {
		t.Run(m.name, func(t *testing.T) {
			m.args[0] = program(t, m.args[0])
			r := h.try(t, 20*time.Second, ordinary(m.args...)...)
			if r.code != m.code {
				t.Errorf("exit status %d, want %d", r.code, m.code)
			}
			lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
			if len(lines) > 4 || !strings.Contains(r.stderr, ": error: ") {
				t.Errorf("not one sentence: %q", r.stderr)
			}
			for _, s := range m.says {
				if !strings.Contains(r.stderr, s) {
					t.Errorf("it doesn't say %q: %q", s, r.stderr)
				}
			}
			if strings.Contains(r.stderr, "goroutine ") || strings.Contains(r.stderr, "panic") {
				t.Errorf("not for people: %q", r.stderr)
			}
		})
	}
	t.Run("unreachable server", func(t *testing.T) {
		// The invite's server, at a port where nobody answers: the proxy keeps
		// trying, says so, isn't ready, and refuses connections in bounded time.
		dead := strings.Replace(invite, ":4444", ":4999", 1)
		d := h.start(t, "anytun-proxy", ordinary(program(t, proxy), "--listen", "127.0.0.1:1081", "--server", dead, "--admin", "127.0.0.1:9081", "--dial-timeout", "3s")...)
		d.listening(t, "tcp", 1081)
		eventually(t, 30*time.Second, func() error {
			if !strings.Contains(d.printed(), "127.0.0.1:4999") {
				return fmt.Errorf("it doesn't name the server: %q", d.printed())
			}
			return nil
		})
		code := h.run(t, 10*time.Second, "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:9081/readyz")
		if code != "503" {
			t.Errorf("/readyz: %s, want 503", code)
		}
		p := &place{client: h}
		if got := p.ask(t, "--proxy", "127.0.0.1:1081", "connect", "192.0.2.1", "80"); got == "" || got == "0" {
			t.Errorf("reply %q, want a refusal", got)
		}
	})
}
