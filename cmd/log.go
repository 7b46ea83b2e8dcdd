package cmd

import (
	"context"
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

// Quieter returns a logger whose records count one level lower: what a part
// thinks worth knowing (info) is detail (debug) when it is only part of a whole.
func Quieter(logger *slog.Logger) *slog.Logger {
	return slog.New(quieter{logger.Handler()})
}

type quieter struct{ slog.Handler }

// lower leaves warnings and errors as they are.
func lower(level slog.Level) slog.Level {
	if level < slog.LevelWarn {
		return level - (slog.LevelInfo - slog.LevelDebug)
	}
	return level
}

func (q quieter) Enabled(ctx context.Context, level slog.Level) bool {
	return q.Handler.Enabled(ctx, lower(level))
}

func (q quieter) Handle(ctx context.Context, r slog.Record) error {
	r.Level = lower(r.Level)
	return q.Handler.Handle(ctx, r)
}

func (q quieter) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quieter{q.Handler.WithAttrs(attrs)}
}

func (q quieter) WithGroup(name string) slog.Handler { return quieter{q.Handler.WithGroup(name)} }
