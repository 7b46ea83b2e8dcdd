package client

import (
	"time"

	"github.com/anytun-go/anytun/anytun/session"
)

// A time in which nothing gets through: the schedule (session.Schedule) sees
// silence where messages should come, and asks by keep-alives. When the first
// one goes out, OnSuspect is told; when messages flow again, OnGap, from
// controlLoop, which receiveLoop wakes for it. Nothing here is per packet, and a
// route that flips with every packet makes no silence.

// steadyAfter is how many answers to keep-alives in a row, behind a first one,
// make a server the one that this client's packets reach: where packets are
// sprayed over several servers, none ever is. Other messages don't tell: packets
// of peers come from the servers that those peers reach.
const steadyAfter = 6

// gaps is what is remembered of gaps.
type gaps struct {
	count          uint64
	total, longest time.Duration
	last           Gap
	end            time.Time
}

// traffic is what the schedule is told. Received is read first: what is stored
// before it belongs to it.
func (c *Client) traffic() (t session.Traffic, received, packet, waiting int64) {
	received = c.received.Load()
	packet, waiting = c.packet.Load(), c.waiting.Load()
	return session.Traffic{
		Sent: c.time(c.sent.Load()), Received: c.time(received), Packet: c.time(packet), Waiting: c.time(waiting),
		Packets: c.counters.receivedPackets.Load(), RTT: time.Duration(c.smooth.Load()), Moved: c.moved.Load(),
	}, received, packet, waiting
}

// ask asks the schedule what to do at now, and tells the owner of gaps.
func (c *Client) ask(u *upkeep, now time.Time) session.Action {
	t, received, packet, waiting := c.traffic()
	a := u.schedule.Next(now, t)
	if a.Quiet {
		c.watched.Store(false)
	}
	c.suspect.Store(a.Suspect)
	if a.Quiet && (c.packet.Load() != packet || c.waiting.Load() != waiting) || a.Suspect && c.received.Load() != received {
		notify(c.wake) // it happened meanwhile, when there seemed no need to
	}
	if t.Moved && !a.Suspect {
		c.moved.Store(false)
	}
	if a.Suspect && !u.suspect {
		u.suspect = true
		u.before = uint16(c.answering.Load())
		if c.cfg.OnSuspect != nil {
			c.cfg.OnSuspect(true)
		}
	}
	if a.Ended != (session.Silence{}) {
		c.gapEnded(u, a.Ended)
	}
	if !a.Suspect && u.suspect {
		u.suspect = false
		if c.cfg.OnSuspect != nil {
			c.cfg.OnSuspect(false)
		}
	}
	return a
}

func (c *Client) gapEnded(u *upkeep, s session.Silence) {
	g := Gap{Length: s.To.Sub(s.From), Before: u.before, After: uint16(c.resumed.Load())}
	n := gaps{count: 1, total: g.Length, longest: g.Length, last: g, end: s.To}
	if old := c.gaps.Load(); old != nil {
		n.count += old.count
		n.total += old.total
		n.longest = max(n.longest, old.longest)
	}
	c.gaps.Store(&n)
	if c.cfg.OnGap != nil {
		c.cfg.OnGap(g)
	}
	c.log.Info("nothing got through for a while", "seconds", g.Length.Seconds(), "server", g.After, "server_before", g.Before)
}

// reached notes which server has answered a keep-alive, and says whether it is
// another than the one that answered all in a while before it. Only receiveLoop
// calls it.
func (c *Client) reached(server uint16) (moved bool) {
	if server == c.reaches {
		c.steady = min(c.steady+1, steadyAfter)
		return false
	}
	moved = c.reaches != 0 && c.steady == steadyAfter
	c.reaches, c.steady = server, 0
	return moved
}

// changed notes that messages come from another server now. Where routes flip
// for every packet that is often, so it is counted and not told.
func (c *Client) changed(server uint32) {
	if c.answering.Load() == server {
		return
	}
	if old := c.answering.Swap(server); old != 0 && old != server {
		c.changes.Add(1)
	}
}

// sample takes a round trip. The smoothed one moves by a quarter, so that one
// slow answer doesn't slow the client's questions down for long.
func (c *Client) sample(rtt int64) {
	rtt = max(1, rtt)
	c.rtt.Store(rtt)
	if old := c.smooth.Load(); old != 0 {
		rtt = old + (rtt-old)/4
	}
	c.smooth.Store(rtt)
}
