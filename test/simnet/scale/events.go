package main

import "time"

// Times of a client's session (PROTOCOL.md 7).
const (
	rekeyAfter  = time.Hour // less up to a tenth
	rekeyJitter = 6 * time.Minute
)

// resolveTime is what the servers' resolver takes for a name that it knows.
const resolveTime = 5 * time.Millisecond

func (w *world) handle(e event) {
	switch e.kind {
	case evFail:
		w.fail()
		return
	case evStart:
		w.start(uint16(e.who))
		return
	case evAnnounce:
		w.announce(uint16(e.who))
		return
	case evGossip:
		w.gossip(uint16(e.who))
		return
	case evHour:
		w.census()
		return
	case evCut:
		return // knowledge.go goes by the time
	case evMissed:
		w.missed()
		return
	case evHeal:
		w.heal()
		return
	case evOnline:
		w.appear(w.client(e.who), w.now, true)
		return
	default:
	}
	c := w.client(e.who)
	if e.life != c.life || !c.online {
		return
	}
	w.advance(c)
	switch e.kind {
	case evRoute:
		if c.cut <= w.now {
			w.reroute(c, causeRoute, never)
		}
	case evFlip:
		next := w.exp(c.flipEvery)
		w.at(w.now+next, evFlip, e.who, e.life)
		c.other = !c.other
		c.cut = min(c.cut, w.now) // the other way leads to a site that lives
		w.reroute(c, causeFlip, next)
	case evWander:
		w.at(w.now+w.exp(w.RouteEvery), evWander, e.who, e.life)
		w.wander(c)
		w.reroute(c, causeRoute, never)
	case evMove:
		w.at(w.now+w.exp(w.MoveEvery), evMove, e.who, e.life)
		w.move(c)
	case evRenumber:
		w.at(w.now+w.exp(w.Renumber), evRenumber, e.who, e.life)
		away := time.Second + w.spread(9*time.Second)
		w.newEndpoint(c, away+w.probe(c, away))
	case evRebind:
		w.at(w.now+w.exp(w.Rebind), evRebind, e.who, e.life)
		w.rebind(c)
	case evForgot:
		w.at(w.now+w.KeepAlive+w.exp(2*w.KeepAlive), evForgot, e.who, e.life)
		w.forgot(c)
	case evRekey:
		w.rekey(c)
	case evOffline:
		w.leave(c)
	default:
	}
}

// fail kills a site: its server is gone at once, and routes lead there until
// they have converged.
func (w *world) fail() {
	w.at(w.now+w.FailEvery, evFail, 0, 0)
	if w.up <= len(w.servers)/2 {
		return
	}
	n := uint16(w.chance.IntN(len(w.servers)))
	for !w.servers[n].up {
		n = (n + 1) % uint16(len(w.servers))
	}
	s := &w.servers[n]
	s.up, s.downAt = false, w.now
	s.changes++
	w.up--
	w.stats.failures++
	w.at(w.now+20*time.Second+w.exp(w.Repair), evStart, uint32(n), 0)
	for i := range w.clients {
		c := &w.clients[i]
		if !c.online {
			continue
		}
		w.advance(c)
		out := w.now
		if v := &c.told[0]; v.by == n && v.at > w.now-w.Linger && v.seq > 1 {
			v.lost = true
			w.stats.lost++
		}
		if c.site == n && c.cut <= w.now {
			w.stats.causes[causeSite].events++
			c.cut = w.now + w.converge(w.chance.Float64(), w.chance.Float64())
			w.at(c.cut, evRoute, c.number, c.life)
			out = c.cut + w.probe(c, c.cut-w.now)
			// In the other design the server's memory is gone, whatever the routes do.
			to := w.best(c)
			for k := range c.flows {
				if c.flows[k].site == n {
					c.flows[k].site = to
					w.stats.causes[causeSite].conventional++
				}
			}
		}
		w.interrupted(c, causeSite, out, func(f *flow) bool {
			if out > w.now {
				return true
			}
			_, from := w.entry(f.peer, w.now)
			return from > w.now
		})
	}
}

// start is the process of a failed site coming up: it asks for what the others
// know, and all of them for what it does.
func (w *world) start(n uint16) {
	s := &w.servers[n]
	s.started = w.now
	s.loaded = w.now + syncDelay + time.Duration(chunks(w.online))*w.roundTrip()
	w.bus.started(w)
	w.at(w.now+announceAfter, evAnnounce, uint32(n), 0)
}

// announce is when its routes spread.
func (w *world) announce(n uint16) {
	s := &w.servers[n]
	s.up, s.upAt = true, w.now
	s.changes++
	w.up++
	for i := range w.clients {
		c := &w.clients[i]
		if !c.online || c.cut > w.now {
			continue
		}
		if w.best(c) != c.site {
			w.at(w.now+w.converge(w.chance.Float64(), w.chance.Float64()), evRoute, c.number, c.life)
		}
		if s.loaded <= w.now {
			continue
		}
		// Peers' packets may get here before it knows anything.
		w.advance(c)
		w.interrupted(c, causeStart, w.now, func(f *flow) bool {
			site, _ := w.entry(f.peer, s.loaded)
			return site == n
		})
	}
}

// arrive is a client's packets getting to another site from now on.
func (w *world) arrive(c *client, to uint16) {
	from := &w.servers[c.site]
	from.clients--
	from.gone = append(from.gone, w.now)
	w.servers[to].clients++
	c.site = to
}

// reroute sends a client's packets where they should go.
func (w *world) reroute(c *client, why cause, stays time.Duration) {
	if to := w.best(c); to != c.site {
		w.arrive(c, to)
		w.stats.causes[why].events++
		w.stats.causes[why].untouched += uint64(len(c.flows))
		w.conventional(c, why, stays)
	}
	if w.hear(c, w.now) {
		w.interrupted(c, causeLate, w.now, nil)
	}
}

// wander changes what routing prefers, for good.
func (w *world) wander(c *client) {
	i := 1 + w.chance.IntN(3)
	c.sites[0], c.sites[i] = c.sites[i], c.sites[0]
}

// newEndpoint is a client being heard from another address or port after away.
func (w *world) newEndpoint(c *client, away time.Duration) {
	c.endpoint++
	w.stats.causes[causeAddress].events++
	if c.cut > w.now {
		return // heard when its route has converged
	}
	out := w.now + away
	w.hear(c, out-latency(c.place, w.servers[c.site].place))
	w.interrupted(c, causeAddress, out, nil)
}

// move is another network: a moment without any, then a new address, perhaps
// another site.
func (w *world) move(c *client) {
	c.cut = min(c.cut, w.now)
	if w.chance.IntN(2) == 0 {
		w.wander(c)
	}
	if to := w.best(c); to != c.site {
		w.arrive(c, to)
		w.conventional(c, causeAddress, never)
	}
	w.newEndpoint(c, 200*time.Millisecond+w.spread(1800*time.Millisecond))
}

// rebind is a translator giving the client another port without a word. Half of
// the clients are busy and show it at once; others with their next keep-alive.
func (w *world) rebind(c *client) {
	if w.chance.IntN(2) == 0 {
		w.newEndpoint(c, w.probe(c, 0))
		return
	}
	w.idleRebind(c, w.spread(w.KeepAlive))
}

// forgot is a translator forgetting an idle client before its next keep-alive.
func (w *world) forgot(c *client) { w.idleRebind(c, w.KeepAlive-c.nat) }

func (w *world) idleRebind(c *client, until time.Duration) {
	c.endpoint++
	w.stats.causes[causeAddress].events++
	if c.cut > w.now {
		return
	}
	w.hear(c, w.now+until)
	w.interrupted(c, causeAddress, w.now, func(f *flow) bool { return classes[f.class].activity > 0 })
}

// rekey is a new session: a new id for every server to know.
func (w *world) rekey(c *client) {
	if c.cut > w.now {
		w.at(c.cut+time.Second, evRekey, c.number, c.life)
		return
	}
	w.at(w.now+rekeyAfter-w.spread(rekeyJitter), evRekey, c.number, c.life)
	c.session++
	c.oldUntil = w.now + w.OldSession
	w.hear(c, w.now)
	if w.now < w.cutAt || w.now >= w.healAt {
		return // told long before the old one ends
	}
	kept := c.flows[:0]
	for _, f := range c.flows {
		start := c.oldUntil
		if classes[f.class].activity > 0 {
			start += w.wait(&f)
		}
		site, _ := w.entry(f.peer, w.now)
		end := w.knows(site, c, c.oldUntil)
		if end <= start || f.end <= start || !w.stats.stall(causeCut, min(end, w.Day)-start, w.Patience) {
			kept = append(kept, f)
		}
	}
	c.flows = kept
}

// appear is a client that comes online: before the day, if t is 0.
func (w *world) appear(c *client, t time.Duration, part bool) {
	w.count(1)
	n := c.number
	c.online, c.life = true, c.life+1
	c.session++
	c.endpoint++
	c.flows, c.advanced, c.cut, c.oldUntil = c.flows[:0], t, t, 0
	c.site = w.best(c)
	w.servers[c.site].clients++
	if c.flipEvery > 0 {
		w.at(t+w.exp(c.flipEvery), evFlip, n, c.life)
	} else {
		w.at(t+w.exp(w.RouteEvery), evWander, n, c.life)
	}
	if c.mobile {
		w.at(t+w.exp(w.MoveEvery), evMove, n, c.life)
	} else {
		w.at(t+w.exp(w.Renumber), evRenumber, n, c.life)
	}
	w.at(t+w.exp(w.Rebind), evRebind, n, c.life)
	if c.nat > 0 && c.nat < w.KeepAlive {
		w.at(t+w.exp(2*w.KeepAlive), evForgot, n, c.life)
	}
	if part {
		w.at(t+w.exp(w.On), evOffline, n, c.life)
	}
	if t == 0 {
		w.at(w.spread(rekeyAfter), evRekey, n, c.life)
		c.told = [4]version{{at: -time.Hour, seq: 1, endpoint: c.endpoint, session: c.session, by: c.site}}
		c.advanced = -24 * time.Hour
		w.advance(c)
		return
	}
	w.at(t+rekeyAfter-w.spread(rekeyJitter), evRekey, n, c.life)
	c.told = [4]version{{at: -time.Hour, seq: c.told[0].seq, by: c.site, lost: true}}
	w.hear(c, t)
	// The first answer of a peer races with the news of where the client is. That
	// was told when the name was looked up, which is the session's first packet.
	f := w.open(c, 0, t)
	site, from := w.entry(f.peer, t)
	if from > t {
		return
	}
	here, there := w.servers[c.site].place, w.peers[f.peer].place
	answer := resolveTime + 2*latency(c.place, here) + latency(here, there) + latency(there, w.servers[site].place)
	w.stats.causes[causeSession].events++
	w.stats.causes[causeSession].untouched++
	if late := w.knows(site, c, t) - t - answer; late > 0 {
		w.stats.causes[causeSession].untouched--
		// The SYN is sent again after one second, three, …
		again := time.Second
		for again < late {
			again = 2*again + time.Second
		}
		if w.stats.stall(causeSession, min(again, time.Hour), w.Patience) {
			c.flows = c.flows[:len(c.flows)-1]
		}
	}
}

// leave is a client that goes offline, half of the time with a goodbye.
func (w *world) leave(c *client) {
	w.count(-1)
	c.online = false
	c.life++
	c.flows = nil
	w.servers[c.site].clients--
	if c.cut <= w.now && w.chance.IntN(2) == 0 {
		w.bus.location(w, c, w.now, true)
	}
	w.at(w.now+w.exp(w.Off), evOnline, c.number, c.life)
}

// gossip is a server saying whom it heard, every two minutes.
func (w *world) gossip(n uint16) {
	w.at(w.now+seenInterval, evGossip, uint32(n), 0)
	s := &w.servers[n]
	if s.up {
		w.bus.seen(w, s.clients+len(s.gone))
	}
	s.gone = s.gone[:0]
}

// missed is when servers have forgotten whom they couldn't hear of.
func (w *world) missed() {
	if w.now >= w.healAt {
		return
	}
	for i := range w.clients {
		c := &w.clients[i]
		if !c.online {
			continue
		}
		w.advance(c)
		kept := c.flows[:0]
		for _, f := range c.flows {
			site, _ := w.entry(f.peer, w.now)
			start, end := w.forgotten(c, site)
			if start == never || w.knows(site, c, w.now) <= w.now {
				kept = append(kept, f)
				continue
			}
			if f.born > start {
				w.stats.unopened++
				continue
			}
			if classes[f.class].activity > 0 {
				start += w.wait(&f)
			}
			if end <= start || f.end <= start || !w.stats.stall(causeCut, end-start, w.Patience) {
				kept = append(kept, f)
			}
		}
		c.flows = kept
	}
}

// heal is the end of a partition: flows that couldn't begin meanwhile count, and
// everybody catches up.
func (w *world) heal() {
	for i := range w.clients {
		c := &w.clients[i]
		if !c.online {
			continue
		}
		w.advance(c)
		kept := c.flows[:0]
		for _, f := range c.flows {
			site, _ := w.entry(f.peer, w.now)
			if f.born > w.cutAt && w.knows(site, c, w.now) > w.now {
				w.stats.unopened++
				continue
			}
			kept = append(kept, f)
		}
		c.flows = kept
	}
	w.bus.healed(w)
}
