//go:build linux

package lab

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// merge joins what both ends say of each stream: what went up, and how
// steadily, is the sink's to say, and a broken stream is broken at either end.
func merge(load, sink []streamReport) []streamReport {
	merged, at := slices.Clone(load), make(map[uint32]int)
	for i, r := range merged {
		at[r.ID] = i
	}
	for _, r := range sink {
		i, known := at[r.ID]
		if !known || r.Kind == "" {
			merged = append(merged, r) // a stranger
			continue
		}
		m := &merged[i]
		m.From = r.From
		if m.Kind == kindNames[kindUp] {
			m.Bytes, m.Stall = r.Bytes, r.Stall
		}
		if m.Error == "" || strings.HasPrefix(r.Error, "corrupt") {
			m.Error = r.Error
		}
	}
	return merged
}

// A report is about the time since the last mark.
type report struct {
	streams []streamReport
	flows   []flowReport
}

// broken are the streams that failed.
func (r report) broken() (broken []streamReport) {
	for _, s := range r.streams {
		if s.Error != "" {
			broken = append(broken, s)
		}
	}
	return broken
}

// why counts broken streams by what is wrong with them.
func (r report) why() string {
	count := make(map[string]int)
	for _, s := range r.broken() {
		what, _, _ := strings.Cut(s.Error, ",")
		if i := strings.LastIndex(what, ": "); i >= 0 && !strings.HasPrefix(what, "corrupt") {
			what = what[i+2:] // an operating system's error without its addresses
		}
		count[what]++
	}
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%d %s", count[what], what))
	}
	return strings.Join(parts, ", ")
}

// stalls are the sorted stalls of the streams of some kinds, or of all kinds
// that move all the time.
func (r report) stalls(kinds ...byte) (d []time.Duration) {
	if len(kinds) == 0 {
		kinds = []byte{kindUp, kindDown, kindPing}
	}
	for _, s := range r.streams {
		for _, k := range kinds {
			if s.Kind == kindNames[k] {
				d = append(d, s.Stall)
			}
		}
	}
	slices.Sort(d)
	return d
}

// bytes counts those of one kind of streams.
func (r report) bytes(kind byte) (n uint64) {
	for _, s := range r.streams {
		if s.Kind == kindNames[kind] {
			n += s.Bytes
		}
	}
	return n
}

// from is whose connections they are, as the sink sees it.
func (r report) from() []string {
	seen := make(map[string]bool)
	for _, s := range r.streams {
		if s.From != "" {
			seen[s.From] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// quantile returns the q-quantile of what is sorted, 0 of nothing.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// A run is a load and its sink at work on two hosts.
type run struct {
	t          *testing.T
	load, sink *talk
	limit      time.Duration
}

// startRun starts a sink on one host and a load on another. The sink's address
// is the configuration's.
func startRun(t *testing.T, app, dst *host, cfg loadConfig) *run {
	t.Helper()
	r := &run{t: t, limit: time.Minute}
	config, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.sink = dst.talk(t, helper(t, "sink", cfg.Sink.String())...)
	r.hear(r.sink, "ready")
	r.load = app.talk(t, helper(t, "load", string(config))...)
	r.hear(r.load, "ready")
	return r
}

func (r *run) hear(c *talk, want string) {
	r.t.Helper()
	if got := c.hear(r.limit); got != want {
		r.t.Fatalf("the load says %q, want %q", got, want)
	}
}

// mark begins a new measurement.
func (r *run) mark() {
	r.t.Helper()
	for _, c := range []*talk{r.sink, r.load} {
		c.say("mark")
		r.hear(c, "marked")
	}
}

// more opens n more connections, which say at once whether they work.
func (r *run) more(n int) error {
	r.t.Helper()
	r.load.say(fmt.Sprint("more ", n))
	if got := r.load.hear(2 * r.limit); got != "more" {
		return fmt.Errorf("%d new connections: %s", n, strings.TrimPrefix(got, "more "))
	}
	return nil
}

// report is about the time since the last mark.
func (r *run) report() report {
	r.t.Helper()
	return r.both("report", "report")
}

// end ends every stream in good order and checks each to its last byte.
func (r *run) end() report {
	r.t.Helper()
	rep := r.both("end", "report")
	r.sink.say("end")
	r.lines(r.sink)
	return rep
}

func (r *run) both(load, sink string) report {
	r.t.Helper()
	var near, far []streamReport
	var flows []flowReport
	r.load.say(load)
	for _, line := range r.lines(r.load) {
		if strings.HasPrefix(line, `{"Flow"`) {
			flows = append(flows, decode[flowReport](r.t, line))
		} else {
			near = append(near, decode[streamReport](r.t, line))
		}
	}
	r.sink.say(sink)
	for _, line := range r.lines(r.sink) {
		far = append(far, decode[streamReport](r.t, line))
	}
	return report{streams: merge(near, far), flows: flows}
}

// lines are those up to "reported".
func (r *run) lines(c *talk) (lines []string) {
	r.t.Helper()
	for {
		line := c.hear(endLimit + r.limit)
		if line == "reported" {
			return lines
		}
		lines = append(lines, line)
	}
}

func decode[T any](t *testing.T, line string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(line), &v); err != nil {
		t.Fatalf("the load says %q: %v", line, err)
	}
	return v
}

// at is an address of a port.
func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
