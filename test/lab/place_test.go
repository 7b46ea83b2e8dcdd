//go:build linux

package lab

import (
	"net/netip"
	"testing"
)

// scenarios are what has to work in both places, each with programs that this
// project didn't write.
var scenarios = []struct {
	name string
	test func(*testing.T, *place)
}{
	{"curl", testCurl},
	{"ssh", testSSH},
	{"git", testGit},
	{"chromium", testChromium},
	{"proxychains", testProxychains},
	{"dig", testDig},
	{"python", testPython},
	{"malformed", testMalformed},
}

// TestLoopback: one process, no server, no configuration, nothing but a
// loopback interface.
func TestLoopback(t *testing.T) {
	p := loopback(t)
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) { s.test(t, p) })
	}
}

// TestLab: client and server on different hosts, the client behind a NAT.
func TestLab(t *testing.T) {
	n := lab(t, netip.AddrPortFrom(srv4, serverPort).String())
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) { s.test(t, n.place) })
	}
	t.Run("no DNS packet leaves", func(t *testing.T) { testNoDNS(t, n) })
	t.Run("replies", func(t *testing.T) { testReplies(t, n) })
	t.Run("hostile datagrams", func(t *testing.T) { testHostileDatagrams(t, n) })
}

// TestLabIPv6: the same tunnel over IPv6, through a NAT for IPv6.
func TestLabIPv6(t *testing.T) {
	n := lab(t, netip.AddrPortFrom(srv6, serverPort).String())
	t.Run("dig", func(t *testing.T) { testDig(t, n.place) })
	t.Run("python", func(t *testing.T) { testPython(t, n.place) })
}
