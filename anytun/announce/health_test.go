package announce

import (
	"errors"
	"testing"
)

func TestHealth(t *testing.T) {
	for _, tt := range []struct {
		name       string
		fall, rise int
		// checks: + passed, - failed; verdicts after each: ? unknown, h healthy, s sick
		checks, verdicts string
	}{
		{"one success is enough at the start", 3, 2, "+", "h"},
		{"failures at the start", 3, 2, "---", "??s"},
		{"success between failures at the start", 3, 2, "--+", "??h"},
		{"falls after three in a row", 3, 2, "+---", "hhhs"},
		{"a success between starts the count anew", 3, 2, "+--+--+---", "hhhhhhhhhs"},
		{"rises after two in a row", 3, 2, "+---++", "hhhssh"},
		{"a failure between starts the count anew", 3, 2, "+---+-+-++", "hhhssssssh"},
		{"at once", 1, 1, "+-+-", "hshs"},
		{"falls again", 2, 3, "+--+++--", "hhssshhs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := health{fall: tt.fall, rise: tt.rise}
			var got []byte
			for _, c := range tt.checks {
				var err error
				if c == '-' {
					err = errors.New("failed")
				}
				h.result(err)
				switch {
				case !h.known:
					got = append(got, '?')
				case h.healthy:
					got = append(got, 'h')
				default:
					got = append(got, 's')
				}
				if !h.healthy && h.why == nil {
					t.Error("sick for no reason")
				}
				if h.healthy && c == '+' && h.why != nil {
					t.Errorf("healthy and well, but %v", h.why)
				}
			}
			if string(got) != tt.verdicts {
				t.Errorf("checks %s: verdicts %s, want %s", tt.checks, got, tt.verdicts)
			}
		})
	}
}
