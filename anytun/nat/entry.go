package nat

import (
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
)

// How long a mapping lives after the last packet that went out through it. Packets
// that come in don't count: otherwise strangers could keep it alive (RFC 4787
// section 4.3, where only outbound refresh is a must).
const (
	udpTimeout  = 5 * time.Minute             // RFC 4787 REQ-5
	tcpTimeout  = 2*time.Hour + 4*time.Minute // RFC 5382 REQ-5, established
	tcpShort    = 4 * time.Minute             // RFC 5382 REQ-5, partially open or closing
	icmpTimeout = 60 * time.Second            // RFC 5508 REQ-2
)

// entry is a mapping with what this server knows of its use. For TCP that is only a
// guess at its connections' phases (RFC 5382 section 2), since this server may see
// one direction only, and a mapping may have several connections.
//
//	    opening ---------------> established ---------------> closing
//	SYN         any but SYN                    FIN both ways,    |
//	       ^    from the client                the client's RST  |
//	       +-----------------------------------------------------+
//	                                SYN
//
// The client's RST is forgotten if the client goes on, with another connection. A
// SYN beside a connection that shows no end makes the mapping shared: it has
// several, and is never closing. A RST from outside, which anybody can forge, only
// makes the mapping give way where ports are short.
//
// A mapping learned from another server counts as established: it may be.
type entry struct {
	Mapping
	// When, since Table.start: the last packet went out through it here, if local
	// says that one did; it was last learned, if it was; it was last published or
	// learned; FIN or RST came or went.
	sent, learned, told, ended time.Duration
	local                      bool

	established, shared          bool
	finOut, finIn, rstOut, rstIn bool
}

// outward notes a packet from the client.
func (e *entry) outward(flags uint8, now time.Duration) {
	first := !e.local
	e.sent, e.local = max(e.sent, now), true
	if e.Protocol != packet.TCP {
		return
	}
	switch {
	case flags&packet.RST != 0:
		e.rstOut, e.ended = true, now
	case flags&packet.SYN != 0:
		switch {
		case e.ending():
			e.established = false
			e.finOut, e.finIn, e.rstOut, e.rstIn = false, false, false, false
		case first:
			// What was learned isn't known to be established if it begins here.
			e.established = false
		case e.established:
			e.shared = true
		}
	default:
		// Only someone who was answered sends anything but SYN.
		e.established = true
		e.rstOut, e.rstIn = false, false
		if flags&packet.FIN != 0 {
			e.finOut, e.ended = true, now
		}
	}
}

// inward notes a packet to the client.
func (e *entry) inward(flags uint8, now time.Duration) {
	if e.Protocol == packet.TCP && flags&(packet.FIN|packet.RST) != 0 {
		e.finIn = e.finIn || flags&packet.FIN != 0
		e.rstIn = e.rstIn || flags&packet.RST != 0
		e.ended = now
	}
}

// ending says whether a connection has shown any sign of its end.
func (e *entry) ending() bool { return !e.shared && (e.finOut || e.finIn || e.rstOut || e.rstIn) }

// closing says whether the connection is over, as far as one can see.
func (e *entry) closing() bool { return !e.shared && (e.rstOut || e.finOut && e.finIn) }

// deadline is when the mapping ends if nothing goes out through it any more.
func (e *entry) deadline() time.Duration {
	if e.closing() {
		return max(e.used(), e.ended) + tcpShort
	}
	return e.used() + e.timeout()
}

// used is when something went out through it last, as far as is known.
func (e *entry) used() time.Duration { return max(e.sent, e.learned) }

func (e *entry) timeout() time.Duration {
	switch e.Protocol {
	case packet.UDP:
		return udpTimeout
	case packet.TCP:
		if !e.established || e.closing() {
			return tcpShort
		}
		return tcpTimeout
	default:
		return icmpTimeout
	}
}

// firm says whether the mapping may well be in use. One that isn't still works, but
// gives way when a block is full: a TCP mapping that was only heard of, and not
// lately, or that has seen an end.
func (e *entry) firm(now time.Duration) bool {
	if e.Protocol == packet.TCP && now >= e.used()+tcpShort {
		return e.local && now < e.deadline() && !e.ending()
	}
	return now < e.deadline()
}

// claimTime is how long servers may take to learn of each other's new mappings.
const claimTime = 10 * time.Second

// stands says whether the mapping may win against one of another server. If packets
// go out through it here, it may. If it was only heard of, and not just now, then the
// other server knows better: the mapping may have ended meanwhile where it was made;
// and if it hasn't, it is there that it is defended.
func (e *entry) stands(now time.Duration) bool {
	if now < e.told+claimTime {
		return true
	}
	return e.local && now < e.sent+e.timeout() && e.firm(now)
}

// untold says whether other servers should hear of the mapping again: it has been
// used since they did, a third of its life ago.
func (e *entry) untold(now time.Duration) bool {
	return e.local && e.sent > e.told && now >= e.told+e.timeout()/3 && e.firm(now)
}
