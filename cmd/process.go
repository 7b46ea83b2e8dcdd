package cmd

import (
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
)

// Process is all that a command sees of the process it runs in, so that a test
// can run it with arguments, an environment and signals of its own.
type Process struct {
	Args      []string // without the program's name
	Stdin     io.Reader
	Stdout    io.Writer
	Stderr    io.Writer
	LookupEnv func(string) (string, bool)

	// Notify catches SIGINT, SIGTERM and SIGHUP from now on and returns the
	// channel they arrive at; stop lets go of them again.
	Notify func() (signals <-chan os.Signal, stop func())
}

// OS returns the real process.
func OS() *Process {
	return &Process{
		Args:      os.Args[1:],
		Stdin:     os.Stdin,
		Stdout:    os.Stdout,
		Stderr:    os.Stderr,
		LookupEnv: os.LookupEnv,
		Notify:    notify,
	}
}

func notify() (<-chan os.Signal, func()) {
	// Room for a drain, a second signal that ends at once, and a reload that
	// arrives while an earlier one is under way; what doesn't fit is dropped by
	// package signal, and it would only repeat what is queued.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	return signals, func() { signal.Stop(signals) }
}

// linkedVersion is set by release builds with -ldflags -X.
var linkedVersion string

// Version returns the version of this build: what the release build put in, or
// the module version or commit that the Go toolchain recorded.
func Version() string {
	if linkedVersion != "" {
		return linkedVersion
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	var revision, dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "+dirty"
			}
		}
	}
	if revision == "" {
		return "devel"
	}
	return "devel-" + revision[:min(12, len(revision))] + dirty
}

func versionLine(program string) string {
	return strings.Join([]string{program, Version(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}, " ")
}
