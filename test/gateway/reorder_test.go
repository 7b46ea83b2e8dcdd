package gateway

import (
	"testing"
	"time"

	"github.com/anytun-go/anytun/test/simnet"
)

// reorderLimit is some twenty times what the slowest case takes on an idle
// machine, and less than any of those with much reordering took before the
// netstack knew it from loss.
const reorderLimit = 40 * time.Second

// Paths that reorder, always or a little, with and without loss, and an outage
// in the middle: everything arrives, and not for ever later. The figures in the
// log are worth a look on an idle machine.
func TestReordering(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name   string
		link   simnet.Link
		size   int
		outage time.Duration
	}{
		{"none", simnet.Link{Delay: ms}, 16 << 20, 0},
		{"some 1 ms late", simnet.Link{Delay: ms, Reorder: 0.02}, 16 << 20, 0},
		{"some 3 ms late", simnet.Link{Delay: 10 * ms, Reorder: 0.02, ReorderDelay: 3 * ms}, 16 << 20, 0},
		{"two roads", simnet.Link{Delay: 10 * ms, Reorder: 0.5, ReorderDelay: 8 * ms}, 16 << 20, 0},
		{"all up to 2 ms late", simnet.Link{Delay: ms, Jitter: 2 * ms}, 16 << 20, 0},
		{"all up to 10 ms late", simnet.Link{Delay: 20 * ms, Jitter: 10 * ms}, 8 << 20, 0},
		{"with loss", simnet.Link{Delay: ms, Jitter: 2 * ms, Loss: 0.005}, 2 << 20, 0},
		{"loss alone", simnet.Link{Delay: ms, Loss: 0.01}, 4 << 20, 0},
		{"outage", simnet.Link{Delay: 10 * ms}, 32 << 20, 300 * ms},
		{"outage and reordering", simnet.Link{Delay: 10 * ms, Jitter: 5 * ms}, 16 << 20, 300 * ms},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := start(t)
			to := destination(t)
			g.host.SetLinks(c.link, c.link)
			for _, dir := range []struct {
				name     string
				down, up int
			}{{"down", c.size, 0}, {"up", 0, c.size}} {
				began := time.Now()
				done := make(chan struct{})
				go func() { defer close(done); g.exchange(t, to, dir.down, dir.up) }()
				if c.outage > 0 {
					time.Sleep(100 * ms)
					cut := c.link
					cut.Loss = 1
					g.host.SetLinks(cut, cut)
					time.Sleep(c.outage)
					g.host.SetLinks(c.link, c.link)
				}
				<-done
				took := time.Since(began)
				t.Logf("%-22s %-4s %2d MiB in %6.2f s: %6.1f MB/s", c.name, dir.name, c.size>>20, took.Seconds(),
					float64(c.size)/1e6/took.Seconds())
				if took > reorderLimit {
					t.Errorf("%s took %v", dir.name, took)
				}
			}
		})
	}
}
