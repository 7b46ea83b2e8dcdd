package server

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

type testEnd struct{ ended int }

func (e *testEnd) endFlow() { e.ended++ }

// TestEgressFlowsTwin drives the account with random events beside a list that
// is searched from end to end, and compares.
func TestEgressFlowsTwin(t *testing.T) {
	type twin struct {
		f      *egressFlow
		end    *testEnd
		client uint32
		last   time.Time
		pace   egressPace
	}
	const perClient, all = 5, 12
	c := socketsConfig{
		MaxFlowsPerClient: perClient, MaxFlows: all, MaxDialsPerClient: 2, MaxDials: 3,
		QuickTimeout: 30 * time.Second, UDPTimeout: 180 * time.Second, TCPTimeout: time.Hour,
	}
	idle := [egressPaces]time.Duration{c.QuickTimeout, c.UDPTimeout, c.TCPTimeout}
	rng := rand.New(rand.NewPCG(1, 2))
	table := newEgressFlows(&c)
	var live []*twin
	drop := func(w *twin) {
		for i, v := range live {
			if v == w {
				live = append(live[:i], live[i+1:]...)
				return
			}
		}
		t.Fatal("dropped twice")
	}
	now := time.Unix(1e9, 0)
	var evicted, refusedClient, refusedAll, expired int
	for step := range 20000 {
		now = now.Add(time.Duration(rng.IntN(8000)) * time.Millisecond)
		client := uint32(rng.IntN(4))
		key := egressKey{egressKind(rng.IntN(int(egressKinds))), netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64, 0, byte(client)}), uint16(rng.IntN(8)))}
		pace := egressHeld
		if key.kind == egressKindPing {
			pace = egressQuick
		} else if key.kind == egressKindUDP {
			pace = egressPace(rng.IntN(2))
		}
		var have *twin
		count := 0
		for _, w := range live {
			if key.kind != egressKindTCP && w.f.key == key {
				have = w
			}
			if w.client == client {
				count++
			}
		}
		switch op := rng.IntN(10); {
		case op < 7:
			got := (*egressFlow)(nil)
			if key.kind != egressKindTCP {
				got = table.lookup(key, pace, now)
			}
			if (got != nil) != (have != nil) || got != nil && got != have.f {
				t.Fatalf("step %d: lookup %v, twin %v", step, got, have)
			}
			if have != nil {
				have.last, have.pace = now, max(have.pace, pace)
				continue
			}
			var old *twin // what may be given up: quick ones first, then by age
			for _, w := range live {
				if w.client == client && w.pace != egressHeld && now.Sub(w.last) >= c.QuickTimeout &&
					(old == nil || w.pace < old.pace || w.pace == old.pace && w.last.Before(old.last)) {
					old = w
				}
			}
			want := egressAdmitted
			if count >= perClient || len(live) >= all {
				switch {
				case old != nil:
				case count >= perClient:
					want = egressClientFull
					refusedClient++
				default:
					want = egressAllFull
					refusedAll++
				}
			} else {
				old = nil
			}
			f, victim, deny := table.admit(client, key, pace, now)
			if deny != want || (f == nil) != (want != egressAdmitted) {
				t.Fatalf("step %d: admit says %d, twin %d", step, deny, want)
			}
			if (victim != nil) != (old != nil && want == egressAdmitted) || victim != nil && victim != egressEnd(old.end) {
				t.Fatalf("step %d: gave up %v, twin %v", step, victim, old)
			}
			if victim != nil {
				evicted++
				drop(old)
			}
			if f != nil {
				w := &twin{f, new(testEnd), client, now, pace}
				if table.insert(f, w.end) != f {
					t.Fatalf("step %d: not inserted", step)
				}
				live = append(live, w)
			}
		case op < 9:
			if len(live) > 0 {
				w := live[rng.IntN(len(live))]
				table.drop(w.f)
				table.drop(w.f) // twice is once
				drop(w)
			}
		default:
			ended := 0
			for kind, ends := range table.expire(now) {
				for _, e := range ends {
					e.endFlow()
					ended++
				}
				_ = kind
			}
			for i := len(live) - 1; i >= 0; i-- {
				w := live[i]
				over := now.Sub(w.last) >= idle[w.pace]
				if over != (w.end.ended == 1) {
					t.Fatalf("step %d: idle for %v of %v, ended %d times", step, now.Sub(w.last), idle[w.pace], w.end.ended)
				}
				if over {
					expired++
					drop(w)
				}
			}
		}
		kinds, _, clients := table.gauges()
		seen := map[uint32]bool{}
		for _, w := range live {
			seen[w.client] = true
		}
		if kinds[0]+kinds[1]+kinds[2] != len(live) || clients != len(seen) || len(live) > all {
			t.Fatalf("step %d: %v flows of %d clients, twin %d of %d", step, kinds, clients, len(live), len(seen))
		}
	}
	if evicted == 0 || refusedClient == 0 || refusedAll == 0 || expired == 0 {
		t.Errorf("the events have not shown everything: %d evicted, %d and %d refused, %d expired", evicted, refusedClient, refusedAll, expired)
	}
	if n := len(table.close()); n != len(live) {
		t.Errorf("close ends %d flows of %d", n, len(live))
	}
	if _, _, deny := table.admit(1, egressKey{}, egressSlow, now); deny != egressClosed {
		t.Error("a closed table admits")
	}
}

// TestEgressFlowsRaces is two goroutines that open the same mapping, and a
// table that closes meanwhile.
func TestEgressFlowsRaces(t *testing.T) {
	c := socketsConfig{MaxFlowsPerClient: 5, MaxFlows: 9, QuickTimeout: time.Second}
	table := newEgressFlows(&c)
	key := egressKey{egressKindUDP, netip.AddrPortFrom(egressClient4, 1)}
	now := time.Unix(1e9, 0)
	f1, _, _ := table.admit(7, key, egressSlow, now)
	f2, _, _ := table.admit(7, key, egressSlow, now)
	f3, _, _ := table.admit(7, egressKey{}, egressSlow, now)
	if got := table.insert(f1, new(testEnd)); got != f1 {
		t.Error("the first is not the one")
	}
	if got := table.insert(f2, new(testEnd)); got != f1 {
		t.Error("the second does not find the first")
	}
	if n := len(table.take(7)); n != 1 {
		t.Errorf("%d flows to end, want the one that has been opened", n)
	}
	if got := table.insert(f3, new(testEnd)); got != nil {
		t.Error("a flow that was taken while it was opened is in")
	}
	if kinds, _, clients := table.gauges(); kinds != [egressKinds]int{} || clients != 0 {
		t.Errorf("left: %v of %d clients", kinds, clients)
	}
}

// TestEgressDialAccount keeps a client that has only a dial left.
func TestEgressDialAccount(t *testing.T) {
	c := socketsConfig{MaxFlowsPerClient: 5, MaxFlows: 9, MaxDialsPerClient: 1, MaxDials: 2, QuickTimeout: time.Second}
	table := newEgressFlows(&c)
	var f [4]*egressFlow
	for i := range f {
		f[i], _, _ = table.admit(uint32(i/2), egressKey{}, egressHeld, time.Unix(1e9, 0))
	}
	for i, want := range []egressDeny{egressAdmitted, egressDialsFull, egressAdmitted, egressDialsFull} {
		if got := table.startDial(f[i]); got != want {
			t.Errorf("dial %d: %d, want %d", i, got, want)
		}
	}
	for _, f := range f {
		table.drop(f)
	}
	if _, dials, clients := table.gauges(); dials != 2 || clients != 2 {
		t.Errorf("%d dials of %d clients", dials, clients)
	}
	table.endDial(f[0])
	table.endDial(f[2])
	if _, dials, clients := table.gauges(); dials != 0 || clients != 0 {
		t.Errorf("%d dials of %d clients are left", dials, clients)
	}
}
