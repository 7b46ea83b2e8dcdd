package main

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/cmd/cmdtest"
	"github.com/anytun-go/anytun/test/loopback"
)

func startServer(t *testing.T, dir string, args ...string) (s *cmdtest.Running, admin string) {
	t.Helper()
	s = command.Start(t, append([]string{"--state-dir", dir, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"}, args...)...)
	return s, s.Line(t, "admin pages")["address"].(string)
}

func TestServeAndReload(t *testing.T) {
	dir := files(t)
	s, admin := startServer(t, dir)
	if line := s.Line(t, "serving"); line["clients"] != 1.0 || line["server_number"] != 1.0 {
		t.Errorf("got %v", line)
	}
	response, err := http.Get("http://" + admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	page, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"anytun_ready 1", "anytun_server_sessions 0", `anytun_server_dropped_total{reason="forged"} 0`, `anytun_egress_flows{kind="udp"} 0`, `anytun_udp_dropped_total{reason="truncated",side="server"} 0`} {
		if !strings.Contains(string(page), want+"\n") {
			t.Errorf("the metrics page lacks %s:\n%s", want, page)
		}
	}

	clients := filepath.Join(dir, "clients.txt")
	write(t, clients, "nonsense\n", 0o600)
	s.Signal(syscall.SIGHUP)
	line := s.Line(t, "the clients stay as they were; correct the file and send SIGHUP again")
	if text, _ := line["error"].(string); !strings.Contains(text, "clients.txt: line 1: ") {
		t.Errorf("got %v", line)
	}
	write(t, clients, "# nobody\n", 0o600)
	s.Signal(syscall.SIGHUP)
	if line := s.Line(t, "read the clients file"); line["clients"] != 0.0 || line["gone"] != 1.0 {
		t.Errorf("got %v", line)
	}
	r := command.Run(t, nil, "status", "--admin", admin)
	if r.Code != cmd.ExitDone || !strings.Contains(r.Out, "clients enrolled  0\n") {
		t.Errorf("status: exit code %d\n%s%s", r.Code, r.Out, r.Errors)
	}
	s.Signal(syscall.SIGTERM)
	if code := s.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
}

// A server announces once its own check went well, and drain makes it withdraw,
// serve on for a while, and end.
func TestAnnounceAndDrain(t *testing.T) {
	dir := files(t)
	told := filepath.Join(dir, "told")
	s, admin := startServer(t, dir, "--announce", "198.51.100.1", "--announce-hook", "echo $ANYTUN_PREFIXES >>"+told+" ; echo >>"+told, "--drain-time", "1s")
	lines := func() string {
		text, _ := os.ReadFile(told)
		return string(text)
	}
	for deadline := time.Now().Add(cmdtest.Hangs); !strings.Contains(lines(), "announce\n"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the hook was not told to announce: %q", lines())
		}
	}
	if r := command.Run(t, nil, "status", "--admin", admin); !strings.Contains(r.Out, "announcing\n") {
		t.Errorf("status says nothing of it:\n%s", r.Out)
	}
	// Not for web pages.
	response, err := http.Post("http://"+admin+"/drain", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusForbidden {
		t.Errorf("a request without the header was answered %v", response.Status)
	}
	if r := command.Run(t, nil, "drain", "--admin", admin); r.Code != cmd.ExitDone || r.Out != "draining\n" {
		t.Errorf("drain: exit code %d, %q", r.Code, r.Out+r.Errors)
	}
	s.Line(t, "draining; a second signal ends at once")
	if code := s.Wait(); code != cmd.ExitDone {
		t.Errorf("exit code %d", code)
	}
	if text := lines(); !strings.Contains(text, "198.51.100.1/32") || !strings.HasSuffix(strings.TrimSpace(text), "withdraw") {
		t.Errorf("the hook was told %q", text)
	}
	r := command.Run(t, nil, "drain", "--admin", admin)
	r.CheckError(t, "anytun-server", cmd.ExitFailure, "nobody answers on the admin address", "--admin")
}

// Two servers form a cluster by themselves, and each gets a number of its own.
func TestNumbersAreLeased(t *testing.T) {
	first, second := files(t), files(t)
	key, err := os.ReadFile(filepath.Join(first, "cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(second, "cluster.key"), string(key), 0o600)
	ports := []string{loopback.Addr(t), loopback.Addr(t)}
	var servers []*cmdtest.Running
	for i, dir := range []string{first, second} {
		servers = append(servers, command.Start(t, "--state-dir", dir, "--listen", "127.0.0.1:0",
			"--cluster-listen", ports[i], "--cluster-join", ports[1-i]))
	}
	a, b := servers[0].Line(t, "serving")["server_number"], servers[1].Line(t, "serving")["server_number"]
	if a == b || a == nil || b == nil {
		t.Errorf("numbers %v and %v", a, b)
	}
	for _, s := range servers {
		s.Signal(syscall.SIGTERM)
		if code := s.Wait(); code != cmd.ExitDone {
			t.Errorf("exit code %d", code)
		}
	}
	// Alone there is nobody to ask, but a server that had a number goes on with it.
	s := command.Start(t, "--state-dir", second, "--listen", "127.0.0.1:0", "--cluster-listen", ports[1], "--cluster-join", ports[0])
	if again := s.Line(t, "serving")["server_number"]; again != b {
		t.Errorf("number %v the first time, %v when it started again", b, again)
	}
}

func TestOccupiedPort(t *testing.T) {
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	address := taken.LocalAddr().String()
	r := command.Run(t, nil, "--state-dir", files(t), "--listen", "127.0.0.1:0", "--listen", address)
	r.CheckError(t, "anytun-server", cmd.ExitFailure, "--listen "+address+": address already in use", "another process has this port")
}

func TestForeignAddress(t *testing.T) {
	// 192.0.2.0/24 is for documentation; no host has an address of it.
	r := command.Run(t, nil, "--state-dir", files(t), "--listen", "192.0.2.1:4444")
	r.CheckError(t, "anytun-server", cmd.ExitFailure, "--listen 192.0.2.1:4444: cannot assign requested address", "this host doesn't have the address")
}

// A key file that was left alone for some epochs is rewritten at the start, so
// that what was sent in between can't be opened with it.
func TestOldSecretsAreErased(t *testing.T) {
	dir := files(t)
	path := filepath.Join(dir, "cluster.key")
	old, err := session.NewCluster(time.Now().Add(-5 * session.DefaultEpoch))
	if err != nil {
		t.Fatal(err)
	}
	text := old.Marshal()
	write(t, path, string(text), 0o600)
	s, _ := startServer(t, dir)
	s.Line(t, "erased an old epoch's secret")
	now, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if secretLine(t, now) == secretLine(t, text) {
		t.Error("the file still holds the old secret")
	}
	again, err := session.ParseCluster(now, time.Now())
	if err != nil || again.Public() != old.Public() {
		t.Errorf("the rewritten file has the public key %v, want %v; %v", again.Public(), old.Public(), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func secretLine(t *testing.T, text []byte) string {
	t.Helper()
	_, after, ok := bytes.Cut(text, []byte("\nsecret = "))
	if !ok {
		t.Fatalf("no secret in %s", text)
	}
	return string(after)
}
