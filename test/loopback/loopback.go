// Package loopback finds addresses for servers that a test must know before
// they listen.
package loopback

import (
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
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
