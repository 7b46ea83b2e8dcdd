package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	anycast4 = "203.0.113.1/32"
	anycast6 = "2001:db8:0:1::/64"
)

func good() Config {
	return Config{
		RouterID: netip.MustParseAddr("192.0.2.1"), AS: 65001,
		Peers:    []Peer{{Addr: netip.MustParseAddr("192.0.2.2"), AS: 65000}},
		Prefixes: []netip.Prefix{netip.MustParsePrefix(anycast4), netip.MustParsePrefix(anycast6)},
	}
}

func TestConfig(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string // part of the error, empty for none
	}{
		{"good", func(*Config) {}, ""},
		{"hook only", func(c *Config) { c.Peers, c.Hook, c.AS = nil, "true", 0 }, ""},
		{"router id from an IPv4 peer", func(c *Config) { c.RouterID = netip.Addr{} }, ""},
		{"nobody", func(c *Config) { c.Peers = nil }, "nobody to announce to"},
		{"no prefixes", func(c *Config) { c.Prefixes = nil }, "no prefixes"},
		{"zero prefix", func(c *Config) { c.Prefixes = []netip.Prefix{{}} }, "not valid"},
		{"unmasked prefix", func(c *Config) { c.Prefixes = []netip.Prefix{prefix("203.0.113.1/24")} }, "203.0.113.0/24 is meant?"},
		{"prefix twice", func(c *Config) { c.Prefixes = append(c.Prefixes, c.Prefixes[0]) }, "twice"},
		{"IPv6 router id", func(c *Config) { c.RouterID = addr("2001:db8::1") }, "not an IPv4 address"},
		{"no router id", func(c *Config) { c.RouterID, c.Peers[0].Addr = netip.Addr{}, addr("2001:db8::1") }, "no router id"},
		{"no AS", func(c *Config) { c.AS = 0 }, "no AS number of our own"},
		{"peer without AS", func(c *Config) { c.Peers[0].AS = 0 }, "192.0.2.2@0: no AS number"},
		{"peer without address", func(c *Config) { c.Peers[0].Addr = netip.Addr{} }, "no address"},
		{"multicast peer", func(c *Config) { c.Peers[0].Addr = addr("224.0.0.1") }, "no address"},
		{"link-local peer", func(c *Config) { c.Peers[0].Addr = addr("fe80::1%eth0") }, "link-local"},
		{"peer twice", func(c *Config) { c.Peers = append(c.Peers, c.Peers[0]) }, "twice"},
		{"local address", func(c *Config) { c.Peers[0].Local = addr("2001:db8::1") }, "other family"},
		{"next hop", func(c *Config) { c.Peers[0].NextHop = addr("192.0.2.3") }, "own family"},
		{"next hop of the other family", func(c *Config) { c.Peers[0].NextHop = addr("2001:db8::1") }, ""},
		{"long password", func(c *Config) { c.Peers[0].Password = strings.Repeat("x", 81) }, "longer than 80"},
		{"bfd over hops", func(c *Config) { c.Peers[0].BFD, c.Peers[0].Multihop = true, 2 }, "direct neighbours"},
		{"internal multihop", func(c *Config) { c.Peers[0].AS, c.Peers[0].Multihop = c.AS, 2 }, "external"},
		{"short hold time", func(c *Config) { c.HoldTime = 2 * time.Second }, "hold time of 2s"},
		{"broken hold time", func(c *Config) { c.HoldTime = 3500 * time.Millisecond }, "hold time of 3.5s"},
		{"short retry", func(c *Config) { c.ConnectRetry = time.Second }, "connect retry of 1s"},
		{"fast bfd", func(c *Config) { c.BFDInterval = time.Millisecond }, "bfd interval of 1ms"},
		{"slow check", func(c *Config) { c.Interval = 2 * time.Hour }, "check interval of 2h"},
		{"negative", func(c *Config) { c.Fall = -1 }, "negative"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := good()
			tt.change(&c)
			_, err := New(c)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("%v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%v, want something with %q", err, tt.want)
			}
		})
	}
}

// A password gets out by none of the ways in which a Config or Peer is printed.
func TestPeerKeepsItsPassword(t *testing.T) {
	const secret = "no-one-may-read-this"
	c := good()
	c.Peers[0].Password = secret
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("peer", "peer", c.Peers[0], "peers", c.Peers)
	slog.New(slog.NewTextHandler(&log, nil)).Info("peer", "peer", c.Peers[0], "config", c, "peers", c.Peers)
	for _, s := range []string{log.String(), fmt.Sprintf("%v %+v %#v %s", c, c, c, c.Peers[0]), fmt.Sprintf("%v %+v %#v", &c, &c, &c)} {
		if strings.Contains(s, secret) {
			t.Errorf("printed: %s", s)
		}
	}
}

// hooked runs an Announcer that has a hook only, which adds lines to a file.
type hooked struct {
	t    *testing.T
	a    *Announcer
	file string
	end  func() // ends Run
}

func newHooked(t *testing.T, c Config) *hooked {
	t.Helper()
	h := &hooked{t: t, file: filepath.Join(t.TempDir(), "actions")}
	c.Prefixes = good().Prefixes
	if c.Hook == "" {
		c.Hook = "cat /dev/null; set_action() { echo \"$ANYTUN_ACTION/$1/$ANYTUN_PREFIXES/$ANYTUN_REASON/$HOME\" >>" + h.file + "; }; set_action"
	}
	var err error
	if h.a, err = New(c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	wait.Go(func() {
		if err := h.a.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	h.end = func() { cancel(); wait.Wait() }
	t.Cleanup(h.end)
	return h
}

// await waits until the hook was run with these actions.
func (h *hooked) await(want ...string) string {
	h.t.Helper()
	var all string
	until(h.t, func() string {
		b, err := os.ReadFile(h.file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err.Error()
		}
		all = string(b)
		var got []string
		for line := range strings.Lines(all) {
			action, _, _ := strings.Cut(line, "/")
			got = append(got, action)
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			return fmt.Sprintf("hook was run with %q, want %q", got, want)
		}
		return ""
	})
	return all
}

func TestHook(t *testing.T) {
	t.Setenv("HOME", "/secret")
	var sick atomic.Bool
	h := newHooked(t, Config{
		Interval: 10 * time.Millisecond, Timeout: time.Minute,
		Check: func(context.Context) error {
			if sick.Load() {
				return errors.New("it hurts")
			}
			return nil
		},
	})
	h.await("announce")
	sick.Store(true)
	h.await("announce", "withdraw")
	sick.Store(false)
	h.await("announce", "withdraw", "announce")
	h.a.Drain()
	h.a.Drain()
	h.await("announce", "withdraw", "announce", "withdraw")
	h.end()
	got := h.await("announce", "withdraw", "announce", "withdraw") // nothing more at the end
	prefixes := anycast4 + " " + anycast6
	want := "announce/announce/" + prefixes + "/healthy/\n" +
		"withdraw/withdraw/" + prefixes + "/it hurts/\n" +
		"announce/announce/" + prefixes + "/healthy/\n" +
		"withdraw/withdraw/" + prefixes + "/draining/\n"
	if got != want {
		t.Errorf("hook saw\n%s\nwant\n%s", got, want)
	}
	if err := h.a.Run(t.Context()); err == nil {
		t.Error("Run a second time")
	}
}

func TestHookAtTheEnd(t *testing.T) {
	h := newHooked(t, Config{})
	h.await("announce")
	h.end()
	h.await("announce", "withdraw")
}

// Drained before it ran, an Announcer never announces.
func TestDrainedBefore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "actions")
	a, err := New(Config{Prefixes: good().Prefixes, Hook: "echo >>" + file})
	if err != nil {
		t.Fatal(err)
	}
	a.Drain()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	until(t, func() string {
		if st := a.Status(); !st.Draining || st.Announcing {
			return fmt.Sprintf("%+v", st)
		}
		return ""
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(file); strings.Contains(string(b), "announce") {
		t.Errorf("hook was run with %q", b)
	}
}

// A check that hangs counts as failed, and the end waits for it.
func TestCheckHangs(t *testing.T) {
	var calls, running atomic.Int32
	hang := make(chan struct{})
	h := newHooked(t, Config{
		Interval: 10 * time.Millisecond, Timeout: 20 * time.Millisecond,
		Check: func(context.Context) error { // deaf to its context
			running.Add(1)
			defer running.Add(-1)
			if calls.Add(1) > 1 {
				<-hang
			}
			return nil
		},
	})
	release := sync.OnceFunc(func() { close(hang) })
	t.Cleanup(release)
	h.await("announce", "withdraw")
	if st := h.a.Status(); st.Healthy || st.Why != errHung.Error() {
		t.Errorf("status: %+v", st)
	}
	if n := running.Load(); n != 1 {
		t.Errorf("%d checks at once", n)
	}
	release()
	h.await("announce", "withdraw", "announce")
	h.end()
	if n := running.Load(); n != 0 {
		t.Errorf("%d checks outlive Run", n)
	}
}

// The end waits for a check that is slow to notice it.
func TestEndWaitsForCheck(t *testing.T) {
	var running atomic.Bool
	h := newHooked(t, Config{
		Timeout: time.Hour,
		Check: func(ctx context.Context) error {
			running.Store(true)
			defer running.Store(false)
			<-ctx.Done()
			time.Sleep(100 * time.Millisecond)
			return ctx.Err()
		},
	})
	until(t, func() string {
		if !running.Load() {
			return "no check"
		}
		return ""
	})
	h.end()
	if running.Load() {
		t.Error("a check outlives Run")
	}
}

func TestHookFails(t *testing.T) {
	h := newHooked(t, Config{Hook: "echo first; head -c 100000 /dev/zero; exit 7; :"})
	until(t, func() string {
		got := h.a.Status().Hook
		if !strings.HasPrefix(got, "exit status 7: first") || len(got) > 600 {
			return fmt.Sprintf("status says %d bytes: %.40q", len(got), got)
		}
		return ""
	})
}

func TestHookHangs(t *testing.T) {
	h := newHooked(t, Config{Hook: "sleep 1000 & sleep 1000; :", HookTimeout: 50 * time.Millisecond})
	until(t, func() string {
		if got := h.a.Status().Hook; got != "killed after 50ms" {
			return got
		}
		return ""
	})
}

func TestEngineLog(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(newEngineLog(slog.NewTextHandler(&out, nil)))
	log.Info("Peer Up", "Topic", "Peer", "Key", "192.0.2.1")
	log.Info("Add a peer configuration")
	for range 3 {
		log.Warn("Can't", "Key", "192.0.2.1")
		log.With("Topic", "Peer", "Key", "x").Warn("Can't", "Key", "192.0.2.2")
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		_, line, _ := strings.Cut(line, " ")
		got = append(got, strings.TrimSpace(line))
	}
	want := []string{
		`level=INFO msg="bgp: peer up" key=192.0.2.1`,
		`level=WARN msg="bgp: can't" key=192.0.2.1`,
		`level=WARN msg="bgp: can't" key=x key=192.0.2.2`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("log:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
