package netstack

import (
	"io"
	"testing"
	"time"

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

// TestCongestionControl: a short path has Reno, a long one CUBIC, and one that
// becomes long changes.
func TestCongestionControl(t *testing.T) {
	p := newPair(t)
	p.up.mu.Lock()
	p.up.tap = func([][]byte) { time.Sleep(longRTT) }
	p.up.mu.Unlock()
	far, _ := p.connect(t, server4)
	p.up.mu.Lock()
	p.up.tap = nil
	p.up.mu.Unlock()
	near, _ := p.connect(t, server4)
	for _, tt := range []struct {
		c    *Conn
		rtt  time.Duration
		want tcpip.CongestionControlOption
	}{
		{far, 0, ccCubic},
		{far, time.Millisecond, ccCubic}, // a change would cost it its window
		{near, 0, ccReno},
		{near, longRTT, ccReno},
		{near, longRTT + 1, ccCubic},
		{near, time.Millisecond, ccCubic},
	} {
		reviewCongestionControl(tt.c.ep, tt.rtt)
		if cc := congestionControlOf(t, tt.c); cc != tt.want {
			t.Errorf("far %v, after a look at %v: %s, want %s", tt.c == far, tt.rtt, cc, tt.want)
		}
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
