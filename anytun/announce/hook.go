package announce

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// hookRetry is how long after a failure a hook is run again.
const hookRetry = 5 * time.Second

// hookPath is the PATH of a hook. The program's own environment may hold
// secrets, so nothing of it is passed on.
const hookPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// hook runs the operator's command, one run at a time, for the newest wish: a
// wish that comes while another waits takes its place, since only the last one
// is true. A run that failed is repeated until it succeeds or the wish changes.
type hook struct {
	command  string
	prefixes string
	timeout  time.Duration
	log      *slog.Logger

	wishes chan hookWish // capacity 1: the newest. Only Announcer.run sends.
	done   chan struct{} // closed when loop has ended

	mu  sync.Mutex
	err error // of the newest run
}

type hookWish struct {
	action string // "announce" or "withdraw"
	why    string
}

func newHook(command string, prefixes []netip.Prefix, timeout time.Duration, log *slog.Logger) *hook {
	return &hook{
		command: command, prefixes: joined(prefixes), timeout: timeout, log: log,
		wishes: make(chan hookWish, 1), done: make(chan struct{}),
	}
}

func (k *hook) wish(announce bool, why string) {
	w := hookWish{action: "withdraw", why: why}
	if announce {
		w.action = "announce"
	}
	select {
	case <-k.wishes: // the older one, never run
	default:
	}
	k.wishes <- w
}

// end lets the last wish be carried out, once, and waits for it.
func (k *hook) end() {
	close(k.wishes)
	<-k.done
}

func (k *hook) trouble() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err == nil {
		return ""
	}
	return k.err.Error()
}

func (k *hook) loop() {
	defer close(k.done)
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	var w hookWish
	for {
		select {
		case next, ok := <-k.wishes:
			if !ok {
				return
			}
			w = next
		case <-retry.C:
		}
		retry.Stop()
		err := k.run(w)
		k.mu.Lock()
		k.err = err
		k.mu.Unlock()
		if err != nil {
			k.log.Warn("announce hook failed", "action", w.action, "err", err)
			retry.Reset(hookRetry)
		}
	}
}

// run runs the command once. Its error ends with the beginning of what the
// command wrote.
func (k *hook) run(w hookWish) error {
	ctx, cancel := context.WithTimeout(context.Background(), k.timeout)
	defer cancel()
	// "$@" hands the action on whatever the command looks like.
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", k.command+` "$@"`, "hook", w.action)
	cmd.Env = []string{
		"PATH=" + hookPath,
		"ANYTUN_ACTION=" + w.action,
		"ANYTUN_PREFIXES=" + k.prefixes,
		"ANYTUN_REASON=" + strings.ReplaceAll(w.why, "\x00", ""),
	}
	var out head
	cmd.Stdout, cmd.Stderr = &out, &out
	hookGroup(cmd)
	cmd.WaitDelay = time.Second // a grandchild may hold the pipe open
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("killed after %s", k.timeout)
	}
	if err != nil && len(out.b) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out.b)))
	}
	return err
}

// head keeps the first bytes written to it.
type head struct{ b []byte }

func (h *head) Write(p []byte) (int, error) {
	const most = 512 // bytes: a line or a few, for the log
	h.b = append(h.b, p[:min(len(p), most-len(h.b))]...)
	return len(p), nil
}
