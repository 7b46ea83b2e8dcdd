//go:build linux

package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// helperEnv names the helper that this test binary is started as, instead of
// running tests. Some parts need a process of their own: ten thousand open
// files on each side don't fit into one process's limit.
const helperEnv = "ANYTUN_LAB_HELPER"

// work is the folder of this run: binaries, generated files. World-readable,
// since the gateway programs run as another user.
var work string

func TestMain(m *testing.M) {
	// Daemons live in /usr/sbin, which an ordinary user's PATH leaves out.
	must(os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"))
	if helper := os.Getenv(helperEnv); helper != "" {
		must(runHelper(helper, os.Args[1:]))
		return
	}
	var err error
	work, err = os.MkdirTemp("", "anytun-lab-")
	must(err)
	defer os.RemoveAll(work)
	must(os.Chmod(work, 0o755))
	go startLoop()
	removeStale()
	m.Run() // its result becomes the exit status when TestMain returns
}

// must ends a run that can't begin.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// starts hands programs to startLoop.
var starts = make(chan func())

// startLoop starts every program from one operating system thread that lives as
// long as the process. A program's parent-death signal is bound to the thread
// that started it, so nothing is signalled early and nothing outlives the run.
func startLoop() {
	runtime.LockOSThread()
	for f := range starts {
		f()
	}
}

// start is cmd.Start on startLoop's thread.
func start(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	starts <- func() { done <- cmd.Start() }
	return <-done
}

// binaries builds both programs once for all tests. ANYTUN_LAB_BIN names a
// folder with programs to test instead: those of a release, or stand-ins.
var binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("ANYTUN_LAB_BIN"); dir != "" {
		return dir, nil
	}
	dir := filepath.Join(work, "bin")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	args := []string{"build", "-o", dir + "/"}
	if os.Getenv("ANYTUN_LAB_RACE") == "1" {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/anytun-proxy", "./cmd/anytun-server")...)
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, bytes.TrimSpace(out))
	}
	return dir, nil
})

// program is the path of one of our two programs.
func program(t *testing.T, name string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// tail is the last n lines of s.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = append([]string{fmt.Sprintf("... %d lines before", len(lines)-n)}, lines[len(lines)-n:]...)
	}
	return strings.Join(lines, "\n")
}
