package main

import (
	"strings"
	"testing"
)

func TestByName(t *testing.T) {
	for _, name := range []string{"down1", "up64", "open10000", "conn32", "keep1", "echo64", "udpup1200", "udpdown1200", "mem"} {
		if _, err := (test{}).byName(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "down", "down0", "8", "sideways1", "mem1000", "down-1"} {
		if _, err := (test{}).byName(name); err == nil {
			t.Errorf("%q is a test", name)
		}
	}
}

func TestRunSays(t *testing.T) {
	for _, args := range [][]string{nil, {"sing"}, {"run", "-test", "sideways"}, {"run", "-client", "x"}, {"report"}, {"report", "/no/such/file"}} {
		var out strings.Builder
		if err := run(args, &out); err == nil || out.Len() > 0 {
			t.Errorf("%v: no error, or output %q", args, out.String())
		}
	}
}
