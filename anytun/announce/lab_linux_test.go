package announce

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The lab: a core router with BIRD, and servers beside it, each a network
// namespace on a link of its own.
//
//	core 10.9.N.1, fd09:N::1 ──── 10.9.N.2, fd09:N::2 server N

const nsPrefix = "anytun-announce-"

// prepare starts startLoop and removes what a killed run has left.
func prepare() {
	go startLoop()
	entries, err := os.ReadDir("/run/netns")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, _, ok := strings.Cut(strings.TrimPrefix(e.Name(), nsPrefix), "-")
		if !strings.HasPrefix(e.Name(), nsPrefix) || !ok {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); os.IsNotExist(err) {
			_ = exec.Command("ip", "netns", "delete", e.Name()).Run()
		}
	}
}

// starts hands programs to startLoop.
var starts = make(chan func())

// startLoop starts every program from one operating system thread that lives as
// long as the process: a program's parent-death signal is bound to the thread.
func startLoop() {
	runtime.LockOSThread()
	for f := range starts {
		f()
	}
}

func start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	done := make(chan error, 1)
	starts <- func() { done <- cmd.Start() }
	return <-done
}

type lab struct {
	t    *testing.T
	dir  string
	core string // namespace

	config string // BIRD's
	router *exec.Cmd

	mu     sync.Mutex
	events []event // of the core's routing table, oldest first
}

// event is a change of the core's routing table.
type event struct {
	at   time.Time
	text string // as "ip monitor" writes it
}

// newLab sets up the core and the links to servers 1 to n. extra goes into the
// core's BGP template.
func newLab(t *testing.T, n int, extra string) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, p := range []string{"bird", "ip"} {
		if _, err := exec.LookPath(p); err != nil && os.Getenv("ANYTUN_REQUIRE") == "1" {
			t.Fatalf("not installed: %v (test/deps/install.sh installs it)", err)
		} else if err != nil {
			t.Skip("needs BIRD 2 and iproute2: ", err)
		}
	}
	l := &lab{t: t, dir: t.TempDir()}
	l.core = l.namespace("core")
	var peers strings.Builder
	for i := 1; i <= n; i++ {
		s := l.namespace(fmt.Sprintf("s%d", i))
		run(t, "ip", "link", "add", fmt.Sprintf("s%d", i), "netns", l.core, "type", "veth", "peer", "name", "core", "netns", s)
		for _, end := range []struct{ ns, dev, host string }{{l.core, fmt.Sprintf("s%d", i), "1"}, {s, "core", "2"}} {
			run(t, "ip", "-n", end.ns, "addr", "add", fmt.Sprintf("10.9.%d.%s/24", i, end.host), "dev", end.dev)
			run(t, "ip", "-n", end.ns, "addr", "add", fmt.Sprintf("fd09:%d::%s/64", i, end.host), "dev", end.dev, "nodad")
			run(t, "ip", "-n", end.ns, "link", "set", end.dev, "up")
		}
		fmt.Fprintf(&peers, "protocol bgp s%d from server { neighbor 10.9.%d.2 as 65001; }\n", i, i)
		fmt.Fprintf(&peers, "protocol bgp s%dv6 from server { neighbor fd09:%d::2 as 65001; }\n", i, i)
	}
	l.watch()
	l.config = fmt.Sprintf(`
log "%[1]s/bird.log" all;
router id 10.9.0.1;
protocol device {}
protocol kernel k4 { ipv4 { export where source = RTS_BGP; }; merge paths yes; }
protocol kernel k6 { ipv6 { export where source = RTS_BGP; }; merge paths yes; }
protocol bfd { interface "s*" { min rx interval 100 ms; min tx interval 100 ms; multiplier 3; }; }
template bgp server {
	local as 65000;
	connect delay time 1; connect retry time 1; error wait time 1, 2;
	ipv4 { import all; export none; extended next hop; };
	ipv6 { import all; export none; };
	%[2]s
}
%[3]s`, l.dir, extra, peers.String())
	l.bird()
	return l
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (l *lab) namespace(name string) string {
	l.t.Helper()
	ns := nsPrefix + strconv.Itoa(os.Getpid()) + "-" + name
	run(l.t, "ip", "netns", "add", ns)
	l.t.Cleanup(func() { _ = exec.Command("ip", "netns", "delete", ns).Run() })
	run(l.t, "ip", "-n", ns, "link", "set", "lo", "up")
	return ns
}

// spawn starts a program that the test's end kills.
func (l *lab) spawn(cmd *exec.Cmd) {
	l.t.Helper()
	if err := start(cmd); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// watch collects the changes of the core's routing table.
func (l *lab) watch() {
	cmd := exec.Command("ip", "-n", l.core, "monitor", "route")
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	l.spawn(cmd)
	go l.watchLoop(out)
}

func (l *lab) watchLoop(out io.Reader) {
	for in := bufio.NewScanner(out); in.Scan(); {
		l.mu.Lock()
		l.events = append(l.events, event{time.Now(), in.Text()})
		l.mu.Unlock()
	}
}

func (l *lab) bird() {
	l.t.Helper()
	file := filepath.Join(l.dir, "bird.conf")
	if err := os.WriteFile(file, []byte(l.config), 0o600); err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", l.core, "bird", "-f", "-c", file, "-s", l.dir+"/bird.ctl", "-P", l.dir+"/bird.pid")
	cmd.Stderr = os.Stderr
	l.router = cmd
	l.spawn(cmd)
	l.t.Cleanup(func() {
		if l.t.Failed() {
			log, _ := os.ReadFile(l.dir + "/bird.log")
			l.t.Logf("bird:\n%s", log)
		}
	})
}

// routes are the core's routes to a prefix: the gateways, in the table's order.
func (l *lab) routes(prefix string) []string {
	l.t.Helper()
	out := run(l.t, "ip", "-n", l.core, "-j", "-"+map[bool]string{true: "6", false: "4"}[strings.Contains(prefix, ":")], "route", "show", prefix)
	var routes []struct {
		Gateway  string
		Via      struct{ Host string }
		Nexthops []struct {
			Gateway string
			Via     struct{ Host string }
		}
	}
	if err := json.Unmarshal([]byte(out), &routes); err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
	var gateways []string
	for _, r := range routes {
		if r.Gateway+r.Via.Host != "" {
			gateways = append(gateways, r.Gateway+r.Via.Host)
		}
		for _, n := range r.Nexthops {
			gateways = append(gateways, n.Gateway+n.Via.Host)
		}
	}
	return gateways
}

// await waits until the core's routes to a prefix are n in number.
func (l *lab) await(prefix string, n int) []string {
	l.t.Helper()
	var routes []string
	until(l.t, func() string {
		if routes = l.routes(prefix); len(routes) == n {
			return ""
		}
		return fmt.Sprintf("%s has routes %v, want %d of them", prefix, routes, n)
	})
	return routes
}

// deletions are those of the core's routes to a prefix after begin.
func (l *lab) deletions(prefix string, begin time.Time) []event {
	// "ip" writes a host route without its length.
	if p := netip.MustParsePrefix(prefix); p.IsSingleIP() {
		prefix = p.Addr().String()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []event
	for _, e := range l.events {
		if e.at.After(begin) && strings.HasPrefix(e.text, "Deleted "+prefix+" ") {
			found = append(found, e)
		}
	}
	return found
}

// deleted is when, after begin, the core's route to a prefix was deleted.
func (l *lab) deleted(prefix string, begin time.Time) time.Duration {
	l.t.Helper()
	var at time.Duration
	until(l.t, func() string {
		if d := l.deletions(prefix, begin); len(d) > 0 {
			at = d[0].at.Sub(begin)
			return ""
		}
		return fmt.Sprintf("route to %s was not deleted", prefix)
	})
	return at
}

// server is the namespace of server i.
func (l *lab) server(i int) string { return fmt.Sprintf("%s%d-s%d", nsPrefix, os.Getpid(), i) }

// speaker is a helper that announces from one of the lab's servers.
type speaker struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
	log string
}

// speaker starts helper i.
func (l *lab) speaker(i int, c helperConfig) *speaker {
	l.t.Helper()
	s := &speaker{t: l.t, log: filepath.Join(l.dir, fmt.Sprintf("s%d-%d.log", i, time.Now().UnixNano()))}
	c.Log = s.log
	if c.Config.Interval == 0 {
		c.Config.Interval = 100 * time.Millisecond
		c.Config.Timeout = 10 * time.Second // the machine may be busy
	}
	config, err := json.Marshal(c)
	if err != nil {
		l.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	s.cmd = exec.Command("ip", "netns", "exec", l.server(i), self)
	s.cmd.Env = append(os.Environ(), helperEnv+"="+string(config))
	s.cmd.Stderr = os.Stderr
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		l.t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	s.out = bufio.NewScanner(out)
	s.out.Buffer(nil, 1<<24)
	l.spawn(s.cmd)
	l.t.Cleanup(func() {
		if l.t.Failed() {
			l.t.Logf("server %d:\n%s", i, s.read())
		}
	})
	return s
}

func (s *speaker) read() string {
	log, err := os.ReadFile(s.log)
	if err != nil {
		s.t.Error(err)
	}
	return string(log)
}

// say sends a line to the helper and reads its answer.
func (s *speaker) say(line string, answer any) {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.in, line); err != nil {
		s.t.Fatal(err)
	}
	if !s.out.Scan() {
		s.t.Fatalf("%s: no answer: %v", line, s.out.Err())
	}
	if err := json.Unmarshal(s.out.Bytes(), answer); err != nil {
		s.t.Fatalf("%s: %v: %s", line, err, s.out.Bytes())
	}
}

func (s *speaker) status() Status {
	s.t.Helper()
	var st Status
	s.say("status", &st)
	return st
}

func (s *speaker) signal(sig syscall.Signal) time.Time {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
	return time.Now()
}

func (s *speaker) awaitBFD(want string) {
	s.t.Helper()
	until(s.t, func() string {
		if got := s.status().Peers[0].BFD; got != want {
			return fmt.Sprintf("bfd is %q, want %q", got, want)
		}
		return ""
	})
}

// listening are the TCP ports that anything in the helper's namespace listens on.
func (s *speaker) listening() []string {
	s.t.Helper()
	var ports []string
	for _, file := range []string{"tcp", "tcp6"} {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", s.cmd.Process.Pid, file))
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line) // number, local, remote, state
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			port, err := strconv.ParseUint(f[1][strings.LastIndexByte(f[1], ':')+1:], 16, 16)
			if err != nil {
				s.t.Fatal(err)
			}
			ports = append(ports, strconv.FormatUint(port, 10))
		}
	}
	return ports
}

// check is for what must hold of every end.
func (e *stopped) check(t *testing.T) {
	t.Helper()
	if e.Err != "<nil>" {
		t.Errorf("Run: %s", e.Err)
	}
	for g := range strings.SplitSeq(e.Goroutines, "\n\n") {
		if strings.Contains(g, "gobgp") || strings.Contains(g, "eapache") {
			t.Errorf("left behind: %s", g)
		}
	}
}
