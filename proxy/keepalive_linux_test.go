package proxy

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// Accepted connections have the keep-alive of the listening socket.
func TestKeepAliveInherited(t *testing.T) {
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	raw, err := a.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	want := [][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
	}
	if err := raw.Control(func(fd uintptr) {
		for _, o := range want {
			if v, err := unix.GetsockoptInt(int(fd), o[0], o[1]); err != nil || v != o[2] {
				t.Errorf("option %d/%d is %d, %v; want %d", o[0], o[1], v, err, o[2])
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
}
