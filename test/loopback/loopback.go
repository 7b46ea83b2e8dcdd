// Package loopback has what tests on this host's own addresses need: connections,
// and addresses for servers that a test must know before they listen.
package loopback

import (
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"
)

// Addr returns a TCP address of this host that stays free until the test uses
// it, and again after a restart. A port that the kernel chose and the test gave
// back may be chosen for any other socket in between, so these are from below
// the ports that the kernel chooses from, and on Linux, where all of 127.0.0.0/8
// is this host, from addresses that hardly two tests share.
func Addr(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		host := "127.0.0.1"
		if runtime.GOOS == "linux" {
			host = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
		}
		addr := fmt.Sprintf("%s:%d", host, 16384+rand.IntN(16384))
		l, failed := net.Listen("tcp", addr)
		if failed == nil {
			l.Close()
			return addr
		}
		err = failed
	}
	t.Fatal("no free address: ", err)
	return ""
}

// TCPPair returns two ends of one TCP connection, with a deadline of 10 s, which
// the end of the test closes.
func TCPPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ca, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	cb, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{ca, cb} {
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return ca.(*net.TCPConn), cb.(*net.TCPConn)
}
