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
	// OldSession is how long packets of the session before are still opened.
	OldSession = 2 * time.Minute

	// ProbeAfter is the silence after inner packets that makes a client ask
	// whether the path still works.
	ProbeAfter = 500 * time.Millisecond

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
	probes    int       // sent since something was heard
	quiet     time.Time // packets up to here needn't be asked about any more
}

// Action is what a Schedule asks for.
type Action struct {
	Handshake  bool      // send a new initiation
	NextServer bool      // to the next service address: the one before doesn't answer
	KeepAlive  bool      // send a keep-alive
	Expired    bool      // forget the session: no server accepts it any more
	Dead       bool      // nothing was heard for two intervals
	Quiet      bool      // no packet is waited for: call Next when the next one has come
	Again      time.Time // call Next again then, or after anything else happened
}

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

// Next says what to do at now, given when a message was last sent, when one was
// last received (authentic ones), and when one with an inner packet was; zero
// for never.
func (s *Schedule) Next(now, sent, received, packet time.Time) Action {
	var a Action
	if !s.made.IsZero() && !now.Before(s.endAt) {
		s.made = time.Time{}
		a.Expired = true
	}
	need := s.made.IsZero()
	if !need {
		heard := later(received, s.made)
		a.Dead = now.Sub(heard) >= 2*s.keepAlive
		need = a.Dead || !now.Before(s.rekeyAt)
		if !need {
			s.attempts, s.attemptAt = 0, time.Time{}
		}
		a.KeepAlive, a.Again = s.alive(now, later(sent, s.made), heard)
		var due time.Time
		if due, a.Quiet = s.probe(now, heard, packet); !due.IsZero() && !due.After(now) {
			s.probes++
			a.KeepAlive = true
			s.aliveAt = now
			due = heard.Add(ProbeAfter << s.probes)
		}
		a.Again = earlier(a.Again, laterThan(now, due))
	}
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

// probe returns when to ask about the silence that follows inner packets: after
// ProbeAfter, then twice as long each time, up to the interval. A client that
// only receives sends little, so when a translator on the way forgets it, it
// must notice by itself; keep-alives alone would take an interval. One answer
// ends it until the next packet; quiet says that it has.
func (s *Schedule) probe(now, heard, packet time.Time) (due time.Time, quiet bool) {
	if s.probes > 0 && !heard.Before(s.aliveAt) {
		s.probes, s.quiet = 0, now
	}
	if !packet.After(s.quiet) {
		return time.Time{}, true
	}
	wait := ProbeAfter << s.probes
	if wait >= s.keepAlive {
		return time.Time{}, false
	}
	return heard.Add(wait), false
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
