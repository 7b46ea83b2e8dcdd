package netstack

import (
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// What an outage does to gVisor's TCP, and what is done about it.
//
// RFC 5681 section 4.3 wants the slow-start threshold to stay as it is when a
// segment times out again. gVisor halves it at every time-out, and by the
// second one the window is a single segment: the threshold falls to two. When
// the path works again the connection is in congestion avoidance from two
// segments on, and takes minutes to get back to where it was. Roaming and
// failing servers are daily events here, so every stack looks for connections
// in that state and starts their congestion control anew, as if the connection
// had just been made: a window of ten segments and slow start.
//
// For the same reason RACK is off. After a time-out gVisor's RACK takes all
// that was in flight for lost but not out of the pipe, sends nothing until the
// next time-out, and recovers a handful of segments with each. The price is
// paid on paths that reorder all the time, where duplicate acknowledgements
// alone take reordering for loss.

// collapsed is the slow-start threshold, in segments, that repeated time-outs
// leave behind (the floor of RFC 5681, equation 4).
const collapsed = 2

// outageEvery bounds how often connections are looked at while time-outs
// happen.
const outageEvery = 250 * time.Millisecond

// outage is the state of the search for collapsed connections.
type outage struct {
	seen     atomic.Uint64 // time-outs up to the last search
	at       atomic.Int64  // UnixNano of the last search
	busy     atomic.Bool
	repaired atomic.Uint64
}

// afterTimeouts starts a search if there were time-outs since the last one. It
// is called when packets arrive, which is when an outage may be over.
func (s *Stack) afterTimeouts() {
	o := &s.outage
	n := s.st.Stats().TCP.Timeouts.Value()
	if n == o.seen.Load() {
		return
	}
	now := time.Now().UnixNano()
	if now-o.at.Load() < int64(outageEvery) || !o.busy.CompareAndSwap(false, true) {
		return
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		o.busy.Store(false)
		return
	}
	o.at.Store(now)
	o.seen.Store(n)
	s.handlers.Go(s.repair)
}

// repair restarts the congestion control of collapsed connections. It takes
// the locks of endpoints, so it has a goroutine of its own; Close waits for it.
func (s *Stack) repair() {
	defer s.outage.busy.Store(false)
	for _, e := range s.st.RegisteredEndpoints() {
		ep, ok := e.(tcpip.Endpoint)
		if !ok || tcp.EndpointState(ep.State()) != tcp.StateEstablished {
			continue // only established endpoints take the option
		}
		var info tcpip.TCPInfoOption
		if err := ep.GetSockOpt(&info); err != nil || info.SndSsthresh != collapsed {
			continue
		}
		cc := congestionControl
		if err := ep.SetSockOpt(&cc); err == nil {
			s.outage.repaired.Add(1)
		}
	}
}

var congestionControl tcpip.CongestionControlOption = "cubic"
