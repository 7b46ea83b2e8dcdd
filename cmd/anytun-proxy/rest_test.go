package main

import (
	"testing"
	"time"
)

func TestRest(t *testing.T) {
	var r rest
	now := time.Unix(1e9, 0)
	var packets uint64
	look := func(what string, moved uint64, want bool) {
		t.Helper()
		now = now.Add(restLook)
		packets += moved
		if got := r.due(packets, now); got != want {
			t.Fatalf("%s: %v, want %v", what, got, want)
		}
		if want {
			r.done(now, now.Add(50*time.Millisecond))
		}
	}
	look("nothing has happened", 0, false)
	look("little has happened", restQuiet, false)
	look("still nothing", 0, false)
	look("busy", 100000, false)
	look("busy", restQuiet+1, false)
	look("quiet", restQuiet, true)
	look("it is done", 0, false)
	look("busy again", restWorth, false)
	look("quiet, but it was done only just now", 0, false)
	for range 5 {
		look("the same", 0, false)
	}
	look("quiet, and 2.5 s after the 50 ms it took", 0, true)
	look("it is done", 0, false)
	for range restWorth / restQuiet {
		look("a little all the time", restQuiet, false)
	}
	now = now.Add(time.Minute)
	look("which has become much", restQuiet, true)
}
