package session

import (
	"slices"
	"testing"
	"time"
)

const ms = time.Millisecond

// trip drives a Schedule as the client's engine does: it is asked at its
// deadlines, when the first packet comes or goes after a quiet time, and when
// something comes while it suspects; not for every packet.
type trip struct {
	t      *testing.T
	s      Schedule
	now    time.Time
	rtt    time.Duration
	down   func(at time.Duration) bool // whether what a client sends at that time is lost
	script []event                     // in order
	coming []time.Time                 // answers to keep-alives, when they arrive
	moved  bool                        // answers come another way
	Traffic

	probes, others []time.Duration // when probes and other keep-alives went out
	suspect        []time.Duration // when the suspicion began
	gaps           []Silence
	declared       []time.Duration
}

// event is an inner packet.
type event struct {
	at time.Duration
	in bool
}

func newTrip(t *testing.T, rtt time.Duration) *trip {
	tr := &trip{
		t: t, s: Schedule{Jitter: func() float64 { return 0.5 }}, now: start, rtt: rtt,
		down: func(time.Duration) bool { return false },
	}
	tr.s.Established(start, testKeepAlive, 48*time.Hour)
	tr.Sent, tr.Received, tr.RTT = start, start, rtt
	return tr
}

func (tr *trip) at() time.Duration { return tr.now.Sub(start) }

// during makes a path that is down from one time to another.
func during(from, to time.Duration) func(time.Duration) bool {
	return func(at time.Duration) bool { return at >= from && at < to }
}

// every adds packets to the script, n of them from first, step apart.
func (tr *trip) every(first, step time.Duration, n int, in bool) {
	for i := range n {
		tr.script = append(tr.script, event{first + time.Duration(i)*step, in})
	}
	slices.SortStableFunc(tr.script, func(a, b event) int { return int(a.at - b.at) })
}

func (tr *trip) run(until time.Duration) {
	tr.t.Helper()
	var again time.Time
	var quiet, suspect, gap bool
	ask := true
	for steps := 0; ; steps++ {
		if steps > 1_000_000 {
			tr.t.Fatal("the schedule spins")
		}
		if ask {
			a := tr.s.Next(tr.now, tr.Traffic)
			if a.KeepAlive {
				if a.Probe {
					tr.probes = append(tr.probes, tr.at())
				} else {
					tr.others = append(tr.others, tr.at())
				}
				tr.Sent = tr.now
				if !tr.down(tr.at()) {
					tr.coming = append(tr.coming, tr.now.Add(tr.rtt))
				}
			}
			if a.Suspect && !suspect {
				tr.suspect = append(tr.suspect, tr.at())
			}
			if a.Gap && !gap {
				tr.declared = append(tr.declared, tr.at())
			}
			if a.Ended != (Silence{}) {
				tr.gaps = append(tr.gaps, a.Ended)
			}
			again, quiet, suspect, gap = a.Again, a.Quiet, a.Suspect, a.Gap
			if !again.After(tr.now) {
				tr.t.Fatalf("at %v: asked to come back at once", tr.at())
			}
		}
		next := again
		if len(tr.coming) > 0 {
			next = earlier(next, tr.coming[0])
		}
		if len(tr.script) > 0 {
			next = earlier(next, start.Add(tr.script[0].at))
		}
		if next.Sub(start) > until {
			tr.now = start.Add(until)
			return
		}
		tr.now = next
		ask = !tr.now.Before(again)
		for len(tr.coming) > 0 && !tr.coming[0].After(tr.now) {
			tr.coming = tr.coming[1:]
			tr.heard()
			tr.Moved = tr.moved
			ask = ask || suspect
		}
		for len(tr.script) > 0 && !start.Add(tr.script[0].at).After(tr.now) {
			e := tr.script[0]
			tr.script = tr.script[1:]
			switch {
			case e.in && !tr.down(e.at):
				tr.heard()
				tr.Packet = tr.now
				tr.Packets++
				ask = ask || suspect || quiet
			case !e.in:
				tr.Sent = tr.now
				if tr.Waiting.IsZero() {
					tr.Waiting = tr.now
				}
				ask = ask || quiet
			}
		}
	}
}

func (tr *trip) heard() { tr.Received, tr.Waiting = tr.now, time.Time{} }

// What makes a client ask, and how soon.
func TestFirstProbe(t *testing.T) {
	for _, c := range []struct {
		name string
		rtt  time.Duration
		in   int // packets that come, the last one after 10 s
		out  bool
		want time.Duration
	}{
		{"a packet came", 20 * ms, 1, false, ProbeAfter},
		{"a packet came over a long path", 400 * ms, 1, false, 800 * ms},
		{"many came", 20 * ms, 10, false, MinProbe},
		{"many came over a longer path", 90 * ms, 10, false, 180 * ms},
		{"many came over an endless path", 3 * time.Second, 10, false, MaxProbe},
		{"many came and the round trip isn't known", 0, 10, false, ProbeAfter},
		{"one was sent", 20 * ms, 0, true, MinProbe},
		{"one came and one was sent", 20 * ms, 1, true, MinProbe},
		{"nothing happened", 20 * ms, 0, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := newTrip(t, c.rtt)
			if c.in > 0 {
				tr.every(10*time.Second-time.Duration(c.in-1)*ms, ms, c.in, true)
			}
			if c.out {
				tr.every(10*time.Second, 0, 1, false)
			}
			tr.run(19 * time.Second)
			var want []time.Duration
			if c.want > 0 {
				want = []time.Duration{10*time.Second + c.want}
			}
			// Where packets came there are follow-ups, each twice as late.
			pause := followFirst
			for c.in > 0 && want[len(want)-1]+c.rtt+pause <= 19*time.Second {
				want = append(want, want[len(want)-1]+c.rtt+pause)
				pause *= 2
			}
			if !slices.Equal(tr.probes, want) {
				t.Errorf("probes at %v, want %v", tr.probes, want)
			}
			if len(tr.gaps) > 0 || len(tr.declared) > 0 {
				t.Errorf("an answered probe made a gap: %v, %v", tr.declared, tr.gaps)
			}
		})
	}
}

// Unanswered probes: 20 quick ones, then slower, then with handshakes.
func TestUnansweredProbes(t *testing.T) {
	tr := newTrip(t, 30*ms)
	tr.every(time.Second, ms, 100, true)
	tr.down = during(1050*ms, time.Hour)
	tr.run(100 * time.Second)
	last := 1049 * ms
	want := []time.Duration{}
	at := last
	for range 21 {
		at += MinProbe
		want = append(want, at)
	}
	for _, d := range []time.Duration{200, 400, 800, 1000, 1000, 1000} {
		at += d * ms
		want = append(want, at)
	}
	if n := len(want); len(tr.probes) < n || !slices.Equal(tr.probes[:n], want) {
		t.Fatalf("probes at %v, want %v and so on", tr.probes, want)
	}
	// One a second for two intervals, then a keep-alive every quarter of one.
	if n, m := len(tr.probes), len(tr.others); n < 21+35 || n > 21+42 || m < 10 || m > 14 {
		t.Errorf("%d probes and %d keep-alives in 100 s: %v, %v", n, m, tr.probes, tr.others)
	}
	if len(tr.suspect) != 1 || tr.suspect[0] != last+MinProbe || len(tr.declared) != 1 || tr.declared[0] != last+2*MinProbe {
		t.Errorf("suspected at %v, declared at %v", tr.suspect, tr.declared)
	}
	if len(tr.gaps) != 0 {
		t.Errorf("it has ended: %v", tr.gaps)
	}
}

func TestGap(t *testing.T) {
	silence := func(from, to time.Duration) []Silence {
		return []Silence{{From: start.Add(from), To: start.Add(to)}}
	}
	t.Run("download", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 1000, true)
		tr.down = during(3*time.Second, 3437*ms)
		tr.run(10 * time.Second)
		if want := silence(2995*ms, 3440*ms); !slices.Equal(tr.gaps, want) {
			t.Errorf("gaps %v, want %v", tr.gaps, want)
		}
	})
	t.Run("download whose peers have given way", func(t *testing.T) {
		// Nothing but the answer to a probe ends it: sent 5 pauses after the last
		// packet, heard a round trip later.
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 400, true)
		tr.down = during(3*time.Second, 3437*ms)
		tr.run(4 * time.Second) // the first follow-up is later
		if want := silence(2995*ms, 3515*ms); !slices.Equal(tr.gaps, want) {
			t.Errorf("gaps %v, want %v", tr.gaps, want)
		}
		if len(tr.probes) != 5 {
			t.Errorf("probes at %v", tr.probes)
		}
	})
	t.Run("after an idle time", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(10*time.Second, 0, 1, false)
		tr.down = during(9*time.Second, 11*time.Second)
		tr.run(15 * time.Second)
		if want := silence(10*time.Second, 11020*ms); !slices.Equal(tr.gaps, want) {
			t.Errorf("gaps %v, want %v", tr.gaps, want)
		}
	})
	t.Run("a pause", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 400, true)
		tr.every(5*time.Second, 5*ms, 400, true)
		tr.run(8 * time.Second)
		if len(tr.gaps)+len(tr.declared) != 0 || len(tr.suspect) != 3 {
			t.Errorf("suspected %v, declared %v, gaps %v", tr.suspect, tr.declared, tr.gaps)
		}
	})
	t.Run("one probe lost", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, time.Second, 1, true)
		tr.down = during(1400*ms, 1600*ms)
		tr.run(2500 * ms)
		if len(tr.gaps)+len(tr.declared) != 0 || len(tr.probes) != 2 {
			t.Errorf("probes %v, declared %v, gaps %v", tr.probes, tr.declared, tr.gaps)
		}
	})
	t.Run("the first probe shows another way", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 400, true)
		tr.down = during(3*time.Second, 3050*ms)
		tr.moved = true
		tr.run(10 * time.Second)
		if want := silence(2995*ms, 3115*ms); !slices.Equal(tr.gaps, want) {
			t.Errorf("gaps %v, want %v", tr.gaps, want)
		}
	})
	t.Run("another way after few packets", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, time.Second, 1, true)
		tr.moved = true
		tr.run(10 * time.Second)
		if len(tr.gaps) != 0 {
			t.Errorf("gaps %v", tr.gaps)
		}
	})
	t.Run("forgotten in the middle of a pause", func(t *testing.T) {
		// A follow-up notices, long before the next keep-alive.
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 400, true)
		tr.down = during(4*time.Second, 4400*ms)
		tr.run(10 * time.Second)
		if len(tr.gaps) != 1 || tr.gaps[0].To.After(start.Add(4600*ms)) {
			t.Errorf("gaps %v, probes %v", tr.gaps, tr.probes)
		}
	})
	t.Run("a new session ends it", func(t *testing.T) {
		tr := newTrip(t, 20*ms)
		tr.every(time.Second, 5*ms, 400, true)
		tr.down = during(3*time.Second, time.Hour)
		tr.run(50 * time.Second)
		tr.s.Established(tr.now, testKeepAlive, time.Hour)
		a := tr.s.Next(tr.now, tr.Traffic)
		if a.Gap || a.Suspect || (a.Ended != Silence{From: start.Add(2995 * ms), To: tr.now}) {
			t.Errorf("%+v", a)
		}
	})
}

// What asking costs: probes in a minute of each pattern. A silence that a
// probe has shown to be harmless makes the next ones slower, so none of them
// is much above one a second or a tenth of the packets.
func TestProbeCost(t *testing.T) {
	const minute = time.Minute
	for _, c := range []struct {
		name     string
		min, max int
		traffic  func(tr *trip)
	}{
		{"idle", 0, 0, func(*trip) {}},
		{"download", 0, 0, func(tr *trip) {
			tr.every(0, ms, 60_000, true)
			tr.every(0, 2*ms, 30_000, false)
		}},
		{"download of 20 kB/s", 0, 0, func(tr *trip) { tr.every(0, 70*ms, 857, true) }},
		{"upload", 0, 0, func(tr *trip) {
			tr.every(0, ms, 60_000, false)
			tr.every(20*ms, 2*ms, 29_990, true)
		}},
		{"bursts every 4 s", 30, 30, func(tr *trip) {
			for at := time.Duration(0); at < minute; at += 4 * time.Second {
				tr.every(at, ms, 1000, true)
			}
		}},
		{"ping-pong, 1 a second", 40, 60, func(tr *trip) { pingPong(tr, time.Second) }},
		{"ping-pong, 5 a second", 40, 80, func(tr *trip) { pingPong(tr, 200*ms) }},
		{"ping-pong, as fast as it can", 0, 0, func(tr *trip) { pingPong(tr, 25*ms) }},
		{"sent only, 50 a second", 40, 60, func(tr *trip) { tr.every(0, 20*ms, 3000, false) }},
		{"sent only, every 10 s", 6, 6, func(tr *trip) { tr.every(0, 10*time.Second, 6, false) }},
		{"received only, 4 a second", 0, 24, func(tr *trip) { tr.every(0, 250*ms, 240, true) }},
		{"received only, 1 a second", 59, 60, func(tr *trip) { tr.every(0, time.Second, 60, true) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := newTrip(t, 20*ms)
			c.traffic(tr)
			tr.run(minute - ms)
			n := len(tr.probes)
			t.Logf("%d probes, %d other keep-alives", n, len(tr.others))
			if n < c.min || n > c.max {
				t.Errorf("%d probes, want %d to %d: %v", n, c.min, c.max, tr.probes)
			}
			if len(tr.others) > 3 {
				t.Errorf("%d keep-alives of an interval of %v: %v", len(tr.others), testKeepAlive, tr.others)
			}
			if len(tr.gaps)+len(tr.declared) != 0 {
				t.Errorf("gaps %v, %v", tr.declared, tr.gaps)
			}
		})
	}
}

// pingPong is a question, its answer after a round trip, and the answer's
// acknowledgement.
func pingPong(tr *trip, step time.Duration) {
	n := int(time.Minute / step)
	tr.every(0, step, n, false)
	tr.every(20*ms, step, n, true)
	tr.every(21*ms, step, n, false)
}
