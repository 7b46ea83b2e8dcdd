package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernel is Linux's TCP in a network namespace of its own, behind a TUN device
// that a Stack is the other side of.
type kernel struct {
	stack *Stack
	tun   *os.File
	cut   atomic.Bool // nothing gets through

	// out and in, if set, carry the packets between stack and device.
	out, in *roads
}

var (
	kernel4 = netip.MustParseAddr("192.0.2.1")
	kernel6 = netip.MustParseAddr("2001:db8:7::1")
	tunnel4 = netip.MustParseAddr("192.0.2.2")
	tunnel6 = netip.MustParseAddr("2001:db8:7::2")
)

// newKernel skips the test where namespaces can't be made, unless they must.
// Sockets are made by the functions given to do, which run in the namespace.
func newKernel(t *testing.T, delays ...time.Duration) (k *kernel, do func(func() error)) {
	t.Helper()
	k = new(kernel)
	jobs := make(chan func() error)
	results := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		results <- k.open()
		for job := range jobs {
			results <- job()
		}
	}()
	if err := <-results; err != nil {
		close(jobs)
		if os.Getenv("ANYTUN_NETNS") == "require" || !errors.Is(err, os.ErrPermission) && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		t.Skipf("a network namespace can't be made here: %v", err)
	}
	var err error
	if k.stack, err = New(Config{MTU: 1400, Output: k.output}); err != nil {
		t.Fatal(err)
	}
	if err := k.stack.SetAddresses([]netip.Addr{tunnel4, tunnel6}); err != nil {
		t.Fatal(err)
	}
	if len(delays) > 0 {
		k.in = newRoads(k.stack.Input, delays...)
		k.out = newRoads(func(pkts [][]byte) {
			for _, b := range pkts {
				_, _ = k.tun.Write(b)
			}
		}, delays...)
		t.Cleanup(k.in.close)
		t.Cleanup(k.out.close)
	}
	read := make(chan struct{})
	go func() { defer close(read); k.readLoop() }()
	t.Cleanup(func() {
		close(jobs)
		_ = k.stack.Close()
		_ = k.tun.Close()
		<-read
	})
	return k, func(f func() error) {
		t.Helper()
		jobs <- f
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
}

// open makes the namespace and the device.
func (k *kernel) open() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the TUN device: %w", err)
	}
	ifr, err := unix.NewIfreq("peer")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("make the TUN device: %w", err)
	}
	k.tun = os.NewFile(uintptr(fd), "tun")
	link, err := netlink.LinkByName("peer")
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{kernel4, kernel6} {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen()-8, a.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %v: %w", a, err)
		}
	}
	return errors.Join(netlink.LinkSetMTU(link, 1400), netlink.LinkSetUp(link))
}

// output is Config.Output.
func (k *kernel) output(pkts [][]byte) {
	if k.cut.Load() {
		return
	}
	for _, b := range pkts {
		p, ok := parseIP(b)
		if !ok {
			continue
		}
		if p.proto == protoTCP {
			tcp := p.payload()
			clear(tcp[16:18])
			binary.BigEndian.PutUint16(tcp[16:], ^fold(sum(pseudoSum(p.source(), p.destination(), protoTCP, len(tcp)), tcp)))
		}
		if k.out != nil {
			k.out.send(b)
			continue
		}
		_, _ = k.tun.Write(b) // a full queue loses packets
	}
}

func (k *kernel) readLoop() {
	buf := make([]byte, 2000)
	for {
		n, err := k.tun.Read(buf)
		if err != nil {
			return
		}
		switch {
		case k.cut.Load():
		case k.in != nil:
			k.in.send(buf[:n])
		default:
			k.stack.Input([][]byte{buf[:n]})
		}
	}
}

// stream is a connection that carries bytes as fast as it can, in one direction.
type stream struct {
	name string
	got  atomic.Uint64
}

// A gap of 3.5 s has let four timeouts pass, and the next comes 3 s after it
// has ended. With Resume nobody waits for it, in neither direction.
func TestGapLinux(t *testing.T) {
	k, do := newKernel(t)
	var streams []*stream
	for _, at := range []netip.Addr{kernel4, kernel6} {
		for _, up := range []bool{false, true} {
			s := &stream{name: fmt.Sprintf("%v up=%v", at, up)}
			streams = append(streams, s)
			var l net.Listener
			do(func() (err error) {
				l, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
				return err
			})
			c, err := k.stack.DialTCP(testContext(t), l.Addr().(*net.TCPAddr).AddrPort())
			if err != nil {
				t.Fatal(err)
			}
			a, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			_ = l.Close()
			t.Cleanup(func() { _ = a.Close(); _ = c.Abort() })
			from, to := a, net.Conn(c)
			if up {
				from, to = c, a
			}
			go func() { _, _ = io.Copy(struct{ io.Writer }{from}, &pattern{bytes: 1 << 40}) }()
			go func() {
				buf := make([]byte, 64<<10)
				for {
					n, err := to.Read(buf)
					s.got.Add(uint64(n))
					if err != nil {
						return
					}
				}
			}()
		}
	}
	measure := func(resume bool) (waited []time.Duration) {
		time.Sleep(time.Second)
		gap := 3500 * time.Millisecond
		k.cut.Store(true)
		time.Sleep(100 * time.Millisecond)
		k.stack.Suspect(true)
		time.Sleep(gap - 100*time.Millisecond)
		before := make([]uint64, len(streams))
		waited = make([]time.Duration, len(streams))
		for i, s := range streams {
			before[i] = s.got.Load()
		}
		k.cut.Store(false)
		began := time.Now()
		if resume {
			k.stack.Resume(gap)
		}
		for left := len(streams); left > 0 && time.Since(began) < 20*time.Second; time.Sleep(time.Millisecond) {
			for i, s := range streams {
				if waited[i] == 0 && s.got.Load() > before[i] {
					waited[i] = time.Since(began)
					left--
				}
			}
		}
		return waited
	}
	for i, d := range measure(true) {
		t.Logf("%s: goes on after %v", streams[i].name, d)
		if d == 0 || d > 2*time.Second {
			t.Errorf("%s: waited %v", streams[i].name, d)
		}
	}
	st := k.stack.Stats()
	if st.GapResent < 2 || st.GapNudged < 2 {
		t.Errorf("resent %d, nudged %d", st.GapResent, st.GapNudged)
	}
	if os.Getenv("ANYTUN_GAP") != "" { // for comparison
		for i, d := range measure(false) {
			t.Logf("%s: without Resume, goes on after %v", streams[i].name, d)
		}
	}
}

// One transfer at a time whose packets take three roads of different length,
// with Linux at the other end. The limit is for liveness; the figures are in the
// log.
func TestRoadsLinux(t *testing.T) {
	const ms = time.Millisecond
	const size, limit = 4 << 20, 40 * time.Second
	for _, delays := range [][]time.Duration{{5 * ms, 6 * ms, 8 * ms}, {5 * ms, 10 * ms, 20 * ms}} {
		for _, up := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v up=%v", delays, up), func(t *testing.T) {
				k, do := newKernel(t, delays...)
				var l net.Listener
				do(func() (err error) {
					l, err = net.Listen("tcp", netip.AddrPortFrom(kernel4, 0).String())
					return err
				})
				c, err := k.stack.DialTCP(testContext(t), l.Addr().(*net.TCPAddr).AddrPort())
				if err != nil {
					t.Fatal(err)
				}
				a, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				_ = l.Close()
				from, to := a, net.Conn(c)
				if up {
					from, to = c, a
				}
				began := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					_, _ = io.Copy(struct{ io.Writer }{from}, &pattern{bytes: size})
					_ = from.(interface{ CloseWrite() error }).CloseWrite()
				})
				_ = to.SetDeadline(time.Now().Add(limit))
				checkPattern(t, to, size)
				took := time.Since(began)
				_, _ = a.Close(), c.Abort()
				wg.Wait()
				st := k.stack.Stats()
				t.Logf("%.2f s, %.1f MB/s; acks held %d, dropped %d, released %d; sent again %d", took.Seconds(),
					size/1e6/took.Seconds(), st.AcksHeld, st.AcksDropped, st.AcksReleased, st.TCPRetransmits)
			})
		}
	}
}
