//go:build linux

package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestClusterNetwork: the network of the cluster does what the tests of the
// servers rely on, shown with BIRD and a UDP echo in the place of each server.
func TestClusterNetwork(t *testing.T) {
	c := newCluster3(t, cluster3Options{StandIns: true})
	t.Log(c.atCore.describe(c))
	ask := func(t *testing.T, from *host, to netip.Addr, n int) map[string]int {
		t.Helper()
		out := from.run(t, 60*time.Second, helper(t, "ask", netip.AddrPortFrom(to, serverPort).String(), fmt.Sprint(n))...)
		found := make(map[string]int)
		for _, name := range strings.Fields(out) {
			found[name]++
		}
		return found
	}
	t.Run("ecmp", func(t *testing.T) {
		for _, to := range []netip.Addr{service4, service6, egress4, egress6} {
			before := c.counts(t)
			t.Log(to, ask(t, c.dst, to, 60), sharesOf(before, c.counts(t)))
			t.Log(to, ask(t, c.app, to, 60), sharesOf(before, c.counts(t)))
			t.Log(to, ask(t, c.dst2, to, 60), sharesOf(before, c.counts(t)))
		}
	})
}
