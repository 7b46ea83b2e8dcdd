package cmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// serveAdmin runs an admin server until the test ends and returns its address.
func serveAdmin(t *testing.T, a *Admin) string {
	t.Helper()
	l, err := ListenAdmin("127.0.0.1:0", a.Logger)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func TestAdminPages(t *testing.T) {
	var ready atomic.Bool
	address := serveAdmin(t, &Admin{
		Program: "toy",
		Ready: func() error {
			if !ready.Load() {
				return errors.New("no session yet")
			}
			return nil
		},
		Facts: func() []Fact { return []Fact{{"sessions", "3"}} },
		Collectors: []prometheus.Collector{NewCollector(func(e *Emit) {
			e.Counter("anytun_drops_total", "Dropped packets.", 7, "reason", "replay")
			e.Counter("anytun_drops_total", "Dropped packets.", 1, "reason", "short")
			e.Gauge("anytun_sessions", "Sessions.", 3)
		})},
		Logger: slog.New(slog.DiscardHandler),
	})
	base := "http://" + address
	for _, test := range []struct {
		path string
		code int
		says []string
	}{
		{"/healthz", 200, []string{"ok"}},
		{"/readyz", 503, []string{"not ready: no session yet"}},
		{"/", 200, []string{"program", "ready", "no, no session yet", "sessions"}},
		{"/metrics", 200, []string{`anytun_drops_total{reason="replay"} 7`, `anytun_drops_total{reason="short"} 1`, "anytun_sessions 3", "anytun_ready 0", "anytun_build_info{", "go_goroutines"}},
		{"/debug/pprof/", 200, []string{"goroutine"}},
		{"/nothing", 404, nil},
	} {
		code, body := get(t, base+test.path)
		if code != test.code {
			t.Errorf("GET %s: %d, want %d", test.path, code, test.code)
		}
		for _, want := range test.says {
			if !strings.Contains(body, want) {
				t.Errorf("GET %s lacks %q:\n%s", test.path, want, body)
			}
		}
	}
	ready.Store(true)
	if code, body := get(t, base+"/readyz"); code != 200 || body != "ready\n" {
		t.Errorf("GET /readyz: %d %q", code, body)
	}

	r := runToy(t, nil, "status", "--admin", address)
	if r.code != ExitDone || !strings.Contains(r.out, "sessions  3") || !strings.Contains(r.out, "ready     yes") {
		t.Errorf("status: exit code %d\n%s%s", r.code, r.out, r.errors)
	}
	r = runToy(t, map[string]string{"ANYTUN_ADMIN": address}, "status", "--json")
	var s Status
	if err := json.Unmarshal([]byte(r.out), &s); err != nil || s.Program != "toy" || !s.Ready || s.Facts[0] != (Fact{"sessions", "3"}) {
		t.Errorf("status --json: %v\n%s", err, r.out)
	}
}

func TestStatusOfSomethingElse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.NotFoundHandler()}
	go func() { _ = other.Serve(l) }() // ends with the deferred Close
	defer other.Close()
	r := runToy(t, nil, "status", "--admin", l.Addr().String())
	if r.code != ExitFailure {
		t.Errorf("exit code %d", r.code)
	}
	checkReport(t, r.errors, "not an anytun admin server (HTTP status 404 Not Found)", "--admin")
}

func TestListenAdmin(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	first, err := ListenAdmin("127.0.0.1:0", logger)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if log.Len() != 0 {
		t.Errorf("loopback gave a warning: %s", log.String())
	}
	_, err = ListenAdmin(first.Addr().String(), logger)
	var e *Error
	if !errors.As(err, &e) || e.Code != ExitFailure || !strings.Contains(e.Error(), "address already in use") || !strings.Contains(e.Hint, "another process has this port") {
		t.Errorf("occupied port gave %#v", err)
	}
	open, err := ListenAdmin("0.0.0.0:0", logger)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if !strings.Contains(log.String(), "can be reached from other hosts") {
		t.Errorf("no warning for 0.0.0.0: %q", log.String())
	}
}
