package main

import (
	"math"
	"time"

	"github.com/anytun-go/anytun/anytun/portblock"
)

// class is a sort of flows. Those of a client come and go like customers of a
// queue with endless servers, which allows to look at a client only when
// something happens to it: alive ones are a Poisson number whose ages and rests
// are exponential. Short and long classes together make the heavy tail.
type class struct {
	name     string
	alive    float64       // of a client that is there, on average
	life     time.Duration // mean
	activity time.Duration // mean time between its packets when nothing is wrong; 0: always busy
}

var classes = [...]class{
	{"web", 0.6, 8 * time.Second, 0},
	{"download", 0.15, 5 * time.Minute, 0},
	{"call", 0.25, 40 * time.Minute, 0},
	{"push", 6, 6 * time.Hour, time.Minute},
}

// flow is a TCP connection, or what is like one.
type flow struct {
	born, end time.Duration
	peer      uint32
	port      uint16
	site      uint16 // of the conventional design: where it was opened
	class     uint8
}

// advance makes a client's flows true for now.
func (w *world) advance(c *client) {
	passed := w.now - c.advanced
	if !c.online || passed <= 0 {
		return
	}
	c.advanced = w.now
	kept := c.flows[:0]
	for _, f := range c.flows {
		if f.end > w.now {
			kept = append(kept, f)
		}
	}
	c.flows = kept
	for i := range classes {
		k := &classes[i]
		fade := 1 - math.Exp(-float64(passed)/float64(k.life))
		for range w.poisson(k.alive * w.Flows * fade) {
			age := -math.Log(1-w.flowing.Float64()*fade) * float64(k.life)
			w.open(c, uint8(i), w.now-time.Duration(age))
		}
	}
}

// open adds a flow that is alive now.
func (w *world) open(c *client, k uint8, born time.Duration) *flow {
	site := c.site
	if c.cut > w.now {
		site = w.best(c)
	}
	place, _ := w.plan.Of(c.number)
	c.flows = append(c.flows, flow{
		born: born, end: w.now + time.Duration(w.flowing.ExpFloat64()*float64(classes[k].life)), class: k, site: site,
		// A few peers have most of the flows.
		peer: uint32(float64(len(w.peers)) * math.Pow(w.flowing.Float64(), 4)),
		port: place.First + uint16(w.flowing.IntN(int(place.Last-place.First)+1)),
	})
	return &c.flows[len(c.flows)-1]
}

func (w *world) poisson(mean float64) (n int) {
	for p, limit := w.flowing.Float64(), math.Exp(-mean); p > limit; n++ {
		p *= w.flowing.Float64()
	}
	return n
}

// wait is the time until a flow's next packet.
func (w *world) wait(f *flow) time.Duration {
	return time.Duration(w.flowing.ExpFloat64() * float64(classes[f.class].activity))
}

// entry is the site at which a peer's packets get into the cluster, and from when
// on: later than t if at first they go to one that has died.
func (w *world) entry(n uint32, t time.Duration) (site uint16, from time.Duration) {
	p := &w.peers[n]
	order := p.sites
	if p.flipEvery > 0 && hash(uint64(n), uint64(t/p.flipEvery), 6) < 0.5 {
		order[0], order[1] = order[1], order[0]
	}
	for _, site = range order {
		s := &w.servers[site]
		settled := w.converge(hash(uint64(n), uint64(site), s.changes, 7), hash(uint64(n), uint64(site), s.changes, 8))
		switch {
		case !s.up:
			t = max(t, s.downAt+settled)
		case t >= s.upAt+settled:
			return site, t
		}
	}
	return site, t
}

// inward is when a peer's packets, sent from t on, reach the client's endpoint,
// and whether the peer's own path is why they don't before.
func (w *world) inward(c *client, f *flow, t time.Duration) (at time.Duration, path bool) {
	site, from := w.entry(f.peer, t)
	return w.knows(site, w.owner(c, f), from), from > t
}

// owner is whom the return packets of a flow belong to, as the server computes.
func (w *world) owner(c *client, f *flow) *client {
	place, _ := w.plan.Of(c.number)
	number, ok := w.plan.Inward(place.IPv4, f.port, &noLeases)
	if !ok || number == 0 || number > uint32(len(w.clients)) {
		w.stats.misrouted++
		return c
	}
	if number != c.number {
		w.stats.misrouted++
	}
	return w.client(number)
}

var noLeases portblock.Leases

// retransmitted is how long after the start of an outage its sender's TCP tries
// again for the first time after its end.
func retransmitted(outage, roundTrip time.Duration) time.Duration {
	if outage <= 0 {
		return 0
	}
	timeout := 200*time.Millisecond + roundTrip
	at := timeout
	for at < outage {
		timeout = min(2*timeout, 120*time.Second)
		at += timeout
	}
	return at
}

// probe is how long a client needs to notice that its path works again: it asks
// every two round trips, after twenty times more seldom (PROTOCOL.md 7).
func (w *world) probe(c *client, outage time.Duration) time.Duration {
	trip := 2 * latency(c.place, w.servers[c.site].place)
	every := min(max(2*trip, 100*time.Millisecond), time.Second)
	if outage > 20*every {
		every = time.Second
	}
	return w.spread(every) + trip
}

// interrupted is what a client's flows go through when its own packets get
// nowhere, or nobody knows how to reach it, from now until out; what the
// servers know by then counts as well. Only flows that pick says are looked at;
// nil for all.
func (w *world) interrupted(c *client, why cause, out time.Duration, pick func(f *flow) bool) {
	kept := c.flows[:0]
	for _, f := range c.flows {
		if pick != nil && !pick(&f) {
			kept = append(kept, f)
			continue
		}
		before := w.stats.stalled()
		if !w.stands(c, &f, why, out) {
			kept = append(kept, f)
		}
		if w.stats.stalled() == before {
			w.stats.causes[why].untouched++
		}
	}
	c.flows = kept
}

// stands adds how long a flow stands still, and says whether it breaks.
func (w *world) stands(c *client, f *flow, why cause, out time.Duration) (broken bool) {
	start := w.now
	if classes[f.class].activity > 0 {
		start += w.wait(f)
	}
	in, path := w.inward(c, f, w.now)
	if path && why == causeSite && c.cut <= w.now {
		why = causeReturn
	}
	if in == never {
		// Told, but lost: the next site to hear the client tells again.
		in = max(out, w.now) + 100*time.Millisecond + w.Delay
	}
	// A client that was cut off itself makes its peers try again as soon as it
	// is back; else they do by their own timers.
	from := start
	if out > w.now {
		from = max(out, start)
	}
	end := max(out, from+retransmitted(in-from, w.tripTo(c, f)))
	if end <= start || f.end <= start {
		return false
	}
	return w.stats.stall(why, end-start, w.Patience)
}

func (w *world) tripTo(c *client, f *flow) time.Duration {
	s := w.servers[c.site].place
	return 2 * (latency(c.place, s) + latency(s, w.peers[f.peer].place))
}

// conventional is the same for a design in which a connection lives at one
// server: it breaks with the first packet that gets to another one. For how
// long the client's packets go where they go now says stays.
func (w *world) conventional(c *client, why cause, stays time.Duration) {
	for i := range c.flows {
		f := &c.flows[i]
		if f.site == c.site || classes[f.class].activity > 0 && w.wait(f) > stays {
			continue
		}
		f.site = c.site // opened again here
		w.stats.causes[why].conventional++
	}
}
