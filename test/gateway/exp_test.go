package gateway

import (
	"testing"
	"time"

	"github.com/anytun-go/anytun/test/simnet"
)

func TestExp(t *testing.T) {
	d := 10 * time.Millisecond
	for _, c := range []struct {
		name     string
		link     simnet.Link
		down, up int
		blackout time.Duration
	}{
		{"clean down", simnet.Link{Delay: d}, 16 << 20, 1, 0},
		{"loss .1% down", simnet.Link{Delay: d, Loss: 0.001}, 16 << 20, 1, 0},
		{"loss 1% down", simnet.Link{Delay: d, Loss: 0.01}, 4 << 20, 1, 0},
		{"loss .1% up", simnet.Link{Delay: d, Loss: 0.001}, 1, 16 << 20, 0},
		{"reorder down", simnet.Link{Delay: d, Reorder: 0.02}, 16 << 20, 1, 0},
		{"jitter down", simnet.Link{Delay: d, Jitter: 2 * time.Millisecond}, 16 << 20, 1, 0},
		{"blackout down", simnet.Link{Delay: d}, 32 << 20, 1, 300 * time.Millisecond},
		{"blackout up", simnet.Link{Delay: d}, 1, 32 << 20, 300 * time.Millisecond},
	} {
		g := start(t)
		to := destination(t)
		g.host.SetLinks(c.link, c.link)
		t0 := time.Now()
		if c.blackout > 0 {
			go func() {
				time.Sleep(300 * time.Millisecond)
				lossy := simnet.Link{Delay: d, Loss: 1}
				g.host.SetLinks(lossy, lossy)
				time.Sleep(c.blackout)
				g.host.SetLinks(c.link, c.link)
			}()
		}
		g.exchange(t, to, c.down, c.up)
		t.Log(c.name, time.Since(t0).Milliseconds(), "ms")
	}
}
