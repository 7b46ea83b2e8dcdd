package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	adminHeaderTimeout = 5 * time.Second
	adminReadTimeout   = 10 * time.Second
	// adminWriteTimeout has room for the 30 s that a CPU profile takes by default.
	adminWriteTimeout = 90 * time.Second
	adminIdleTimeout  = 2 * time.Minute
	// adminHeaderBytes bounds what a stranger can make the admin server hold.
	adminHeaderBytes = 16 << 10
)

// Fact is one line of the status page.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Status is what /status answers and what the status subcommand prints.
type Status struct {
	Program string    `json:"program"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Reason  string    `json:"reason,omitempty"` // why it is not ready
	Facts   []Fact    `json:"facts"`
}

// Admin serves /healthz, /readyz, /metrics, /status, /debug/pprof and a short
// page for people. Its fields are set before Handler or Serve is called; the
// functions are called concurrently.
type Admin struct {
	Program    string
	Ready      func() error // nil when the program can do its work
	Facts      func() []Fact
	Collectors []prometheus.Collector
	// Drain, if not nil, is what POST /drain does: it starts the end of the
	// program and returns at once.
	Drain  func()
	Logger *slog.Logger

	started time.Time
}

// ListenAdmin opens the admin port. Anybody who reaches it can read counters
// and profiles, so an address beyond loopback is opened with a warning.
func ListenAdmin(address string, logger *slog.Logger) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, ListenError("--admin", address, err)
	}
	if ap, err := netip.ParseAddrPort(l.Addr().String()); err == nil && !ap.Addr().IsLoopback() {
		logger.Warn("the admin port can be reached from other hosts; whoever reaches it can read profiles", "address", ap.String())
	}
	return l, nil
}

// ListenError turns an error of opening a socket into a sentence with a hint;
// an error that isn't the system's speaks for itself.
func ListenError(flag, address string, err error) error {
	var hint string
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another process has this port; stop it, or give another port with " + flag
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		hint = "give a port above 1023 with " + flag
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = "this host doesn't have the address; give one of its own with " + flag
	}
	return Failure(hint, "%s %s: %w", flag, address, rootCause(err))
}

// rootCause drops the repetition of the address that package net and others put
// before the cause.
func rootCause(err error) error {
	var errno syscall.Errno
	var op *net.OpError
	switch {
	case errors.As(err, &errno):
		return errno
	case errors.As(err, &op):
		return op.Err
	}
	return err
}

// Serve answers on l until ctx ends. It owns l.
func (a *Admin) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:           a.Handler(),
		ReadHeaderTimeout: adminHeaderTimeout,
		ReadTimeout:       adminReadTimeout,
		WriteTimeout:      adminWriteTimeout,
		IdleTimeout:       adminIdleTimeout,
		MaxHeaderBytes:    adminHeaderBytes,
		ErrorLog:          slog.NewLogLogger(a.Logger.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("admin server: %w", err)
	}
	return nil
}

// Handler returns the admin server's pages.
func (a *Admin) Handler() http.Handler {
	a.started = time.Now()
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		NewCollector(a.collectOwn))
	registry.MustRegister(a.Collectors...)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", a.servePage)
	mux.HandleFunc("GET /status", a.serveStatus)
	mux.HandleFunc("GET /healthz", serveHealth)
	mux.HandleFunc("GET /readyz", a.serveReady)
	if a.Drain != nil {
		mux.HandleFunc("POST /drain", a.serveDrain)
	}
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: slog.NewLogLogger(a.Logger.Handler(), slog.LevelWarn)}))
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// drainHeader must be in a request to drain. A web page can't make a browser
// send it to another origin without asking, so no page that an operator looks at
// can end the program.
const drainHeader = "X-Anytun-Drain"

func (a *Admin) serveDrain(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get(drainHeader) == "" {
		http.Error(w, "the header "+drainHeader+" is missing", http.StatusForbidden)
		return
	}
	a.Drain()
	w.WriteHeader(http.StatusAccepted)
	fmt.Fprintln(w, "draining")
}

func (a *Admin) collectOwn(e *Emit) {
	e.Gauge("anytun_build_info", "1, with the program and its version as labels.", 1, "program", a.Program, "version", Version())
	ready := 0.0
	if a.Ready() == nil {
		ready = 1
	}
	e.Gauge("anytun_ready", "1 when /readyz answers 200.", ready)
}

func (a *Admin) status() Status {
	s := Status{Program: a.Program, Version: Version(), Started: a.started.Round(time.Second), Ready: true, Facts: a.Facts()}
	if err := a.Ready(); err != nil {
		s.Ready, s.Reason = false, err.Error()
	}
	return s
}

func (a *Admin) servePage(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	a.status().Write(w)
	fmt.Fprint(w, "\n/healthz /readyz /metrics /status /debug/pprof/\n")
}

func (a *Admin) serveStatus(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(a.status()) // an error means that the asker went away
}

func serveHealth(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintln(w, "ok")
}

func (a *Admin) serveReady(w http.ResponseWriter, _ *http.Request) {
	if err := a.Ready(); err != nil {
		http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ready")
}

// Write writes the status as lines for people.
func (s Status) Write(w io.Writer) {
	ready := "yes"
	if !s.Ready {
		ready = "no, " + s.Reason
	}
	facts := append([]Fact{
		{"program", s.Program + " " + s.Version},
		{"started", s.Started.Format(time.RFC3339)},
		{"ready", ready},
	}, s.Facts...)
	width := 0
	for _, f := range facts {
		width = max(width, len(f.Name))
	}
	for _, f := range facts {
		fmt.Fprintf(w, "%-*s  %s\n", width, f.Name, f.Value)
	}
}

// maxStatusBytes bounds what AskStatus reads from whatever answers on the port.
const maxStatusBytes = 1 << 20

// AskDrain tells the program behind the admin server at address to drain.
func AskDrain(ctx context.Context, address string) error {
	response, err := askAdmin(ctx, http.MethodPost, address, "/drain")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusAccepted {
		return notAdmin(address, response)
	}
	return nil
}

// askAdmin makes a request to an admin server. The caller closes the body.
func askAdmin(ctx context.Context, method, address, path string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, nil)
	if err != nil {
		return nil, Usage("give host:port, such as 127.0.0.1:9080", "--admin: %q is not an address", address)
	}
	if method == http.MethodPost {
		request.Header.Set(drainHeader, "1")
	}
	// No proxy from the environment: the admin port is this host's own.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: adminReadTimeout}
	response, err := client.Do(request)
	if err != nil {
		return nil, Failure("start the program with --admin "+address+", or give the address it was started with",
			"nobody answers on the admin address %s: %w", address, rootCause(err))
	}
	return response, nil
}

func notAdmin(address string, response *http.Response) error {
	return Failure("give the address that follows --admin on the program's command line",
		"what answers on %s is not an anytun admin server (HTTP status %s)", address, response.Status)
}

// AskStatus asks the admin server at address for its status.
func AskStatus(ctx context.Context, address string) (Status, error) {
	response, err := askAdmin(ctx, http.MethodGet, address, "/status")
	if err != nil {
		return Status{}, err
	}
	defer response.Body.Close()
	var s Status
	if err := json.NewDecoder(io.LimitReader(response.Body, maxStatusBytes)).Decode(&s); err != nil || response.StatusCode != http.StatusOK {
		return Status{}, notAdmin(address, response)
	}
	return s, nil
}

// ShowStatus is the status subcommand: it asks the address in the flag admin
// and prints the answer, as JSON when the flag json is set.
func ShowStatus(ctx context.Context, s *Settings) error {
	status, err := AskStatus(ctx, s.String("admin"))
	if err != nil {
		return err
	}
	if s.Bool("json") {
		enc := json.NewEncoder(s.Process.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(status)
	}
	status.Write(s.Process.Stdout)
	return nil
}
