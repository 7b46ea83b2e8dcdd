package session

import (
	"testing"
	"time"
)

// world drives a Schedule with a clock and a server that answers or not.
type world struct {
	t   *testing.T
	s   Schedule
	now time.Time
	Traffic
	up         bool // keep-alives and handshakes are answered
	busy       bool // data goes out all the time
	handshakes []time.Duration
	keepAlives []time.Duration
	next       int
	dead       []time.Duration
}

const testKeepAlive = 20 * time.Second

func newWorld(t *testing.T) *world {
	return &world{t: t, s: Schedule{Jitter: func() float64 { return 0.5 }}, now: start, up: true}
}

func (w *world) at() time.Duration { return w.now.Sub(start) }

// run lets d pass, jumping from deadline to deadline as an engine would.
func (w *world) run(d time.Duration) {
	w.t.Helper()
	end := w.now.Add(d)
	for steps := 0; ; steps++ {
		if steps > 1_000_000 {
			w.t.Fatal("the schedule spins")
		}
		if w.busy {
			w.Sent = w.now
		}
		a := w.s.Next(w.now, w.Traffic)
		if a.Dead {
			w.dead = append(w.dead, w.at())
		}
		if a.KeepAlive {
			w.keepAlives = append(w.keepAlives, w.at())
			w.Sent = w.now
			if w.up {
				w.Received = w.now
			}
		}
		if a.NextServer {
			w.next++
		}
		if a.Handshake {
			w.handshakes = append(w.handshakes, w.at())
			if w.up {
				w.s.Established(w.now, testKeepAlive, 48*time.Hour)
				continue
			}
		}
		if !a.Again.After(w.now) && !a.KeepAlive {
			w.t.Fatalf("at %v: asked to come back at once", w.at())
		}
		if a.Again.After(end) {
			w.now = end
			return
		}
		if a.Again.After(w.now) {
			w.now = a.Again
		}
	}
}

func TestScheduleIdle(t *testing.T) {
	w := newWorld(t)
	w.run(10 * time.Minute)
	if len(w.handshakes) != 1 || w.handshakes[0] != 0 {
		t.Errorf("handshakes at %v, want one at once", w.handshakes)
	}
	if n := len(w.keepAlives); n < 29 || n > 31 {
		t.Errorf("%d keep-alives in 10 minutes of an idle session: %v", n, w.keepAlives)
	}
	for i := 1; i < len(w.keepAlives); i++ {
		if gap := w.keepAlives[i] - w.keepAlives[i-1]; gap > testKeepAlive+time.Second {
			t.Errorf("gap of %v: a NAT could close", gap)
		}
	}
	if len(w.dead) > 0 {
		t.Errorf("dead at %v", w.dead)
	}
}

// Data that flows out without anything coming back is asked about, and a path
// that dies is noticed within two intervals, then tried again with back-off.
func TestScheduleDeadPath(t *testing.T) {
	for _, busy := range []bool{false, true} {
		w := newWorld(t)
		w.run(time.Minute)
		w.up, w.busy = false, busy
		died := w.Received.Sub(start)
		w.handshakes, w.keepAlives = nil, nil
		w.run(5 * time.Minute)
		if len(w.dead) == 0 || w.dead[0]-died > 2*testKeepAlive {
			t.Fatalf("busy %v: dead noticed at %v, died at %v", busy, w.dead, died)
		}
		if n := len(w.keepAlives); n < 3 {
			t.Errorf("busy %v: %d keep-alives before giving up", busy, n)
		}
		h := w.handshakes
		if len(h) < 15 || len(h) > 40 {
			t.Fatalf("busy %v: %d handshakes in 5 minutes: %v", busy, len(h), h)
		}
		if d := h[1] - h[0]; d > time.Second {
			t.Errorf("busy %v: second attempt after %v", busy, d)
		}
		for i := 1; i < len(h); i++ {
			if d := h[i] - h[i-1]; d > retryMax*12/10 {
				t.Errorf("busy %v: %v between attempts", busy, d)
			}
		}
		if w.next < 10 {
			t.Errorf("busy %v: only %d tries of another address", busy, w.next)
		}
		w.up = true
		w.dead = nil
		before := w.at()
		w.run(time.Minute)
		if last := w.handshakes[len(w.handshakes)-1]; last-before > retryMax*12/10 {
			t.Errorf("busy %v: back after %v", busy, last-before)
		}
	}
}

// A path that works again by itself needs no new session.
func TestSchedulePathReturns(t *testing.T) {
	w := newWorld(t)
	w.run(time.Minute)
	w.up = false
	w.run(90 * time.Second)
	w.Received = w.now // something arrives
	n := len(w.handshakes)
	w.dead = nil
	w.up = true
	w.run(time.Minute)
	if len(w.handshakes) != n || len(w.dead) != 0 {
		t.Errorf("%d more handshakes, dead at %v", len(w.handshakes)-n, w.dead)
	}
}

func TestScheduleRekey(t *testing.T) {
	w := newWorld(t)
	w.run(3*time.Hour + time.Minute)
	if n := len(w.handshakes); n != 4 {
		t.Fatalf("%d handshakes in three hours: %v", n, w.handshakes)
	}
	if d := w.handshakes[1]; d > RekeyAfter || d < RekeyAfter*9/10 {
		t.Errorf("rekey after %v", d)
	}
	// Servers that don't answer: the session goes on until its end, then it is
	// forgotten, and handshakes are still tried.
	w.s.Established(w.now, testKeepAlive, time.Hour)
	made := w.now
	w.up = false
	expired := false
	for w.now.Sub(made) < 2*time.Hour {
		w.Received, w.Sent = w.now, w.now
		if a := w.s.Next(w.now, w.Traffic); a.Expired {
			expired = true
			if d := w.now.Sub(made); d < time.Hour {
				t.Errorf("expired after %v", d)
			}
		}
		w.now = w.now.Add(10 * time.Second)
	}
	if !expired {
		t.Error("never expired")
	}
}

func TestScheduleHurry(t *testing.T) {
	w := newWorld(t)
	w.run(time.Minute)
	w.Sent, w.Received = w.now, w.now
	a := w.s.Next(w.now, w.Traffic)
	if a.KeepAlive {
		t.Fatal("a keep-alive too early")
	}
	w.s.Hurry()
	if a := w.s.Next(w.now, w.Traffic); !a.KeepAlive || a.Handshake {
		t.Errorf("hurry: %+v", a)
	}
	if a := w.s.Next(w.now, w.Traffic); a.KeepAlive {
		t.Error("hurry lasts")
	}
	w.s.Rekey(w.now)
	if a := w.s.Next(w.now, w.Traffic); !a.Handshake {
		t.Error("no rekey when asked for")
	}
	w.s.Abandon()
	w.now = w.now.Add(time.Minute)
	if a := w.s.Next(w.now, w.Traffic); !a.Handshake || a.KeepAlive {
		t.Errorf("abandoned: %+v", a)
	}
}
