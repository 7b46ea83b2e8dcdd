package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

type cause uint8

const (
	causeFlip cause = iota
	causeRoute
	causeSite
	causeReturn
	causeStart
	causeAddress
	causeLate
	causeSession
	causeCut
	causesNumber
)

var causeNames = [causesNumber]string{
	"route flips of unstable clients", "other route changes", "site dies, client behind it", "site dies, peer behind it",
	"site starts without having the snapshot", "client's address or port changes", "location told only after the route had changed",
	"first flow of a session", "registry in parts",
}

// step is the ratio of a histogram's buckets, from a millisecond up.
const step = 1.02

// outcome is what a cause did.
type outcome struct {
	events, untouched uint64 // flows that didn't notice
	stalled, broken   uint64
	hard              uint64 // of the broken, those that Linux would have given up, too
	conventional      uint64 // broken in the other design
	longest           time.Duration
	histogram         [800]uint64
}

type stats struct {
	causes    [causesNumber]outcome
	failures  int
	lost      uint64 // messages with their server
	misrouted uint64 // return packets whose port was computed to be another client's
	unopened  uint64 // flows that couldn't begin
	hours     []hour
}

// hour is a census.
type hour struct {
	online, flows, sites int
	pairs, mostPairs     int // clients whose peers' packets enter at a server: sum and most
	mostClients          int // behind one server
	mostFlows            int // of one client
}

// linuxPatience is how long Linux retransmits at the least (tcp_retries2 = 15).
const linuxPatience = 924 * time.Second

// stall adds a flow that stood still, and says whether that broke it.
func (s *stats) stall(why cause, d, patience time.Duration) (broken bool) {
	o := &s.causes[why]
	o.stalled++
	o.longest = max(o.longest, d)
	i := int(math.Log(max(1, d.Seconds()*1000)) / math.Log(step))
	o.histogram[min(i, len(o.histogram)-1)]++
	if d <= patience {
		return false
	}
	o.broken++
	if d > linuxPatience {
		o.hard++
	}
	return true
}

// stalled is all flows that stood still.
func (s *stats) stalled() (n uint64) {
	for i := range s.causes {
		n += s.causes[i].stalled
	}
	return n
}

// quantile of those that stood still.
func (o *outcome) quantile(q float64) time.Duration {
	if o.stalled == 0 {
		return 0
	}
	rest := uint64(math.Ceil(q * float64(o.stalled)))
	for i, n := range o.histogram {
		if n >= rest {
			return min(o.longest, time.Duration(math.Pow(step, float64(i)+0.5)*float64(time.Millisecond)))
		}
		rest -= n
	}
	return o.longest
}

// census looks at everything once an hour.
func (w *world) census() {
	h := hour{online: w.online, sites: w.up}
	pairs := make([]int, len(w.servers))
	seen := make([]uint32, len(w.servers))
	for i := range w.clients {
		c := &w.clients[i]
		if !c.online {
			continue
		}
		w.advance(c)
		h.flows += len(c.flows)
		h.mostFlows = max(h.mostFlows, len(c.flows))
		seen[c.site] = c.number
		pairs[c.site]++
		for k := range c.flows {
			site, _ := w.entry(c.flows[k].peer, w.now)
			if seen[site] != c.number {
				seen[site] = c.number
				pairs[site]++
			}
		}
	}
	for i, n := range pairs {
		h.pairs += n
		h.mostPairs = max(h.mostPairs, n)
		h.mostClients = max(h.mostClients, w.servers[i].clients)
	}
	w.stats.hours = append(w.stats.hours, h)
}

// opened is the flows of the day: those alive at its begin, and those that began.
func (w *world) opened() float64 {
	n := 0.0
	for _, k := range classes {
		n += k.alive * w.Flows * w.onlineTime * (1/k.life.Seconds() + 1/w.Day.Seconds())
	}
	return n
}

func (w *world) total() (t outcome) {
	for i := range w.stats.causes {
		o := &w.stats.causes[i]
		t.events += o.events
		t.untouched += o.untouched
		t.stalled += o.stalled
		t.broken += o.broken
		t.hard += o.hard
		t.conventional += o.conventional
		t.longest = max(t.longest, o.longest)
		for k, n := range o.histogram {
			t.histogram[k] += n
		}
	}
	return t
}

func (w *world) report(out io.Writer) {
	p := func(format string, a ...any) { fmt.Fprintf(out, format, a...) }
	var flows, online, pairs, mostPairs, mostClients, mostFlows float64
	for _, h := range w.stats.hours {
		flows += float64(h.flows)
		online += float64(h.online)
		pairs += float64(h.pairs) / float64(len(w.servers))
		mostPairs = max(mostPairs, float64(h.mostPairs))
		mostClients = max(mostClients, float64(h.mostClients))
		mostFlows = max(mostFlows, float64(h.mostFlows))
	}
	n := float64(max(len(w.stats.hours), 1))
	p("| the world | |\n|---|---|\n")
	p("| servers, clients enrolled, time | %d, %d, %v |\n", w.Servers, w.Clients, w.Day)
	p("| clients there at a time, behind one server at most | %.0f, %.0f |\n", online/n, mostClients)
	p("| flows alive at a time, of one client at most | %.0f, %.0f |\n", flows/n, mostFlows)
	p("| flows of the day, about | %.0f million |\n", w.opened()/1e6)
	p("| sites that failed | %d |\n", w.stats.failures)
	p("| clients whose packets, or their peers', enter at a server: mean, most | %.0f, %.0f |\n", pairs/n, mostPairs)
	p("| messages lost with a server that died | %d |\n", w.stats.lost)
	p("| return packets given to a wrong client | %d |\n", w.stats.misrouted)
	p("| flows that could not begin while the registry was in parts | %d |\n", w.stats.unopened)

	p("\n| cause | events | flows that noticed nothing | flows that stood still | p50 | p99 | longest | broken | of those over 924 s | conventional: broken |\n")
	p("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	row := func(name string, o *outcome) {
		p("| %s | %d | %d | %d | %s | %s | %s | %d | %d | %d |\n", name, o.events, o.untouched, o.stalled,
			short(o.quantile(0.5)), short(o.quantile(0.99)), short(o.longest), o.broken, o.hard, o.conventional)
	}
	for i := range w.stats.causes {
		row(causeNames[i], &w.stats.causes[i])
	}
	t := w.total()
	row("all", &t)

	p("\n| published | messages | records | bytes | cluster, B/s | a server says, B/s | a server hears, B/s |\n|---|--:|--:|--:|--:|--:|--:|\n")
	var all flowOfBytes
	bus := func(name string, f *flowOfBytes) {
		s := w.Day.Seconds()
		p("| %s | %d | %d | %d | %.0f | %.1f | %.0f |\n", name, f.messages, f.records, f.bytes,
			float64(f.bytes)/s, float64(f.bytes)/s/float64(len(w.servers)), float64(f.received)/s/float64(len(w.servers)))
	}
	for i := range w.bus.sorts {
		f := &w.bus.sorts[i]
		bus(sortNames[i], f)
		all.messages += f.messages
		all.records += f.records
		all.bytes += f.bytes
		all.received += f.received
	}
	bus("all", &all)
	peaks := make([]uint64, 0, len(w.bus.buckets))
	for _, n := range w.bus.buckets {
		peaks = append(peaks, n)
	}
	slices.Sort(peaks)
	if len(peaks) > 0 {
		p("\nLocations in %v: median %d, most %d bytes. Per flow: 0 bytes.\n", bucket, peaks[len(peaks)/2], peaks[len(peaks)-1])
	}
}

func short(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 100*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}
