//go:build unix

package proxy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestListen(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0", "localhost:0"} {
		l, err := Listen(t.Context(), address)
		if err != nil {
			if strings.Contains(address, "::1") && errors.Is(err, syscall.EADDRNOTAVAIL) {
				t.Logf("this host has no IPv6 loopback: %v", err)
				continue
			}
			t.Errorf("%s: %v", address, err)
			continue
		}
		c, err := net.Dial("tcp", strings.Replace(l.Addr().String(), "[::]", "127.0.0.1", 1))
		if err != nil {
			t.Errorf("%s: %v", address, err)
		} else {
			c.Close()
		}
		l.Close()
	}
}

func TestListenErrors(t *testing.T) {
	busy, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	notSocket, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer notSocket.Close()
	for _, tt := range []struct{ address, want string }{
		{busy.Addr().String(), "choose another port"},
		{"nonsense", "write 127.0.0.1:1080"},
		{"127.0.0.1:http", "from 0 to 65535"},
		{"127.0.0.1:99999", "from 0 to 65535"},
		{"example.com:1080", "in numbers"},
		{"192.0.2.1:0", "choose one of its own"},
		{"unix://relative", "write unix:///path"},
		{"unix://" + file, "is no socket"},
		{"unix:///nowhere/at/all", "directory that exists"},
		{"unix:///" + strings.Repeat("x", 200), "too long"},
		{"fd://2", "fd://3"},
		{"fd://x", "fd://3"},
		{"fd://60000", "not a listening socket"},
		{fmt.Sprintf("fd://%d", notSocket.Fd()), "not a listening socket"},
	} {
		l, err := Listen(t.Context(), tt.address)
		if err == nil {
			l.Close()
			t.Errorf("%s: no error", tt.address)
			continue
		}
		if s := err.Error(); !strings.Contains(s, tt.want) || !strings.HasPrefix(s, "listen on "+tt.address+": ") ||
			strings.Contains(s, "\n") {
			t.Errorf("%s: %q, want %q in it", tt.address, s, tt.want)
		}
	}
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proxy.sock")
	address := "unix://" + path
	l, err := Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	if _, err := Listen(t.Context(), address); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the second try removed the socket: %v", err)
	}
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there after Close: %v", err)
	}

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err = Listen(t.Context(), address)
	if err != nil {
		t.Fatalf("a stale socket is in the way: %v", err)
	}
	l.Close()
}

func TestListenFD(t *testing.T) {
	first, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	f, err := first.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	// Listen takes the descriptor over, so it gets one that no os.File will close again.
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	l, err := Listen(t.Context(), fmt.Sprintf("fd://%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Addr().String() != first.Addr().String() {
		t.Errorf("listens on %v, want %v", l.Addr(), first.Addr())
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
