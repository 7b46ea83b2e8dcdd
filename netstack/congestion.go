package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Which congestion control a connection has.
//
// CUBIC is for long paths, where Reno needs minutes to fill what congestion has
// emptied; on short ones the two grow alike (RFC 9438 section 4.3). But gVisor's
// CUBIC leaves slow start by HyStart, which takes much for a queue that is none:
// acknowledgements of one round that take longer than half a round trip, as those
// of a single super-segment do where that is below a millisecond, and those that
// come late since a loss was mended (resend.go). A window that should be a
// thousand segments then stays at a hundred and grows by one each round trip, for
// minutes. So every connection begins with Reno, the stack's default, which leaves
// slow start at the first loss that gVisor is told of; one that has met congestion
// on a long path changes to CUBIC, which starts its congestion control anew, as if
// it had just been made.

const (
	ccReno  = tcpip.CongestionControlOption("reno")
	ccCubic = tcpip.CongestionControlOption("cubic")

	// longRTT is what makes a path long.
	longRTT = 20 * time.Millisecond

	// checkPath is how many bytes a connection writes between two looks at its
	// path.
	checkPath = 1 << 20

	// noThreshold is less than the slow-start threshold before the first loss.
	noThreshold = 1 << 31
)

// reviewCongestionControl is for one that writes much. Before the first loss the
// smoothed round-trip time stays what it was: Reno's window grows without end
// then, and gVisor smooths over half a window of samples.
func reviewCongestionControl(ep tcpip.Endpoint) {
	var info tcpip.TCPInfoOption
	if err := ep.GetSockOpt(&info); err != nil || !needsCubic(&info) {
		return
	}
	var have tcpip.CongestionControlOption
	if err := ep.GetSockOpt(&have); err == nil && have == ccReno {
		cc := ccCubic
		_ = ep.SetSockOpt(&cc) // fails on names it doesn't know only
	}
}

// needsCubic says whether a connection has met congestion on a long path, and has
// recovered: at the end of a recovery gVisor sets the window to the threshold,
// which would be infinite.
func needsCubic(i *tcpip.TCPInfoOption) bool {
	return i.RTT > longRTT && i.SndSsthresh < noThreshold && i.CcState == tcpip.Open
}
