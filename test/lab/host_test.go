//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A host is a network namespace with a scratch folder, or, with an empty ns,
// the machine itself.
type host struct {
	ns  string
	dir string
}

// prefix begins the name of everything of this run outside the work folder.
func prefix() string { return fmt.Sprintf("anytun-%d", os.Getpid()) }

var hostNumber atomic.Uint32

// newHost makes a namespace with its loopback up, removed with the test.
// resolver is what its /etc/resolv.conf names.
func newHost(t *testing.T, label, resolver string) *host {
	t.Helper()
	h := &host{
		ns:  fmt.Sprintf("%s-%d-%s", prefix(), hostNumber.Add(1), label),
		dir: t.TempDir(),
	}
	if err := openToAll(h.dir); err != nil {
		t.Fatal(err)
	}
	// ip netns exec lays the files of this folder over those of /etc.
	etc := filepath.Join("/etc/netns", h.ns)
	t.Cleanup(func() { removeHost(t, h.ns) })
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"resolv.conf": "nameserver " + resolver + "\n",
		"hosts":       "127.0.0.1 localhost\n::1 localhost\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ip(t, "netns", "add", h.ns)
	ip(t, "-n", h.ns, "link", "set", "lo", "up")
	// Link-local addresses usable at once: nobody else can have them here.
	h.sysctl(t, "net.ipv6.conf.default.accept_dad=0")
	return h
}

// openToAll lets other users pass through the folders above dir that the test
// framework made for this user alone, and gives dir to the ordinary user.
func openToAll(dir string) error {
	tmp := os.TempDir()
	for d := filepath.Dir(dir); len(d) > len(tmp); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			return err
		}
	}
	uid, gid := ordinaryUser()
	return os.Chown(dir, uid, gid)
}

// ordinaryUser is who the gateway programs run as.
func ordinaryUser() (uid, gid int) {
	if os.Geteuid() != 0 {
		return os.Getuid(), os.Getgid()
	}
	if u, err := user.Lookup("nobody"); err == nil {
		uid, _ = strconv.Atoi(u.Uid)
		gid, _ = strconv.Atoi(u.Gid)
		return uid, gid
	}
	return 65534, 65534
}

// removeHost deletes a namespace after ending what still runs in it.
func removeHost(t *testing.T, ns string) {
	pids, _ := exec.Command("ip", "netns", "pids", ns).Output()
	for _, field := range strings.Fields(string(pids)) {
		if pid, err := strconv.Atoi(field); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	out, err := exec.Command("ip", "netns", "del", ns).CombinedOutput()
	if err != nil && t != nil && !t.Failed() {
		t.Errorf("ip netns del %s: %s", ns, bytes.TrimSpace(out))
	}
	_ = os.RemoveAll(filepath.Join("/etc/netns", ns))
}

// removeStale removes namespaces whose test process is gone.
func removeStale() {
	if os.Geteuid() != 0 {
		return
	}
	var names []string
	for _, dir := range []string{"/run/netns", "/etc/netns"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	for _, name := range names {
		var pid int
		if _, err := fmt.Sscanf(name, "anytun-%d-", &pid); err != nil {
			continue
		}
		// Our own number can only be left over from an earlier process too.
		if pid == os.Getpid() || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			removeHost(nil, name)
		}
	}
}

// ip runs iproute2's ip.
func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
}

// command prepares a program on the host. It dies with the test process.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	if h.ns != "" {
		args = append([]string{"ip", "netns", "exec", h.ns}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = h.dir
	cmd.Env = append(environment(), "HOME="+h.dir, "TMPDIR="+h.dir, "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// environment is this process's without what would change how programs reach
// the network or what the gateway's flags are.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool {
		name, _, _ := strings.Cut(strings.ToUpper(kv), "=")
		return strings.HasSuffix(name, "_PROXY") || strings.HasPrefix(name, "ANYTUN_")
	})
}

// ordinary puts the command line of a user without any privilege before args.
func ordinary(args ...string) []string {
	if os.Geteuid() != 0 {
		return args
	}
	uid, gid := ordinaryUser()
	return append([]string{
		"setpriv", "--reuid", strconv.Itoa(uid), "--regid", strconv.Itoa(gid), "--clear-groups",
		"--inh-caps=-all", "--no-new-privs", "--pdeathsig", "KILL", "--",
	}, args...)
}

// A result is what a program that has ended leaves.
type result struct {
	stdout, stderr string
	code           int // exit status; -1 when a signal ended it
}

// try runs a program to its end and doesn't judge its exit status. Running
// longer than limit fails the test.
func (h *host) try(t *testing.T, limit time.Duration, args ...string) result {
	t.Helper()
	return h.tryInput(t, limit, "", args...)
}

func (h *host) tryInput(t *testing.T, limit time.Duration, input string, args ...string) result {
	t.Helper()
	var stdout bytes.Buffer
	r := h.stream(t, limit, strings.NewReader(input), &stdout, args...)
	r.stdout = stdout.String()
	return r
}

// stream is try for programs that read or print more than belongs in memory.
func (h *host) stream(t *testing.T, limit time.Duration, in io.Reader, out io.Writer, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var stderr bytes.Buffer
	cmd := h.command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &stderr
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if ctx.Err() != nil {
		t.Fatalf("%s: not finished after %v\n%s", strings.Join(args, " "), limit, tail(stderr.String(), 20))
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	return result{stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
}

// run runs a program that must succeed and returns what it printed.
func (h *host) run(t *testing.T, limit time.Duration, args ...string) string {
	t.Helper()
	r := h.try(t, limit, args...)
	if r.code != 0 {
		t.Fatalf("%s: exit status %d\n%s\n%s", strings.Join(args, " "), r.code, tail(r.stdout, 10), tail(r.stderr, 20))
	}
	return r.stdout
}

// nft loads a rule set into the host's kernel.
func (h *host) nft(t *testing.T, rules string) {
	t.Helper()
	if r := h.tryInput(t, 10*time.Second, rules, "nft", "-f", "-"); r.code != 0 {
		t.Fatalf("nft: %s", r.stderr)
	}
}

// A daemon is a program that runs until it is stopped or the test ends.
type daemon struct {
	host *host
	name string
	cmd  *exec.Cmd
	log  string        // path of what it prints
	done chan struct{} // closed when it has ended
}

// start starts a daemon, stopped with the test. What it printed last is shown
// when the test fails.
func (h *host) start(t *testing.T, name string, args ...string) *daemon {
	t.Helper()
	logFile, err := os.CreateTemp(h.dir, name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer logFile.Close()
	d := &daemon{host: h, name: name, log: logFile.Name(), done: make(chan struct{})}
	d.cmd = h.command(context.Background(), args...)
	d.cmd.Stdout, d.cmd.Stderr = logFile, logFile
	if err := start(d.cmd); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	go d.wait()
	t.Cleanup(func() {
		d.stop(t)
		if t.Failed() {
			t.Logf("%s printed last:\n%s", name, tail(d.printed(), 25))
		}
	})
	return d
}

func (d *daemon) wait() {
	_ = d.cmd.Wait() // how it ended is asked of ProcessState
	close(d.done)
}

// signal sends s to the daemon's main process.
func (d *daemon) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("%s: %v", d.name, err)
	}
}

// stop asks the daemon to end and insists after five seconds. It may be called
// more than once.
func (d *daemon) stop(t *testing.T) {
	t.Helper()
	d.signal(t, syscall.SIGTERM)
	patience := time.NewTimer(5 * time.Second)
	defer patience.Stop()
	select {
	case <-d.done:
	case <-patience.C:
		_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
		<-d.done
	}
}

// printed is everything the daemon has printed.
func (d *daemon) printed() string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// pid is the daemon's process id: ip netns exec and setpriv become the program.
func (d *daemon) pid() int { return d.cmd.Process.Pid }

// rss is the daemon's resident memory in bytes.
func (d *daemon) rss(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("%s: no VmRSS in its status", d.name)
	return 0
}

// listening waits until the daemon's host has a socket on the port. network is
// tcp or udp. Asking the kernel, not the port, leaves the daemon's counters alone.
func (d *daemon) listening(t *testing.T, network string, port int) {
	t.Helper()
	flag := map[string]string{"tcp": "-Hltn", "udp": "-Hlun"}[network]
	eventually(t, 20*time.Second, func() error {
		select {
		case <-d.done:
			t.Fatalf("%s ended: %v\n%s", d.name, d.cmd.ProcessState, tail(d.printed(), 20))
		default:
		}
		if d.host.run(t, 5*time.Second, "ss", flag, "sport = :"+strconv.Itoa(port)) == "" {
			return fmt.Errorf("%s doesn't listen on %s port %d", d.name, network, port)
		}
		return nil
	})
}

// eventually asks again until f has no error; after limit the last one is fatal.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
