//go:build linux

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	manyConnections = 10_000
	echoPort        = 7007
	// maxMemoryPerConnection is the client's for one idle connection, in bytes.
	maxMemoryPerConnection = 60_000
)

// TestManyConnections: ten thousand connections through one client process, open
// at once, each of them alive, at a bounded cost in memory.
func TestManyConnections(t *testing.T) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if files.Max < manyConnections+500 {
		t.Skipf("one process may open only %d files here", files.Max)
	}
	n := lab(t, netip.AddrPortFrom(srv4, serverPort).String())
	n.dst.start(t, "echo", helper(t, "echo", strconv.Itoa(echoPort))...).listening(t, "tcp", echoPort)
	before, serverBefore := n.proxy.rss(t), n.server.rss(t)

	holder := n.client.talk(t, helper(t, "hold", proxyAddr, netip.AddrPortFrom(dst4, echoPort).String(), strconv.Itoa(manyConnections))...)
	began := time.Now()
	if got, want := holder.hear(3*time.Minute), fmt.Sprintf("open %d", manyConnections); got != want {
		t.Fatalf("%q, want %q", got, want)
	}
	t.Logf("%d connections opened and tried in %.1f s", manyConnections, time.Since(began).Seconds())
	after, serverAfter := n.proxy.rss(t), n.server.rss(t)
	each := (after - before) / manyConnections
	t.Logf("memory per idle connection: client %d bytes (%d MB in all), server %d bytes (%d MB in all)",
		each, after>>20, (serverAfter-serverBefore)/manyConnections, serverAfter>>20)
	if each > maxMemoryPerConnection {
		t.Errorf("%d bytes of client memory per idle connection, want at most %d", each, maxMemoryPerConnection)
	}
	// One byte each way on every one of them, while all the others are open.
	holder.say("again")
	if got, want := holder.hear(3*time.Minute), fmt.Sprintf("alive %d", manyConnections); got != want {
		t.Fatalf("%q, want %q", got, want)
	}
	holder.say("end")
	// Closed by the application, they must all be given back.
	eventually(t, time.Minute, func() error {
		open, err := openFiles(n.proxy.pid())
		if err != nil {
			return err
		}
		if open > 200 {
			return fmt.Errorf("anytun-proxy still has %d files open", open)
		}
		return nil
	})
	eventually(t, time.Minute, func() error {
		open, err := openFiles(n.server.pid())
		if err != nil {
			return err
		}
		if open > 200 {
			return fmt.Errorf("anytun-server still has %d files open", open)
		}
		return nil
	})
}

func openFiles(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries), err
}

// helper is the command line of this test binary as one of its helpers.
func helper(t *testing.T, name string, args ...string) []string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return append([]string{"env", helperEnv + "=" + name, self}, args...)
}

func runHelper(name string, args []string) error {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	files.Cur = files.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	switch {
	case name == "echo" && len(args) == 1:
		return echo(":" + args[0])
	case name == "hold" && len(args) == 3:
		count, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return hold(args[0], args[1], count)
	case name == "load" && len(args) == 1:
		return runLoad(args[0])
	case name == "sink" && len(args) == 1:
		return runSink(args[0])
	case name == "kernel":
		return runKernel(args)
	case clusterHelpers[name] != nil:
		return clusterHelpers[name](args)
	}
	return fmt.Errorf("no such helper: %v", args)
}

// echo sends back what it gets, byte for byte.
func echo(at string) error {
	l, err := net.Listen("tcp", at)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go echoConn(c)
	}
}

func echoConn(c net.Conn) {
	defer c.Close()
	one := make([]byte, 1)
	for {
		if _, err := io.ReadFull(c, one); err != nil {
			return
		}
		if _, err := c.Write(one); err != nil {
			return
		}
	}
}

// hold opens count connections to an echo through a SOCKS proxy, sends a byte
// over each and says how many answered; again whenever a line comes, until the
// line "end".
func hold(proxy, to string, count int) error {
	target, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	conns := make([]net.Conn, count)
	err = each(conns, func(i int) error {
		var err error
		if conns[i], err = dialSOCKS(proxy, target); err != nil {
			return err
		}
		return roundTrip(conns[i], i)
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, "open", count)
	for in := bufio.NewScanner(os.Stdin); in.Scan() && in.Text() != "end"; {
		if err := each(conns, func(i int) error { return roundTrip(conns[i], i+1) }); err != nil {
			return err
		}
		fmt.Fprintln(os.Stdout, "alive", count)
	}
	return nil
}

// each calls f for every index, a hundred at a time, and returns the first error.
func each(conns []net.Conn, f func(i int) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var wg sync.WaitGroup
	next := make(chan int)
	for range 100 {
		wg.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					cancel(fmt.Errorf("connection %d: %w", i, err))
					return
				}
			}
		})
	}
	for i := range conns {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return nil
}

func roundTrip(c net.Conn, i int) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	b := []byte{byte(i)}
	if _, err := c.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if b[0] != byte(i) {
		return errors.New("another byte came back")
	}
	return nil
}

// dialSOCKS is the shortest SOCKS5 client: no authentication, an IPv4 target.
func dialSOCKS(proxy string, to netip.AddrPort) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", proxy, time.Minute)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	a := to.Addr().As4()
	request := append([]byte{5, 1, 0, 5, 1, 0, 1}, a[:]...)
	if _, err := c.Write(append(request, byte(to.Port()>>8), byte(to.Port()))); err != nil {
		return nil, err
	}
	reply := make([]byte, 2+4)
	if _, err := io.ReadFull(c, reply); err != nil {
		return nil, err
	}
	if reply[3] != 0 {
		return nil, fmt.Errorf("reply %d", reply[3])
	}
	bound := 4 + 2
	if reply[5] == 4 {
		bound = 16 + 2
	}
	_, err = io.ReadFull(c, make([]byte, bound))
	return c, err
}
