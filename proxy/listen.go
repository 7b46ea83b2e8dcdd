package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// socketMode keeps other users of the host away from a unix socket.
const socketMode = 0o600

// listenKeepAlive finds applications that vanished without a word, at one probe a minute while nothing moves.
var listenKeepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// Listen opens one port for Server.Serve. The address is
//
//	127.0.0.1:1080, [::1]:1080, :1080   TCP; without an address on all of the host's; port 0 lets the kernel choose
//	unix:///path                        a unix socket, mode 0600; a socket that nobody listens on is replaced
//	fd://3                              a listening socket this process was started with (socket activation)
//
// Host names are not looked up, except localhost. An error is one sentence that says what to do.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	var l net.Listener
	var err error
	switch {
	case strings.HasPrefix(address, "unix://"):
		l, err = listenUnix(ctx, strings.TrimPrefix(address, "unix://"))
	case strings.HasPrefix(address, "fd://"):
		l, err = listenFD(strings.TrimPrefix(address, "fd://"))
	default:
		l, err = listenTCP(ctx, address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return l, nil
}

func listenTCP(ctx context.Context, address string) (net.Listener, error) {
	host, p, err := net.SplitHostPort(address)
	if err != nil {
		return nil, errors.New("not an address; write 127.0.0.1:1080, [::1]:1080, unix:///path or fd://3")
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%q is not a port; write a number from 0 to 65535", p)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	if host != "" {
		if _, err := netip.ParseAddr(host); err != nil {
			return nil, fmt.Errorf("%q is not an address of this host; write one in numbers, such as 127.0.0.1", host)
		}
	}
	var lc net.ListenConfig
	keepAliveOnListener(&lc)
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, p))
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, errInUse):
		return nil, fmt.Errorf("another program uses this port; end it or choose another port: %w", syscall.EADDRINUSE)
	case errors.Is(err, errNotAvailable):
		return nil, fmt.Errorf("this host has no such address; choose one of its own or 127.0.0.1: %w", syscall.EADDRNOTAVAIL)
	case errors.Is(err, errForbidden):
		return nil, fmt.Errorf("port %d needs privileges; choose one from 1024 up: %w", port, syscall.EACCES)
	}
	return nil, err
}

func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if !strings.HasPrefix(path, "/") {
		return nil, errors.New("not an absolute path; write unix:///path")
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: limitSocketMode}
	l, err := lc.Listen(ctx, "unix", path)
	switch {
	case errors.Is(err, syscall.EINVAL):
		return nil, fmt.Errorf("the path is too long for a socket; choose one of at most 100 bytes: %w", syscall.EINVAL)
	case err != nil:
		return nil, fmt.Errorf("the socket can't be made; choose a directory that exists and is yours: %w", err)
	}
	if err := os.Chmod(path, socketMode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil // it removes its file when closed
}

// removeStale removes a socket that a process left behind, and nothing else.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return errors.New("there is a file that is no socket; choose another path or remove it")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("another program listens there; end it or choose another path: %w", syscall.EADDRINUSE)
	case errors.Is(err, errRefused):
		return os.Remove(path)
	}
	return fmt.Errorf("there is a socket that can't be checked; choose another path or remove it: %w", err)
}

func listenFD(number string) (net.Listener, error) {
	fd, err := strconv.ParseUint(number, 10, 16)
	if err != nil || fd < 3 {
		return nil, errors.New("not the number of an inherited socket; write fd://3 or above")
	}
	if !isListening(uintptr(fd)) {
		return nil, fmt.Errorf("file descriptor %d is not a listening socket; let the service manager pass one", fd)
	}
	f := os.NewFile(uintptr(fd), "fd://"+number)
	defer f.Close() // the listener has its own copy
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d is not a TCP or unix socket: %w", fd, err)
	}
	return l, nil
}

// passing says whether an accept that failed may work later.
func passing(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
