package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/cmd/cmdtest"
)

// startProxy runs anytun-proxy on a free port and returns that.
func startProxy(t *testing.T, args ...string) (*cmdtest.Running, string) {
	t.Helper()
	r := command.Start(t, append([]string{"--listen", "127.0.0.1:0"}, args...)...)
	return r, r.Line(t, "listening")["address"].(string)
}

// through returns an HTTP client whose connections go through a SOCKS5 port.
// The names in its URLs are left to the proxy.
func through(t *testing.T, address string, auth *proxy.Auth) *http.Client {
	t.Helper()
	dialer, err := proxy.SOCKS5("tcp", address, auth, proxy.Direct)
	if err != nil {
		t.Fatal(err)
	}
	// An idle connection that is kept would be one to wait for in a drain.
	transport := &http.Transport{DialContext: dialer.(proxy.ContextDialer).DialContext, DisableKeepAlives: true}
	return &http.Client{Transport: transport, Timeout: cmdtest.Hangs}
}

func fetch(c *http.Client, url string) (string, error) {
	response, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return string(body), err
}

// website serves some random bytes. They come from here and nowhere else.
func website(t *testing.T) (url, body string) {
	t.Helper()
	random := make([]byte, 300_000)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(random) }))
	t.Cleanup(s.Close)
	return s.URL, string(random)
}

// sample reads one value of a metrics page.
func sample(t *testing.T, page, series string) float64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(page)
	if m == nil {
		t.Fatalf("the metrics page has no %s:\n%s", series, page)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestEmbeddedServer(t *testing.T) {
	url, body := website(t)
	p, address := startProxy(t, "--admin", "127.0.0.1:0", "--auth", "alice:sesame")
	line := p.Line(t, "no --server given: using an embedded server, traffic leaves as sockets of this host")
	if line["level"] != "INFO" {
		t.Errorf("level %v", line["level"])
	}
	admin := "http://" + p.Line(t, "admin pages")["address"].(string)
	p.Line(t, "session established")

	got, err := fetch(through(t, address, &proxy.Auth{User: "alice", Password: "sesame"}), url)
	if err != nil || got != body {
		t.Fatalf("got %d bytes, %v; want %d", len(got), err, len(body))
	}
	if _, err := fetch(through(t, address, &proxy.Auth{User: "alice", Password: "wrong"}), url); err == nil {
		t.Error("a wrong password was accepted")
	}
	if page, err := fetch(http.DefaultClient, admin+"/readyz"); err != nil || page != "ready\n" {
		t.Errorf("readyz: %q, %v", page, err)
	}

	// The bytes went the whole road: through both netstacks, sealed, over UDP.
	page, err := fetch(http.DefaultClient, admin+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, series := range []string{
		`anytun_proxy_bytes_total{direction="in"}`,
		`anytun_netstack_bytes_in_total{side="client"}`,
		`anytun_netstack_bytes_out_total{side="server"}`,
		"anytun_client_bytes_in_total",
		"anytun_server_bytes_out_total",
		`anytun_udp_bytes_total{direction="in",side="client"}`,
		`anytun_egress_tcp_bytes_total{direction="down"}`,
	} {
		if v := sample(t, page, series); v < float64(len(body)) {
			t.Errorf("%s is %v, less than the %d bytes fetched", series, v, len(body))
		}
	}
	for series, want := range map[string]float64{
		"anytun_ready": 1, "anytun_client_connected": 1, "anytun_client_handshakes_total": 1,
		"anytun_server_sessions": 1, `anytun_client_dropped_total{reason="forged"}`: 0,
		`anytun_proxy_requests_total{kind="socks5_connect"}`: 1,
	} {
		if v := sample(t, page, series); v != want {
			t.Errorf("%s is %v, want %v", series, v, want)
		}
	}
	for _, series := range []string{ // how many depends on how busy this host is
		"anytun_client_gaps_total", "anytun_client_gap_seconds", "anytun_client_gap_last_seconds",
		"anytun_client_gap_longest_seconds", "anytun_client_suspect", "anytun_client_probes_total",
		"anytun_client_server_number", "anytun_client_leased_port_blocks", "anytun_client_ports_used_up_total",
	} {
		sample(t, page, series)
	}
	r := command.Run(t, nil, "status", "--admin", strings.TrimPrefix(admin, "http://"))
	for _, fact := range []string{"embedded", "public addresses", "1024-65535", "gaps"} {
		if r.Code != cmd.ExitDone || !strings.Contains(r.Out, fact) {
			t.Errorf("status without %q: exit code %d\n%s%s", fact, r.Code, r.Out, r.Errors)
		}
	}
	p.Signal(syscall.SIGTERM)
	if code := p.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
	if strings.Contains(p.Text(), "sesame") {
		t.Error("the log holds a password")
	}
}

// echo accepts connections and repeats what it reads.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().String()
}

func dialEcho(t *testing.T, socks, target string) net.Conn {
	t.Helper()
	dialer, err := proxy.SOCKS5("tcp", socks, nil, proxy.Direct)
	if err != nil {
		t.Fatal(err)
	}
	c, err := dialer.Dial("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(cmdtest.Hangs)); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	return c
}

func ping(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "ping" {
		t.Fatalf("got %q, %v", answer, err)
	}
}

func TestDrain(t *testing.T) {
	target := echo(t)
	p, address := startProxy(t, "--drain-time", "1h", "--admin", "127.0.0.1:0")
	admin := "http://" + p.Line(t, "admin pages")["address"].(string)
	c := dialEcho(t, address, target)
	p.Signal(syscall.SIGTERM)
	p.Line(t, "draining; a second signal ends at once")

	// Whoever comes now is refused; what is open goes on. The log line comes a
	// moment before the port closes.
	for {
		late, err := net.Dial("tcp", address)
		if errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		if err == nil {
			late.Close()
		} else if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
	}
	ping(t, c)
	if _, err := fetch(http.DefaultClient, admin+"/readyz"); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("readyz while draining: %v", err)
	}
	c.Close()
	if code := p.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	target := echo(t)
	p, address := startProxy(t, "--drain-time", "1h")
	c := dialEcho(t, address, target)
	p.Signal(os.Interrupt)
	p.Line(t, "draining; a second signal ends at once")
	p.Signal(os.Interrupt)
	if code := p.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the open connection ended with %v, want a reset", err)
	}
}

func TestOccupiedPorts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	r := command.Run(t, nil, "--listen", taken)
	r.CheckError(t, "anytun-proxy", cmd.ExitFailure, "--listen "+taken+": address already in use", "another process has this port")
	r = command.Run(t, nil, "--listen", "127.0.0.1:0", "--admin", taken, "--log-level", "error")
	r.CheckError(t, "anytun-proxy", cmd.ExitFailure, "--admin "+taken+": address already in use", "another process has this port")
}

func TestUnknownServerName(t *testing.T) {
	r := command.Run(t, nil, "--listen", "127.0.0.1:0", "--log-level", "error",
		"--server", "gw.invalid:4444", "--server-key", newKey(t).Public().String(),
		"--key", filepath.Join(t.TempDir(), "client.key"))
	r.CheckError(t, "anytun-proxy", cmd.ExitFailure, "look up the server: ", "check the name in --server")
}

// A server that never answers is no reason to end, but one to say so.
func TestUnreachableServer(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	keyFile := filepath.Join(t.TempDir(), "client.key")
	p, address := startProxy(t, "--server", silent.LocalAddr().String(), "--server-key", newKey(t).Public().String(),
		"--key", keyFile, "--admin", "127.0.0.1:0", "--dial-timeout", "1s")
	made := p.Line(t, "made a key; the server must enrol its public half: anytun-server invite --public-key")
	text, err := cmd.ReadSecret(keyFile, "key")
	if err != nil {
		t.Fatal(err)
	}
	if key, err := parseKeyFile(text); err != nil || key.Public().String() != made["public_key"] {
		t.Errorf("the log names the key %v; the file is %v", made["public_key"], err)
	}
	line := p.Line(t, "the server does not answer; check its address and key, that UDP gets through, and that this client is enrolled")
	if line["level"] != "WARN" || line["server"] != silent.LocalAddr().String() {
		t.Errorf("got %v", line)
	}
	_, err = fetch(through(t, address, nil), "http://192.0.2.1/")
	if err == nil || !strings.Contains(err.Error(), "network unreachable") {
		t.Errorf("an application is told %v, want network unreachable", err)
	}
	admin := p.Line(t, "admin pages")["address"].(string)
	r := command.Run(t, nil, "status", "--admin", admin)
	if r.Code != cmd.ExitDone || !strings.Contains(r.Out, "no, no session with the server ("+silent.LocalAddr().String()+")") {
		t.Errorf("status: exit code %d\n%s%s", r.Code, r.Out, r.Errors)
	}
	p.Signal(syscall.SIGTERM)
	if code := p.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
}

func TestReloadUsers(t *testing.T) {
	url, body := website(t)
	// Hashes of "one" and "two", at bcrypt's lowest cost.
	const (
		one = "$2a$04$4tTZHrDYjbXeJnr1QZYLdeJRR3qA/ikVq6mxkqLLmQ.Rtecxbhzui"
		two = "$2a$04$MBfuHeTBY2wKCngIU5Dnaeufd2BFvftThxQT4DFDyVEz.7Lo3SRUW"
	)
	users := write(t, "users", "alice:"+one+"\n", 0o600)
	p, address := startProxy(t, "--auth-file", users)
	try := func(password string) error {
		got, err := fetch(through(t, address, &proxy.Auth{User: "alice", Password: password}), url)
		if err == nil && got != body {
			err = fmt.Errorf("got %d bytes", len(got))
		}
		return err
	}
	if err := try("one"); err != nil {
		t.Fatal(err)
	}
	rewrite := func(text string) {
		if err := os.WriteFile(users, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		p.Signal(syscall.SIGHUP)
	}
	rewrite("alice\n")
	p.Line(t, "the users stay as they were; correct the file and send SIGHUP again")
	if err := try("one"); err != nil {
		t.Errorf("after a broken file: %v", err)
	}
	rewrite("alice:" + two + "\n")
	p.Line(t, "read the auth file")
	if err := try("one"); err == nil {
		t.Error("the old password is still good")
	}
	if err := try("two"); err != nil {
		t.Errorf("the new password: %v", err)
	}
}

// buildServer builds anytun-server. Its main package can't be imported, and a
// server in a process of its own is what people run.
func buildServer(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "anytun-server")
	build := exec.Command("go", "build", "-o", path, "../anytun-server")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// serverProcess is an anytun-server in a process of its own.
type serverProcess struct {
	*cmdtest.Log
	process *exec.Cmd
	ended   chan error
}

func startServer(t *testing.T, path string, args ...string) *serverProcess {
	t.Helper()
	s := &serverProcess{
		Log: cmdtest.NewLog(), ended: make(chan error, 1),
		process: exec.Command(path, append(args, "--log-format", "json", "--log-level", "debug")...),
	}
	s.process.Stderr = s.Log
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		s.ended <- s.process.Wait()
		s.Close()
	}()
	t.Cleanup(func() {
		_ = s.process.Process.Kill() // it may have ended
		<-s.ended
		if t.Failed() {
			t.Logf("log of anytun-server:\n%s", s.Text())
		}
	})
	return s
}

func (s *serverProcess) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := s.process.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// The two-host set-up of the README, on one host.
func TestInvitedClient(t *testing.T) {
	url, body := website(t)
	binary := buildServer(t)
	dir := t.TempDir()
	tool := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), binary, args...).Output()
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	tool("keygen", "--out", filepath.Join(dir, "cluster.key"))
	server := startServerWithClients(t, binary, dir, tool)
	address := server.Line(t, "listening")["address"].(string)

	inviteFile := write(t, "invite", tool("invite", "--state-dir", dir, "--name", "laptop", "--address", address)+"\n", 0o600)
	server.signal(t, syscall.SIGHUP)
	server.Line(t, "read the clients file")

	p, socks := startProxy(t, "--server", "@"+inviteFile)
	session := p.Line(t, "session established")
	if session["client"] != 2.0 {
		t.Errorf("got %v, want client 2", session)
	}
	got, err := fetch(through(t, socks, nil), url)
	if err != nil || got != body {
		t.Fatalf("got %d bytes, %v; want %d", len(got), err, len(body))
	}

	// A broken clients file changes nothing, and a good one drops who is gone.
	clients := filepath.Join(dir, "clients.txt")
	text, err := os.ReadFile(clients)
	if err != nil {
		t.Fatal(err)
	}
	rewrite := func(text string) {
		t.Helper()
		if err := os.WriteFile(clients, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		server.signal(t, syscall.SIGHUP)
	}
	rewrite(string(text) + "nonsense\n")
	server.Line(t, "the clients stay as they were; correct the file and send SIGHUP again")
	if got, err := fetch(through(t, socks, nil), url); err != nil || got != body {
		t.Errorf("after a broken clients file: got %d bytes, %v", len(got), err)
	}
	rewrite(strings.Replace(string(text), "\n", "\n#", strings.Count(string(text), "\n")-1))
	if line := server.NthLine(t, 2, "read the clients file"); line["clients"] != 0.0 || line["gone"] != 2.0 {
		t.Errorf("got %v, want no clients and 2 gone", line)
	}
	server.Line(t, "client is no longer enrolled")
	p.Line(t, "the server no longer knows this client; trying again")

	rewrite(string(text))
	p.NthLine(t, 2, "session established")
	if got, err := fetch(through(t, socks, nil), url); err != nil || got != body {
		t.Errorf("after the client was enrolled again: got %d bytes, %v", len(got), err)
	}
	server.signal(t, syscall.SIGTERM)
	if err := <-server.ended; err != nil {
		t.Errorf("the server ended with %v", err)
	}
	server.ended <- nil // for the cleanup
}

// startServerWithClients starts a server whose clients file has one client, who
// never comes.
func startServerWithClients(t *testing.T, binary, dir string, tool func(...string) string) *serverProcess {
	t.Helper()
	tool("invite", "--state-dir", dir, "--name", "nobody", "--address", "192.0.2.1:4444")
	return startServer(t, binary, "--state-dir", dir, "--listen", "127.0.0.1:0", "--allow-local")
}

func TestContextEndsTheProxy(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	log := cmdtest.NewLog()
	code := make(chan int, 1)
	go func() {
		defer log.Close()
		code <- run(ctx, &cmd.Process{
			Args: []string{"--listen", "127.0.0.1:0", "--log-format", "json"}, Stdout: io.Discard, Stderr: log,
			LookupEnv: func(string) (string, bool) { return "", false },
			Notify:    func() (<-chan os.Signal, func()) { return nil, func() {} },
		})
	}()
	log.Line(t, "listening")
	cancel()
	if c := <-code; c != cmd.ExitDone {
		t.Errorf("exit code %d: %s", c, log.Text())
	}
}

// With the sockets egress BIND works for peers inside the tunnel only, and says
// so for others.
func TestBind(t *testing.T) {
	_, address := startProxy(t)
	for _, test := range []struct {
		name  string
		peer  []byte // ATYP, address
		reply byte
		bound string // first bytes of the bound address
	}{
		{"anybody", []byte{1, 0, 0, 0, 0}, 0, "\x01\x64\x40\x00\x01"},
		{"a client", []byte{1, 100, 64, 0, 9}, 0, "\x01\x64\x40\x00\x01"},
		{"a host outside", []byte{1, 192, 0, 2, 1}, 7, "\x01\x00\x00\x00\x00"},
		{"a host outside, IPv6", append([]byte{4, 0x20, 0x01, 0x0d, 0xb8}, make([]byte, 12)...), 7, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(cmdtest.Hangs)); err != nil {
				t.Fatal(err)
			}
			request := append([]byte{5, 1, 0, 5, 2, 0}, test.peer...)
			if _, err := c.Write(append(request, 0, 80)); err != nil {
				t.Fatal(err)
			}
			answer := make([]byte, 2+4+4)
			if _, err := io.ReadFull(c, answer); err != nil {
				t.Fatal(err)
			}
			if answer[3] != test.reply || !strings.HasPrefix(string(answer[5:]), test.bound) {
				t.Errorf("reply %d, bound %x; want %d, %x", answer[3], answer[5:], test.reply, test.bound)
			}
		})
	}
}
