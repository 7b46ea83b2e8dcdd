package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Which congestion control a connection has.
//
// CUBIC is for long paths, where Reno needs minutes to fill what a loss has
// emptied. On short ones the two grow alike (RFC 9438 section 4.3), but gVisor's
// CUBIC leaves slow start by HyStart as soon as the acknowledgements of one round
// take longer than half a round trip. With a round trip below a millisecond one
// super-segment takes that long, so a window that should be a thousand segments
// stays at a hundred and grows by one each round trip, for seconds. So connections
// whose path is short begin with Reno, which leaves slow start at the first loss,
// and those whose path has become long, since the client or the servers' routes
// have moved, change to CUBIC. A change starts the congestion control anew, as if
// the connection had just been made.

const (
	ccReno  = tcpip.CongestionControlOption("reno")
	ccCubic = tcpip.CongestionControlOption("cubic")

	// A path is short below shortRTT and long above longRTT. In between a
	// connection keeps what it has.
	shortRTT = 5 * time.Millisecond
	longRTT  = 20 * time.Millisecond

	// checkPath is how many bytes a connection writes between two looks at how
	// long its path is.
	checkPath = 1 << 20
)

// setCongestionControl chooses for a new connection. The stack's default is CUBIC.
func setCongestionControl(ep tcpip.Endpoint) {
	if rtt := smoothedRTT(ep); rtt > 0 && rtt < shortRTT {
		cc := ccReno
		_ = ep.SetSockOpt(&cc) // fails on names it doesn't know only
	}
}

// reviewCongestionControl looks whether a connection's path has become long. Until
// the first loss gVisor's smoothed round-trip time stays what it was: Reno's window
// grows without end then, and gVisor smooths over half a window of samples.
func reviewCongestionControl(ep tcpip.Endpoint, rtt time.Duration) {
	if rtt <= longRTT {
		return
	}
	var have tcpip.CongestionControlOption
	if err := ep.GetSockOpt(&have); err == nil && have == ccReno {
		cc := ccCubic
		_ = ep.SetSockOpt(&cc)
	}
}

// smoothedRTT is 0 if there was no sample yet.
func smoothedRTT(ep tcpip.Endpoint) time.Duration {
	var info tcpip.TCPInfoOption
	if err := ep.GetSockOpt(&info); err != nil {
		return 0
	}
	return info.RTT
}
