package netstack

import (
	"testing"
)

func TestTransfer(t *testing.T) {
	p := newPair(t)
	for _, at := range []string{"v4", "v6"} {
		t.Run(at, func(t *testing.T) {
			to := server4
			if at == "v6" {
				to = server6
			}
			c, s := p.connect(t, to)
			transfer(t, c, s, 8<<20)
			c.Close()
			s.Close()
		})
	}
	t.Logf("%+v", p.server.Stats())
}
