package main

import (
	"math"
	"time"
)

// What the servers know. Nothing is stored per server and client: who has heard
// what follows from what was published, by whom and when, and from the message's
// time on its way, which is drawn by its hash.

// Timing of anytun/server and anytun/registry/nats.
const (
	seenInterval  = 2 * time.Minute
	sweepInterval = 10 * time.Second
	helloInterval = 5 * time.Second // less up to a quarter
	syncDelay     = 300 * time.Millisecond
	// announceAfter is how long a process runs before BGP says so.
	announceAfter = 3 * time.Second
)

// version is a published location.
type version struct {
	at       time.Duration
	seq      uint32 // of the client's; 0: there is none
	endpoint uint32
	session  uint32
	by       uint16
	lost     bool // its server died at once
}

// delivered is when a server has it.
func (w *world) delivered(v *version, c *client, to uint16) time.Duration {
	if v.by == to {
		return v.at
	}
	if v.lost {
		return never
	}
	s := &w.servers[to]
	if s.started > v.at {
		return s.loaded
	}
	if w.apart(v.by, to) && v.at >= w.cutAt && v.at < w.healAt {
		return w.healed(v.by, to)
	}
	jitter := -math.Log(1-hash(uint64(c.number), uint64(v.seq), uint64(to), w.Seed)) * float64(w.Delay)
	return v.at + latency(w.servers[v.by].place, s.place) + time.Duration(jitter)
}

// apart says whether the partition separates two servers.
func (w *world) apart(a, b uint16) bool { return w.servers[a].group != w.servers[b].group }

// healed is when a server has caught up on what another one heard meanwhile: it
// hears a hello, and asks a server for everything. If that one was on its own
// side, it takes until it has asked the one that knows, one after the other.
func (w *world) healed(by, to uint16) time.Duration {
	at := w.healAt + time.Duration(hash(uint64(by), uint64(to), 1)*float64(helloInterval)) + syncDelay
	at += time.Duration(chunks(w.online)) * w.roundTrip()
	if w.Own && hash(uint64(to), 2) < 0.5 {
		at += time.Duration(hash(uint64(by), uint64(to), 3)*float64(w.up)) * 2 * w.roundTrip()
	}
	return at
}

// roundTrip is a typical one between two servers.
func (w *world) roundTrip() time.Duration { return 100*time.Millisecond + w.Delay }

// forgotten is from when to when a server knows nothing of a client that is heard
// only beyond the partition: watermarks don't arrive, and after a while it counts
// as gone. With Groups 0 nobody is forgotten.
func (w *world) forgotten(c *client, by uint16) (from, to time.Duration) {
	if w.now < w.cutAt || w.Groups == 0 || !w.apart(c.site, by) {
		return never, never
	}
	last := w.cutAt - time.Duration(hash(uint64(c.number), uint64(c.site), 4)*float64(seenInterval))
	from = last + w.Forget + time.Duration(hash(uint64(by), 5)*float64(sweepInterval))
	if from >= w.healAt {
		return never, never
	}
	return from, w.healed(c.site, by)
}

// right says whether packets that are sent as v says reach the client.
func (c *client) right(v *version, at time.Duration) bool {
	return v.endpoint == c.endpoint &&
		(v.session == c.session || v.session+1 == c.session && at < c.oldUntil)
}

// knows is the first time from t on at which a server knows how to reach the
// client, if nothing more is told.
func (w *world) knows(s uint16, c *client, t time.Duration) time.Duration {
	if s == c.site && c.cut <= t && w.heardAt(c, s) <= t {
		return t
	}
	from, to := w.forgotten(c, s)
	best := never
	for i := range c.told {
		v := &c.told[i]
		if v.seq == 0 {
			break
		}
		at := max(t, w.delivered(v, c, s))
		if at >= from && at < to {
			at = to
		}
		if c.right(v, at) {
			best = min(best, at)
		}
		if at == t {
			break // it has replaced all that is older
		}
	}
	return best
}

// heardAt is when the newest location was heard, if this server did so.
func (w *world) heardAt(c *client, s uint16) time.Duration {
	if v := &c.told[0]; v.by == s || v.at <= w.now {
		return v.at
	}
	return never
}

// hear is a client's packets getting to its site at a time: what that doesn't
// know it tells all others. It says whether it did.
func (w *world) hear(c *client, at time.Duration) bool {
	if !w.servers[c.site].up {
		return false
	}
	for i := range c.told {
		v := &c.told[i]
		if v.seq == 0 {
			break
		}
		if w.delivered(v, c, c.site) > at {
			continue
		}
		from, to := w.forgotten(c, c.site)
		if v.endpoint == c.endpoint && v.session == c.session && (at < from || at >= to) {
			return false
		}
		break
	}
	seq := c.told[0].seq + 1
	copy(c.told[1:], c.told[:])
	c.told[0] = version{at: at, seq: seq, endpoint: c.endpoint, session: c.session, by: c.site}
	w.bus.location(w, c, at, false)
	return true
}
