package netstack

import (
	"io"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
)

func congestionControlOf(t *testing.T, c *Conn) tcpip.CongestionControlOption {
	t.Helper()
	var cc tcpip.CongestionControlOption
	if err := c.ep.GetSockOpt(&cc); err != nil {
		t.Fatal(err)
	}
	return cc
}

// TestCongestionControl: a connection begins with Reno, and changes once it has met
// congestion on a long path.
func TestCongestionControl(t *testing.T) {
	p := newPair(t)
	c, _ := p.connect(t, server4)
	if cc := congestionControlOf(t, c); cc != ccReno {
		t.Errorf("a new connection has %s", cc)
	}
	reviewCongestionControl(c.ep)
	if cc := congestionControlOf(t, c); cc != ccReno {
		t.Errorf("nothing has happened, but it has %s", cc)
	}
	const never = 1<<32 - 1
	for _, tt := range []struct {
		info tcpip.TCPInfoOption
		want bool
	}{
		{tcpip.TCPInfoOption{RTT: 10 * longRTT, SndSsthresh: never}, false},
		{tcpip.TCPInfoOption{RTT: longRTT, SndSsthresh: 100}, false},
		{tcpip.TCPInfoOption{RTT: longRTT + 1, SndSsthresh: 100, CcState: tcpip.SACKRecovery}, false},
		{tcpip.TCPInfoOption{RTT: longRTT + 1, SndSsthresh: 100}, true},
	} {
		if got := needsCubic(&tt.info); got != tt.want {
			t.Errorf("%+v: %v, want %v", tt.info, got, tt.want)
		}
	}
	var info tcpip.TCPInfoOption
	if err := c.ep.GetSockOpt(&info); err != nil || info.SndSsthresh != never {
		t.Errorf("the threshold of a new connection is %d (%v)", info.SndSsthresh, err)
	}
}

// TestCongestionControlReviewed: a connection that writes looks at its path.
func TestCongestionControlReviewed(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server4)
	go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{s}) }()
	for range 3 {
		if _, err := c.Write(make([]byte, checkPath/2)); err != nil {
			t.Fatal(err)
		}
	}
	if c.written != checkPath/2 {
		t.Errorf("%d bytes since the last look, want %d", c.written, checkPath/2)
	}
}
