package cmd

import (
	"io"
	"log/slog"
	"strings"

	"github.com/urfave/cli/v2"
)

// LogFlags returns the flags that NewLogger reads.
func LogFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "log-level", Value: "info", Usage: "lowest `LEVEL` logged: debug, info, warn or error"},
		&cli.StringFlag{Name: "log-format", Value: "text", Usage: "`FORMAT` of the log on standard error: text or json"},
	}
}

// NewLogger returns the logger that the flags of LogFlags describe; it writes to w.
func NewLogger(w io.Writer, s *Settings) (*slog.Logger, error) {
	var level slog.Level
	switch name := s.String("log-level"); strings.ToLower(name) {
	case "debug":
		level = slog.LevelDebug
	case "info":
		level = slog.LevelInfo
	case "warn":
		level = slog.LevelWarn
	case "error":
		level = slog.LevelError
	default:
		return nil, Usage("give debug, info, warn or error", "--log-level: %q is not a level", name)
	}
	options := &slog.HandlerOptions{Level: level}
	switch name := s.String("log-format"); name {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	default:
		return nil, Usage("give text or json", "--log-format: %q is not a format", name)
	}
}
