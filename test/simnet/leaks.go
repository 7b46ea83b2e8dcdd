package simnet

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
	"time"
)

// ownCode marks the goroutines that NoLeaks looks at: the runtime's and other
// libraries' may start one whenever they like.
const ownCode = "github.com/anytun-go/anytun/"

// NoLeaks fails the test if, when it and its other cleanups have ended, a
// goroutine of this module runs that did not run at the time of the call. Call it
// first. It can't tell the goroutines of parallel tests apart, unless the test
// runs in a synctest bubble: then only those of the bubble count.
func NoLeaks(t testing.TB) {
	t.Helper()
	before := make(map[string]bool)
	for _, g := range goroutines() {
		before[g.id] = true
	}
	t.Cleanup(func() {
		t.Helper()
		// A goroutine that has told its owner that it is done may need
		// a moment more.
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		var left []string
		for range 200 {
			if left = leaked(before); len(left) == 0 {
				return
			}
			<-tick.C
		}
		t.Errorf("%d goroutines leaked:\n\n%s", len(left), strings.Join(left, "\n\n"))
	})
}

func leaked(before map[string]bool) []string {
	var left []string
	all := goroutines()
	self := all[0]
	for _, g := range all[1:] {
		if before[g.id] || !strings.Contains(g.stack, ownCode) || self.bubble != "" && g.bubble != self.bubble {
			continue
		}
		left = append(left, g.stack)
	}
	return left
}

type goroutine struct{ id, bubble, stack string }

// goroutines lists all, the caller's first.
func goroutines() []goroutine {
	buf := make([]byte, 1<<16)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	var all []goroutine
	for _, stack := range bytes.Split(buf, []byte("\n\n")) {
		// goroutine 7 [chan receive (durable), synctest bubble 3]:
		head, _, _ := strings.Cut(string(stack), "\n")
		g := goroutine{stack: string(stack)}
		g.id, _, _ = strings.Cut(strings.TrimPrefix(head, "goroutine "), " ")
		if _, bubble, ok := strings.Cut(head, "synctest bubble "); ok {
			g.bubble, _, _ = strings.Cut(strings.TrimRight(bubble, "]:"), ",")
		}
		all = append(all, g)
	}
	return all
}
