package netstack

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
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

// A recovery that turns out to have been for nothing (hold.go) leaves a similar
// trace: in slow start the threshold falls to a fraction of what the path
// carries, and CUBIC needs seconds for what slow start does in a few round trips.
// gVisor notices such recoveries but does not undo them; so these connections
// start anew, too, which costs less than it gives unless a round trip takes half
// a second.

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
		if !s.restart(ep) {
			s.outage.seen.Store(0) // look again
		}
	}
}

// restart starts the congestion control of an established endpoint anew, unless
// it is in fast recovery: at its end gVisor sets the window to the threshold,
// which would be infinite. It reports whether it did.
func (s *Stack) restart(ep tcpip.Endpoint) bool {
	var info tcpip.TCPInfoOption
	if err := ep.GetSockOpt(&info); err != nil || info.CcState == tcpip.FastRecovery || info.CcState == tcpip.SACKRecovery {
		return false
	}
	var cc tcpip.CongestionControlOption // the same one, as new
	if err := ep.GetSockOpt(&cc); err != nil {
		return false
	}
	if err := ep.SetSockOpt(&cc); err != nil {
		return false
	}
	s.outage.repaired.Add(1)
	return true
}

// afterSpurious restarts the connection k, which has recovered from a loss that
// there was not. It has a goroutine of its own, like repair.
func (s *Stack) afterSpurious(k flowKey) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.closed {
		s.handlers.Go(func() { s.restartFlow(&k) })
	}
}

func (s *Stack) restartFlow(k *flowKey) {
	local, remote := k.addrs()
	id := stack.TransportEndpointID{
		LocalAddress: tcpipAddr(local), LocalPort: binary.BigEndian.Uint16(k.ports[:]),
		RemoteAddress: tcpipAddr(remote), RemotePort: binary.BigEndian.Uint16(k.ports[2:]),
	}
	ep, ok := s.st.FindTransportEndpoint(protocolOf(local), tcp.ProtocolNumber, id, nicID).(tcpip.Endpoint)
	if ok && tcp.EndpointState(ep.State()) == tcp.StateEstablished {
		s.restart(ep)
	}
}
