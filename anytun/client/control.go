package client

import (
	"context"
	"errors"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// upkeep holds what controlLoop alone owns: the handshake under way.
type upkeep struct {
	schedule session.Schedule
	pending  *session.Initiator
	cookie   *session.ClientCookie
	cookied  bool // the pending attempt has used a cookie: one more message is all it may cause
	server   int  // index of the service address in use
	dead     bool
	number   uint32 // of this client, as the last session had it
	leases   leases
	suspect  bool      // as OnSuspect was told
	before   uint16    // the server that answered before the suspicion
	oldSince time.Time // when the previous session was replaced
	wall     time.Time // when the loop last looked, for noticing that the machine slept
}

// controlLoop asks the schedule what to do, does it, and waits for the next
// deadline, a handshake message, the first packet after a silence, or news about
// ports.
func (c *Client) controlLoop(ctx context.Context) {
	u := &upkeep{schedule: session.Schedule{Jitter: jitter}, wall: time.Now()}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-c.control:
			c.handshakeMessage(u, b)
		case <-c.refused:
			c.log.Warn("the server no longer knows this client; trying again")
			c.current.Store(nil)
			u.schedule.Abandon()
		case m := <-c.answers:
			c.portsAnswer(u, m)
		case <-c.more:
			u.leases.want(time.Now())
		case <-c.wake:
		case <-timer.C:
		}
		timer.Reset(time.Until(c.step(u, time.Now())))
	}
}

// step does what is due at now and returns when to look again.
func (c *Client) step(u *upkeep, now time.Time) time.Time {
	// The monotonic clock stands still while a machine sleeps, the wall clock
	// doesn't. After a sleep the session may be gone and the network another.
	if slept := now.Round(0).Sub(u.wall.Round(0)) - now.Sub(u.wall); slept > 2*session.DefaultKeepAlive {
		c.log.Info("the machine slept; asking for a new session", "seconds", int(slept.Seconds()))
		u.schedule.Rekey(now)
		u.schedule.Hurry()
	}
	u.wall = now
	if c.previous.Load() != nil && now.Sub(u.oldSince) >= session.OldSession {
		c.previous.Store(nil)
	}
	cur := c.current.Load()
	if cur != nil && cur.Used(cur.Made) > session.RekeyPackets {
		u.schedule.Rekey(now)
	}
	a := c.ask(u, now)
	if a.Expired {
		c.current.Store(nil)
		cur = nil
		c.log.Warn("session expired")
	}
	if a.Dead != u.dead {
		u.dead = a.Dead
		if a.Dead {
			c.counters.deadPaths.Add(1)
			c.log.Warn("nothing heard for two keep-alive intervals; trying a new handshake")
		} else {
			c.log.Info("the path works again")
		}
	}
	if a.KeepAlive && cur != nil {
		t := uint64(c.moment())
		c.token.Store(t)
		c.counters.keepAlives.Add(1)
		if a.Probe {
			c.counters.probes.Add(1)
		}
		c.sendControl(cur, wire.AppendKeepAlive(nil, wire.KeepAlive{Interval: uint16(cur.keepAlive / time.Second), Token: t}))
	}
	if a.Handshake {
		if a.NextServer && len(c.cfg.Servers) > 1 {
			u.server = (u.server + 1) % len(c.cfg.Servers)
		}
		c.startHandshake(u, now)
	}
	if again := c.renewPorts(u, cur, now); !again.IsZero() && again.Before(a.Again) {
		return again
	}
	return a.Again
}

func (c *Client) offer() wire.Offer {
	return wire.Offer{
		KeepAlive: c.interval, MTU: uint16(c.cfg.MTU),
		Ciphers: 1<<wire.AES128GCM | 1<<wire.ChaCha20Poly1305, FastAES: session.FastAES(),
	}
}

func (c *Client) startHandshake(u *upkeep, now time.Time) {
	i, err := session.NewInitiator(c.cfg.ServerKey, c.cfg.Key, c.offer(), u.cookie, now)
	if err != nil {
		c.log.Error("can't make a handshake", "error", err)
		return
	}
	u.pending, u.cookied = i, false
	c.counters.initiations.Add(1)
	to := c.cfg.Servers[u.server]
	c.log.Debug("handshake sent", "server", to)
	c.sendHandshake(i.Message(), udp.Endpoint{Addr: to})
}

// handshakeMessage takes a response or a cookie. Whatever doesn't fit the
// attempt under way is dropped; the attempt goes on.
func (c *Client) handshakeMessage(u *upkeep, b []byte) {
	if u.pending == nil {
		c.counters.drops[DropHandshake].Add(1)
		return
	}
	now := time.Now()
	to := udp.Endpoint{Addr: c.cfg.Servers[u.server]}
	if wire.TypeOf(b) == wire.TypeCookie {
		if u.cookied {
			c.counters.drops[DropHandshake].Add(1)
			return
		}
		cookie, err := u.pending.Cookie(b, now)
		if err != nil {
			c.counters.drops[DropHandshake].Add(1)
			return
		}
		u.cookie, u.cookied = cookie, true
		c.sendHandshake(u.pending.Message(), to)
		return
	}
	g, err := u.pending.Finish(b, now)
	if err != nil {
		c.counters.drops[DropHandshake].Add(1)
		if errors.Is(err, wire.ErrValue) || errors.Is(err, wire.ErrShort) {
			c.log.Warn("the server's answer makes no sense", "error", err)
		}
		return
	}
	u.pending = nil
	a := &active{Granted: g, to: to, keepAlive: min(max(time.Duration(g.KeepAlive)*time.Second, session.MinKeepAlive), session.MaxKeepAlive)}
	c.handshakes.Add(1)
	c.resumed.Store(uint32(g.Server))
	c.changed(uint32(g.Server))
	if c.cfg.OnSession != nil {
		c.cfg.OnSession(a.session())
	}
	old := c.current.Swap(a)
	if old != nil {
		c.previous.Store(old)
		u.oldSince = now
	}
	c.log.Info("session established", "server", g.Server, "endpoint", to.Addr, "client", g.Grant.Client,
		"cipher", g.Grant.Cipher.String(), "mtu", g.MTU, "keepalive", a.keepAlive)
	c.waiting.Store(0)              // what was sent before needn't be answered in this session
	if g.Grant.Client != u.number { // others' ports now
		u.number = g.Grant.Client
		c.setPorts(u, u.leases.reset())
	}
	u.schedule.Established(now, a.keepAlive, time.Duration(g.Lifetime)*time.Second)
	u.schedule.Hurry() // the first packet shows the server that the keys work, and where we are
}

// leave tells the server that this client goes away.
func (c *Client) leave() {
	if a := c.current.Load(); a != nil {
		c.sendControl(a, wire.AppendClose(nil, wire.CloseLeaving))
	}
}
