package session

import "time"

// Numbers of the client's schedule (PROTOCOL.md 7).
const (
	DefaultKeepAlive = 20 * time.Second
	MinKeepAlive     = time.Second
	MaxKeepAlive     = 10 * time.Minute

	// RekeyAfter is the age at which a session is replaced; jitter takes up to
	// a tenth off, so that a cluster's clients don't come at once.
	RekeyAfter = time.Hour
	// RekeyPackets bounds what one key seals, far below the limits of both AEADs.
	RekeyPackets = 1 << 36
	// OldSession is how long packets of the session before are still opened: as
	// long as a server may go on with it that is cut off from the one which
	// hears the client, so nearly until the next session is made.
	OldSession = RekeyAfter

	// ProbeAfter is the silence after a few inner packets that makes a client
	// ask whether the path still works.
	ProbeAfter = 500 * time.Millisecond
	// MinProbe and MaxProbe bound what two round trips mean where a client asks
	// faster: after many packets, or when it has sent one and nothing came.
	MinProbe = 100 * time.Millisecond
	MaxProbe = time.Second

	// probeBusy is how many inner packets must have come since the last answer
	// to a probe for their silence to be asked about fast: so that probes are
	// at most a tenth of what comes in.
	probeBusy = 10
	// probeRest is how long after an answered probe a silence that only a sent
	// packet makes suspicious isn't asked about: many are never answered.
	probeRest = time.Second
	// followFirst is the pause after the first answered probe of a silence until
	// it is asked about again, and doubles each time. A translator on the way may
	// forget a client in the middle of a silence, and then a peer's packet waits
	// for the client's next one; so it waits about as long again as the silence was.
	followFirst = time.Second
	// probeFast is how many unanswered probes follow each other at two round
	// trips, before the pause between them doubles.
	probeFast = 20

	retryFirst = 500 * time.Millisecond
	retryMax   = 15 * time.Second
)

// Schedule decides when a client sends handshakes and keep-alives. It is told
// the time and what was heard, and says what to do next; it owns no timer and
// sends nothing. Not safe for concurrent use.
type Schedule struct {
	// Jitter returns a number in [0, 1); it spreads retries and rekeys.
	Jitter func() float64

	keepAlive time.Duration
	made      time.Time // of the session; zero without one
	rekeyAt   time.Time
	endAt     time.Time // no server accepts the session after this
	attempts  int       // handshakes since the last success
	attemptAt time.Time // when the next one may go out
	aliveAt   time.Time // last keep-alive sent
	hurry     bool      // the path changed: ask at once

	probes   int       // sent since something was heard
	quiet    time.Time // packets up to here needn't be asked about any more
	answered time.Time // when the last probe was
	came     bool      // packets came before this silence: a peer may send more
	follow   int       // probes about it that were answered, but for the first
	counted  uint64    // Traffic.Packets then
	busy     bool      // many packets came before
	heard    time.Time // what was heard last before the first of them
	silent   time.Time // start of the silence that they ask about
	gap      bool      // it is one: probes stayed unanswered
}

// Traffic is what a Schedule is told of the messages both ways. Times are zero
// for never. Only authentic messages count as received.
type Traffic struct {
	Sent     time.Time     // last message sent
	Received time.Time     // last message received
	Packet   time.Time     // last received one with an inner packet
	Waiting  time.Time     // first inner packet sent since Received; zero: none was
	Packets  uint64        // inner packets received so far
	RTT      time.Duration // smoothed, of keep-alives; 0: not known yet
	// Moved: the last answer to a keep-alive came from another server, or for
	// another outer endpoint, than everything in a while before it.
	Moved bool
}

// Action is what a Schedule asks for.
type Action struct {
	Handshake  bool      // send a new initiation
	NextServer bool      // to the next service address: the one before doesn't answer
	KeepAlive  bool      // send a keep-alive
	Probe      bool      // it is to ask about a silence
	Expired    bool      // forget the session: no server accepts it any more
	Dead       bool      // nothing was heard for two intervals
	Suspect    bool      // a probe isn't answered yet: maybe nothing gets through
	Gap        bool      // nothing does: probes stayed unanswered
	Ended      Silence   // a gap has just ended; else zero
	Quiet      bool      // no packet is waited for: call Next when the next one has come, or was sent
	Again      time.Time // call Next again then, or after anything else happened
}

// Silence is a time in which nothing got through.
type Silence struct{ From, To time.Time }

// Established tells that a handshake has succeeded.
func (s *Schedule) Established(now time.Time, keepAlive, lifetime time.Duration) {
	s.keepAlive = min(max(keepAlive, MinKeepAlive), MaxKeepAlive)
	s.made = now
	s.endAt = now.Add(lifetime)
	rekey := min(RekeyAfter, lifetime*9/10)
	s.rekeyAt = now.Add(rekey - time.Duration(s.Jitter()*float64(rekey)/10))
	s.attempts, s.attemptAt = 0, time.Time{}
	s.aliveAt = time.Time{}
	s.hurry = false
}

// Hurry tells that the path may have changed (the machine slept, the network
// changed): the next Next asks for a sign of life at once.
func (s *Schedule) Hurry() { s.hurry = true; s.attemptAt = time.Time{} }

// Rekey asks for a new session now, for instance since a key has sealed enough.
func (s *Schedule) Rekey(now time.Time) {
	if !s.made.IsZero() && s.rekeyAt.After(now) {
		s.rekeyAt = now
	}
}

// Abandon tells that the server refused the session.
func (s *Schedule) Abandon() { s.made = time.Time{} }

// Next says what to do at now, given what was sent and received.
func (s *Schedule) Next(now time.Time, t Traffic) Action {
	var a Action
	if !s.made.IsZero() && !now.Before(s.endAt) {
		s.made = time.Time{}
		a.Expired = true
	}
	need := s.made.IsZero()
	if !need {
		heard := later(t.Received, s.made)
		a.Dead = now.Sub(heard) >= 2*s.keepAlive
		need = a.Dead || !now.Before(s.rekeyAt)
		if !need {
			s.attempts, s.attemptAt = 0, time.Time{}
		}
		a.KeepAlive, a.Again = s.alive(now, later(t.Sent, s.made), heard)
		a.Again = earlier(a.Again, s.probe(&a, now, heard, t))
	}
	a.Suspect, a.Gap = s.probes > 0, s.gap
	if need {
		if !now.Before(s.attemptAt) {
			a.Handshake = true
			// Two tries on one address before the next: one may just be lost.
			a.NextServer = s.attempts >= 2
			wait := min(retryFirst<<min(s.attempts, 16), retryMax)
			s.attemptAt = now.Add(wait*8/10 + time.Duration(s.Jitter()*float64(wait)*0.4))
			s.attempts++
		}
		a.Again = earlier(a.Again, s.attemptAt)
	} else {
		a.Again = earlier(a.Again, s.rekeyAt)
	}
	if !s.made.IsZero() {
		a.Again = earlier(a.Again, s.endAt)
	}
	return a
}

// alive decides on a keep-alive. One goes out when nothing was sent for an
// interval (it holds the NAT open and tells the servers where the client is),
// and when nothing was received for one; then every quarter interval until
// something comes, so that the path counts as dead after two intervals only if
// several of them were lost.
func (s *Schedule) alive(now, sent, heard time.Time) (send bool, again time.Time) {
	step := s.keepAlive
	if now.Sub(heard) >= s.keepAlive {
		step = s.keepAlive / 4
	}
	due := earlier(sent, heard).Add(s.keepAlive)
	if !s.aliveAt.IsZero() {
		due = later(due, s.aliveAt.Add(step))
	}
	if s.hurry || !now.Before(due) {
		s.hurry = false
		s.aliveAt = now
		send = true
		due = later(earlier(now, heard).Add(s.keepAlive), now.Add(s.keepAlive/4))
	}
	return send, earlier(due, laterThan(now, heard.Add(2*s.keepAlive)))
}

// probe decides on asking about a silence, and returns when to look again; zero
// if no packet is waited for. A client that only receives sends little, so when
// a route dies or a translator on the way forgets it, it must notice by itself;
// keep-alives alone would take an interval. One answer ends it until the next
// packet, but for follow-ups that grow rare. What the first probe waits for:
//
//	many packets came, then none     two round trips
//	one was sent, nothing came       the same, but once a second
//	few packets came, then none      ProbeAfter
//
// Unanswered ones follow each other at two round trips, and the silence is a
// gap when one has waited that long; without many packets before it the second
// one, since a probe may just be lost.
func (s *Schedule) probe(a *Action, now, heard time.Time, t Traffic) (again time.Time) {
	wait, answer := ProbeAfter, ProbeAfter
	if t.RTT > 0 {
		wait = min(max(2*t.RTT, MinProbe), MaxProbe)
		answer = min(max(2*t.RTT, MinProbe), max(MaxProbe, s.keepAlive/4))
	}
	if s.probes > 0 && heard.After(s.heard) {
		// A path that moved has lost what was under way, even if the first probe
		// went through.
		if s.gap || t.Moved && s.busy {
			a.Ended = Silence{From: s.silent, To: heard}
		}
		s.probes, s.gap = 0, false
		s.quiet, s.answered, s.counted = now, now, t.Packets
	}
	due := s.aliveAt.Add(s.pause(answer, now.Sub(heard)))
	follows := false
	if s.probes == 0 {
		if due = s.firstProbe(heard, wait, t); due.IsZero() {
			a.Quiet, follows = true, true
			due = s.followUp()
		} else {
			s.came, s.follow = t.Packet.After(s.quiet), 0
		}
	}
	switch {
	case due.IsZero():
		return due
	case now.Before(due) && s.probes == 0 && !follows:
		return earlier(due, now.Add(wait)) // many may have come by then
	case now.Before(due):
		return due
	case follows:
		a.Quiet = false
		s.follow++
	}
	if s.probes >= 2 || s.probes == 1 && s.busy {
		s.gap = true
	}
	if s.probes == 0 {
		s.heard = heard
	}
	s.probes++
	s.aliveAt = now
	a.KeepAlive, a.Probe = true, true
	return now.Add(s.pause(answer, now.Sub(heard)))
}

// firstProbe returns when to ask about a silence that wasn't asked about yet;
// zero for never.
func (s *Schedule) firstProbe(heard time.Time, wait time.Duration, t Traffic) (due time.Time) {
	s.busy = t.Packets-s.counted >= probeBusy
	s.silent = heard
	if t.Packet.After(s.quiet) {
		due = heard.Add(max(wait, ProbeAfter))
		if s.busy {
			due = heard.Add(wait)
		}
	}
	if t.Waiting.IsZero() || t.Waiting.Before(heard) {
		return due
	}
	answer := t.Waiting.Add(wait)
	if !s.busy && !s.answered.IsZero() {
		answer = later(answer, s.answered.Add(probeRest))
	}
	if due.IsZero() || answer.Before(due) {
		due, s.silent = answer, t.Waiting
	}
	return due
}

// followUp returns when to ask again about a silence that an answered probe has
// explained; zero for never.
func (s *Schedule) followUp() time.Time {
	pause := followFirst << min(s.follow, 16)
	if !s.came || s.answered.IsZero() || pause >= s.keepAlive {
		return time.Time{}
	}
	return s.answered.Add(pause)
}

// pause returns how long the last probe's answer is waited for: at first two
// round trips, then up to MaxProbe, until the path counts as dead.
func (s *Schedule) pause(first, silence time.Duration) time.Duration {
	p := min(first<<min(max(0, s.probes-probeFast), 10), max(MaxProbe, first))
	if silence >= 2*s.keepAlive {
		p = max(p, s.keepAlive/4)
	}
	return p
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// earlier returns the earlier of two times; a zero time is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// laterThan returns t if it lies after now, else none.
func laterThan(now, t time.Time) time.Time {
	if t.After(now) {
		return t
	}
	return time.Time{}
}
