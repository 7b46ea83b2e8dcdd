package splice

import (
	"io"
	"net"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/anytun-go/anytun/test/loopback"
)

// segmentsIn is how many segments with data or a FIN a socket has received.
func segmentsIn(t *testing.T, c *net.TCPConn) (n uint32) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err2 := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Segs_in
		}
	})
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	return n
}

// The last bytes of a stream and its end leave as one segment, when both are there.
func TestCopyEnd(t *testing.T) {
	app, a := loopback.TCPPair(t)
	near, far := stackPair(t)
	if near.Ended() {
		t.Error("a new stream has ended")
	}
	want := make([]byte, 1000)
	if _, err := far.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := far.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for !near.Ended() {
		runtime.Gosched()
	}
	before := segmentsIn(t, app)
	if err := Copy(a, NewReader(near), nil, uncounted); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(app); len(got) != len(want) || err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := segmentsIn(t, app) - before; n != 1 {
		t.Errorf("%d segments, want 1", n)
	}
}
