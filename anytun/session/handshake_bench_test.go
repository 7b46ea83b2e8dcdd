package session

import (
	"testing"

	"github.com/anytun-go/anytun/anytun/wire"
)

// BenchmarkHandshake is a server's part of a handshake, the costliest message
// that a stranger can send, without the deriving of the session.
func BenchmarkHandshake(b *testing.B) {
	c := newTestCluster(b)
	i, err := NewInitiator(c.Public(), newKey(b), bothCiphers, nil, start)
	if err != nil {
		b.Fatal(err)
	}
	m, err := wire.ParseInitiation(i.Message())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		a, err := c.Accept(m)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := a.Respond(wire.Grant{Client: 1, Server: 1, KeepAlive: 20, MTU: 1400}, true, start); err != nil {
			b.Fatal(err)
		}
	}
}
