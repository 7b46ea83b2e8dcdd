// Package cmdtest runs the commands inside a test: with arguments, environment
// and signals of the test's own, and a log that it can wait for.
package cmdtest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/cmd"
)

// Hangs is how long a test waits before it gives up. No test passes or fails by
// being faster or slower than something else.
const Hangs = time.Minute

// Main is the main function of a command.
type Main func(ctx context.Context, p *cmd.Process) int

// Result is what a finished command left.
type Result struct {
	Code        int
	Out, Errors string
}

// Run runs a command that ends by itself.
func (run Main) Run(t *testing.T, env map[string]string, args ...string) Result {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(t.Context(), process(env, &out, &errs, nil, args))
	return Result{code, out.String(), errs.String()}
}

func process(env map[string]string, out, errs io.Writer, signals <-chan os.Signal, args []string) *cmd.Process {
	return &cmd.Process{
		Args: args, Stdin: strings.NewReader(""), Stdout: out, Stderr: errs,
		LookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		Notify:    func() (<-chan os.Signal, func()) { return signals, func() {} },
	}
}

// CheckError checks that the program reported one error and one hint on its
// standard error, and nothing else.
func (r Result) CheckError(t *testing.T, program string, code int, says, hint string) {
	t.Helper()
	if r.Code != code {
		t.Errorf("exit code %d, want %d", r.Code, code)
	}
	first, rest, _ := strings.Cut(r.Errors, "\n")
	if !strings.HasPrefix(first, program+": error: ") || !strings.Contains(first, says) {
		t.Errorf("got %q, want an error that says %q", first, says)
	}
	if !strings.HasPrefix(rest, program+": hint: ") || !strings.Contains(rest, hint) || strings.Count(rest, "\n") != 1 {
		t.Errorf("got %q, want one line of hint that says %q", rest, hint)
	}
}

// Running is a command that goes on until it gets a signal.
type Running struct {
	*Log
	t       *testing.T
	signals chan os.Signal
	code    int // once the log is closed
}

// Start runs a command in the background; its log is JSON, with everything from
// level debug. The test's end ends it.
func (run Main) Start(t *testing.T, args ...string) *Running {
	t.Helper()
	r := &Running{Log: NewLog(), t: t, signals: make(chan os.Signal, 4)}
	ctx, cancel := context.WithCancel(context.Background())
	args = append(args, "--log-format", "json", "--log-level", "debug")
	go func() {
		defer r.Close()
		r.code = run(ctx, process(nil, io.Discard, r, r.signals, args))
	}()
	t.Cleanup(func() {
		cancel()
		<-r.closed
		if t.Failed() {
			t.Logf("log of the command with %q:\n%s", args, r.Text())
		}
	})
	return r
}

// Signal sends the command a signal.
func (r *Running) Signal(s os.Signal) { r.signals <- s }

// Wait returns the exit code once the command has ended.
func (r *Running) Wait() int {
	r.t.Helper()
	timer := time.NewTimer(Hangs)
	defer timer.Stop()
	select {
	case <-r.closed:
		return r.code
	case <-timer.C:
		r.t.Fatal("the command does not end")
		return -1
	}
}

// Log collects a command's log and lets tests wait for its lines. It is safe
// for concurrent use.
type Log struct {
	closed chan struct{}

	mu      sync.Mutex
	buffer  bytes.Buffer
	changed chan struct{} // closed by the next Write
}

// NewLog returns an empty log.
func NewLog() *Log { return &Log{closed: make(chan struct{}), changed: make(chan struct{})} }

// Write adds to the log.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.buffer.Write(p)
}

// Close says that nothing more comes. It is called once.
func (l *Log) Close() { close(l.closed) }

// Text returns the log so far.
func (l *Log) Text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buffer.String()
}

// Line waits for the first line of a JSON log whose message is msg and returns
// the line's values.
func (l *Log) Line(t *testing.T, msg string) map[string]any {
	t.Helper()
	return l.NthLine(t, 1, msg)
}

// NthLine is Line for the nth such line, counted from 1.
func (l *Log) NthLine(t *testing.T, n int, msg string) map[string]any {
	t.Helper()
	timer := time.NewTimer(Hangs)
	defer timer.Stop()
	for {
		l.mu.Lock()
		text, changed := l.buffer.String(), l.changed
		l.mu.Unlock()
		if values := find(text, n, msg); values != nil {
			return values
		}
		select {
		case <-changed:
		case <-l.closed:
			if values := find(l.Text(), n, msg); values != nil {
				return values
			}
			t.Fatalf("the command ended without logging %q; it logged\n%s", msg, l.Text())
		case <-timer.C:
			t.Fatalf("the command does not log %q; it logged\n%s", msg, l.Text())
		}
	}
}

func find(text string, n int, msg string) map[string]any {
	for line := range strings.Lines(text) {
		var values map[string]any
		if json.Unmarshal([]byte(line), &values) != nil || values["msg"] != msg {
			continue
		}
		if n--; n == 0 {
			return values
		}
	}
	return nil
}
