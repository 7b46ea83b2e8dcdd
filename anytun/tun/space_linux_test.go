package tun

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a test waits for what should take milliseconds.
const patience = 60 * time.Second

// space is a network namespace without a name: it ends with the test.
type space struct {
	t  testing.TB
	ns *os.File
}

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{t: t}
	var err error
	thread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			s.ns, err = os.Open("/proc/thread-self/ns/net")
		}
	})
	if errors.Is(err, unix.EPERM) && os.Getenv("ANYTUN_REQUIRE") == "" {
		t.Skip("network namespaces need root")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ns.Close() })
	s.run("ip link set lo up")
	return s
}

// thread runs f on a thread that ends with it, since it is no longer like the others.
func thread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// do runs f in the namespace. What f opens stays there.
func (s *space) do(f func() error) {
	s.t.Helper()
	var err error
	thread(func() {
		if err = unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET); err == nil {
			err = f()
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// run runs shell commands in the namespace and returns what they print.
func (s *space) run(script string) string {
	s.t.Helper()
	var out []byte
	s.do(func() (err error) {
		if out, err = exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return nil
	})
	return string(out)
}

// join connects two namespaces.
func (s *space) join(name string, other *space, otherName string) {
	s.t.Helper()
	s.do(func() error {
		cmd := exec.Command("ip", "link", "add", name, "type", "veth", "peer", "name", otherName, "netns", "/proc/self/fd/3")
		cmd.ExtraFiles = []*os.File{other.ns}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("join: %w: %s", err, out)
		}
		return nil
	})
	for at, n := range map[*space]string{s: name, other: otherName} {
		at.run("sysctl -qw net.ipv6.conf." + n + ".accept_dad=0; ip link set " + n + " up")
	}
}

// addr adds an address that can be used at once. (IPv6 looks for duplicates
// first, in the background; meanwhile the kernel takes ::1 for source.)
func (s *space) addr(p netip.Prefix, dev string) {
	s.t.Helper()
	nodad := ""
	if p.Addr().Is6() {
		nodad = " nodad"
	}
	s.run("ip addr add " + p.String() + " dev " + dev + nodad)
}

// reach waits until the hosts answer: links and neighbours take their time, and
// lose packets meanwhile.
func (s *space) reach(addrs ...string) {
	s.t.Helper()
	for _, a := range addrs {
		s.run("for i in $(seq 60); do ping -n -c 1 -W 1 " + a + " >/dev/null 2>&1 && exit 0; sleep 0.1; done; echo no answer; exit 1")
	}
}

func (s *space) listen(addr string) net.Listener {
	s.t.Helper()
	var l net.Listener
	s.do(func() (err error) { l, err = net.Listen("tcp", addr); return })
	s.t.Cleanup(func() { l.Close() })
	return l
}

func (s *space) dial(addr string) net.Conn {
	s.t.Helper()
	var c net.Conn
	s.do(func() (err error) {
		d := net.Dialer{Timeout: patience}
		c, err = d.Dial("tcp", addr)
		return
	})
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func (s *space) listenUDP(addr string) *net.UDPConn {
	s.t.Helper()
	var c net.PacketConn
	s.do(func() (err error) { c, err = net.ListenPacket("udp", addr); return })
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UDPConn)
}

func (s *space) dialUDP(addr string) *net.UDPConn {
	s.t.Helper()
	var c net.Conn
	s.do(func() (err error) { c, err = net.Dial("udp", addr); return })
	s.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UDPConn)
}

func (s *space) open(cfg Config) *Device {
	s.t.Helper()
	var d *Device
	s.do(func() (err error) { d, err = Open(cfg); return })
	s.t.Cleanup(func() { d.Close() })
	return d
}

// up calls Host.Up in the namespace, and down at the end of the test if the test
// doesn't.
func (s *space) up(h Host) (down func()) {
	s.t.Helper()
	var undo func() error
	s.do(func() (err error) { undo, err = h.Up(s.t.Context()); return })
	down = sync.OnceFunc(func() { s.do(func() error { return undo() }) })
	s.t.Cleanup(down)
	return down
}

// rules is everything that Host.Up may touch but the routes of a device.
func (s *space) rules() string {
	return s.run("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")
}

// settled is rules once the kernel has done what it does by itself after links come up.
func (s *space) settled() string {
	before := s.rules()
	for range 50 {
		time.Sleep(100 * time.Millisecond)
		now := s.rules()
		if now == before {
			return now
		}
		before = now
	}
	return before
}

// spoil makes the checksums wrong that need not be right inside a tunnel.
func spoil(b []byte) {
	_, l, ok := examine(b)
	if at := checksumAt(&l); ok && at > 0 && l.covered {
		b[l.l4+at] ^= 0x5a
	}
}

// relay carries packets from one device to another until the first is closed.
func relay(t *testing.T, from, to *Device, head, tail int) {
	done := make(chan error, 1)
	go func() {
		var inner [][]byte
		for {
			pkts, err := from.ReadBatch()
			if err != nil {
				done <- err
				return
			}
			inner = inner[:0]
			for _, b := range pkts {
				b = b[head : len(b)-tail]
				spoil(b)
				inner = append(inner, b)
			}
			to.WriteBatch(inner)
		}
	}()
	t.Cleanup(func() {
		from.Close()
		select {
		case err := <-done:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("relay ended: %v", err)
			}
		case <-time.After(patience):
			t.Error("ReadBatch doesn't return after Close")
		}
	})
}

// pattern is a stream whose every byte depends on its position.
type pattern struct{ at uint64 }

func (p *pattern) fill(b []byte) {
	for i := range b {
		n := p.at + uint64(i)
		b[i] = byte(n ^ n>>8 ^ n>>16*31 ^ n>>24)
	}
	p.at += uint64(len(b))
}

// send writes n bytes of the pattern.
func (p *pattern) send(w io.Writer, n int) error {
	b := make([]byte, 64<<10)
	for n > 0 {
		b = b[:min(len(b), n)]
		p.fill(b)
		k, err := w.Write(b)
		if err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// receive reads the pattern to the end and says how long it was.
func (p *pattern) receive(r io.Reader) (int, error) {
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	total := 0
	for {
		n, err := r.Read(got)
		p.fill(want[:n])
		if !bytes.Equal(got[:n], want[:n]) {
			return total, fmt.Errorf("wrong byte between %d and %d", total, total+n)
		}
		total += n
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// transfer sends n bytes from one end to the other, which closes at the end.
func transfer(t *testing.T, from, to net.Conn, n int) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		var p pattern
		err := p.send(from, n)
		sent <- errors.Join(err, from.(*net.TCPConn).CloseWrite())
	}()
	var p pattern
	got, err := p.receive(to)
	if err != nil || got != n {
		t.Errorf("received %d of %d bytes: %v", got, n, err)
	}
	if err := <-sent; err != nil {
		t.Errorf("send: %v", err)
	}
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}
