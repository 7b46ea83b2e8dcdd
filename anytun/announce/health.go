package announce

// health is the verdict over a row of checks. The zero value, with fall and rise
// set, has seen none. Not safe for concurrent use.
//
//	unknown ──ok──► healthy ──fall failures in a row──► unhealthy
//	   │               ▲                                    │
//	   └──fall failures──────────►──────────────────────────┤
//	                   └────────rise successes in a row─────┘
type health struct {
	fall, rise int

	healthy bool
	known   bool  // there is a verdict
	why     error // of the last failure; nil once healthy and well
	row     int   // results in a row that speak against the verdict
}

func (h *health) result(err error) {
	if err != nil {
		h.why = err
	} else if h.healthy {
		h.why = nil
	}
	need := h.fall
	switch {
	case h.known && h.healthy == (err == nil):
		h.row = 0
		return
	case !h.known && err == nil:
		need = 1 // a server that starts well has no failure behind it to be careful about
	case h.known && !h.healthy:
		need = h.rise
	}
	h.row++
	if h.row < need {
		return
	}
	h.known, h.healthy, h.row = true, err == nil, 0
	if h.healthy {
		h.why = nil
	}
}
