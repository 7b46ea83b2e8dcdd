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

// steadyAfter is how many messages in a row make a server the one that answers:
// where packets are sprayed over several servers, none ever is.
const steadyAfter = 64

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

// note remembers which server a message came from, and says whether it is
// another than a long row of messages before it. Where routes flip for every
// packet changes are many, so they are counted and not told. Only receiveLoop
// calls it.
func (c *Client) note(server uint32) (moved bool) {
	old := c.answering.Load()
	if old == server {
		c.steady = min(c.steady+1, steadyAfter)
		return false
	}
	c.changed(server)
	moved = old != 0 && c.steady == steadyAfter
	c.steady = 0
	return moved
}

// changed notes that another server answers now.
func (c *Client) changed(server uint32) {
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
