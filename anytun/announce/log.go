package announce

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// engineLog brings the BGP engine's words into the program's log. The engine
// calls Info what it does step by step, which here is Debug; only what a person
// might act on stays. Warnings, which come again and again while a peer is in
// trouble, and what a stranger's packets cause are passed on once a minute.
type engineLog struct {
	to    slog.Handler
	again *repeats // shared with all that came from WithAttrs and WithGroup
}

func newEngineLog(to slog.Handler) *engineLog {
	return &engineLog{to: to, again: &repeats{last: make(map[string]time.Time)}}
}

// worth are the engine's Info messages that are worth it.
var worth = map[string]bool{
	"Peer Up":               true,
	"Peer Down":             true,
	"received notification": true,
}

// perPacket are messages that a stranger can cause, one for each packet.
var perPacket = map[string]bool{
	"Unknown BFD peer": true,
	"Invalid packet":   true,
	"Can't find configuration for a new passive connection": true,
}

func (l *engineLog) Enabled(ctx context.Context, level slog.Level) bool {
	return l.to.Enabled(ctx, level)
}

func (l *engineLog) Handle(ctx context.Context, r slog.Record) error {
	if r.Level == slog.LevelInfo && !worth[r.Message] {
		r.Level = slog.LevelDebug
		if !l.to.Enabled(ctx, r.Level) {
			return nil
		}
	}
	if (r.Level >= slog.LevelWarn || perPacket[r.Message]) && !l.again.first(r) {
		return nil
	}
	out := slog.NewRecord(r.Time, r.Level, "bgp: "+strings.ToLower(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "Topic" {
			a.Key = strings.ToLower(a.Key)
			out.AddAttrs(a)
		}
		return true
	})
	return l.to.Handle(ctx, out)
}

func (l *engineLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	lower := make([]slog.Attr, 0, len(attrs))
	for _, a := range attrs {
		if a.Key != "Topic" {
			a.Key = strings.ToLower(a.Key)
			lower = append(lower, a)
		}
	}
	return &engineLog{to: l.to.WithAttrs(lower), again: l.again}
}

func (l *engineLog) WithGroup(name string) slog.Handler {
	return &engineLog{to: l.to.WithGroup(name), again: l.again}
}

// repeats knows which warnings were passed on within the last minute.
type repeats struct {
	mu   sync.Mutex
	last map[string]time.Time // bounded: cleared when it has grown to repeatsMax
}

const repeatsMax = 256

func (p *repeats) first(r slog.Record) bool {
	key := r.Message
	r.Attrs(func(a slog.Attr) bool { key += "\x00" + a.Value.String(); return true })
	p.mu.Lock()
	defer p.mu.Unlock()
	if at, ok := p.last[key]; ok && r.Time.Sub(at) < time.Minute {
		return false
	}
	if len(p.last) >= repeatsMax {
		clear(p.last)
	}
	p.last[key] = r.Time
	return true
}
