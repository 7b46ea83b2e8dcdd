//go:build linux

package lab

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A shape is what a cable does to packets in one direction. The kernel does rate
// and loss; what takes time takes a wire, a program of ours.
type shape struct {
	Rate      int           // bits a second
	Queue     time.Duration // how long a packet may wait for the rate; default 50 ms
	Loss      float64       // share of packets lost
	Delay     time.Duration // of every packet
	Jitter    time.Duration // up to this much more, each packet by chance: reorders
	Late      time.Duration // so much later comes
	LateShare float64       // this share of the packets: reorders
}

func (s shape) needsWire() bool {
	return s.Delay > 0 || s.Jitter > 0 || s.Late > 0 && s.LateShare > 0
}

// shaped is a direction that has a shape.
type shaped struct {
	shape shape
	wire  *daemon // nil if none is needed
}

// wireMark marks the packets that have come out of the wire.
const wireMark = 0x77

// shape gives a cable a shape in both directions; shape{} undoes it.
func (c *cluster3) shape(t *testing.T, cable string, s shape) {
	t.Helper()
	for _, k := range clusterCables {
		if k.name == cable {
			c.shapePort(t, k.a, k.b, s)
			c.shapePort(t, k.b, k.a, s)
			return
		}
	}
	t.Fatalf("no cable is called %q", cable)
}

// shapeFrom gives a cable a shape for what one host sends to another.
func (c *cluster3) shapeFrom(t *testing.T, from, to string, s shape) {
	t.Helper()
	for _, k := range clusterCables {
		for _, ends := range [][2]port{{k.a, k.b}, {k.b, k.a}} {
			if ends[0].host == from && ends[1].host == to {
				c.shapePort(t, ends[0], ends[1], s)
				return
			}
		}
	}
	t.Fatalf("no cable joins %s to %s", from, to)
}

// shapePort shapes what leaves by a port. Nothing stays of an earlier shape.
func (c *cluster3) shapePort(t *testing.T, from, to port, s shape) {
	t.Helper()
	h, peer := c.host(from.host), c.host(to.host)
	name := from.host + " " + from.device
	if old := c.shapes[name]; old != nil {
		delete(c.shapes, name)
		peer.nft(t, "table netdev loss-"+to.device+" { }\ndelete table netdev loss-"+to.device)
		if old.wire != nil {
			h.nft(t, "delete table netdev wire-"+from.device)
			old.wire.stop(t) // it sends what it still has
		}
		if old.shape.Rate > 0 {
			h.run(t, 10*time.Second, "tc", "qdisc", "del", "dev", from.device, "root")
		}
	}
	if s == (shape{}) {
		return
	}
	now := &shaped{shape: s}
	c.shapes[name] = now
	if s.Loss > 0 {
		// At the receiver's door, where packets have their size on the cable.
		peer.nft(t, fmt.Sprintf(`table netdev loss-%s { chain in { type filter hook ingress device "%s" priority 0;
			numgen random mod 1000000 < %d counter drop
			}
		}`, to.device, to.device, int(s.Loss*1e6)))
	}
	if s.Rate > 0 {
		if s.Queue == 0 {
			s.Queue = 50 * time.Millisecond
		}
		burst := max(s.Rate/8/250, 8<<10) // what may go out at once: 4 ms of the rate
		h.run(t, 10*time.Second, "tc", "qdisc", "replace", "dev", from.device, "root", "tbf", "rate", strconv.Itoa(s.Rate)+"bit",
			"burst", strconv.Itoa(burst), "latency", fmt.Sprintf("%dus", s.Queue.Microseconds()))
	}
	if s.needsWire() {
		tap := "w-" + from.device
		now.wire = h.start(c.t, "wire", helper(t, "wire", tap, from.device, s.Delay.String(), s.Jitter.String(), s.Late.String(),
			strconv.FormatFloat(s.LateShare, 'g', -1, 64))...)
		eventually(t, 10*time.Second, func() error {
			if !strings.Contains(now.wire.printed(), "ready") {
				return errors.New("the wire isn't ready: " + now.wire.printed())
			}
			return nil
		})
		h.nft(t, fmt.Sprintf(`table netdev wire-%s { chain out { type filter hook egress device "%s" priority 0;
			meta mark %d accept
			fwd to "%s"
			}
		}`, from.device, from.device, wireMark, tap))
	}
}

// A wire takes packets from a tap and puts them on a device when their time has
// come. One goroutine does all of it, asleep in poll.
type wire struct {
	tap, out      int // file descriptors
	delay, jitter time.Duration
	late          time.Duration
	share         float64
	waiting       waitingFrames
	order         uint64
}

// maxWaiting bounds what a wire holds; what comes then is lost, as in a full
// queue anywhere.
const maxWaiting = 100_000

// runWire is the helper "wire": TAP DEVICE DELAY JITTER LATE SHARE.
func runWire(args []string) error {
	if len(args) != 6 {
		return fmt.Errorf("wire: %d arguments", len(args))
	}
	w := &wire{}
	var err error
	for i, d := range []*time.Duration{&w.delay, &w.jitter, &w.late} {
		if *d, err = time.ParseDuration(args[2+i]); err != nil {
			return err
		}
	}
	if w.share, err = strconv.ParseFloat(args[5], 64); err != nil {
		return err
	}
	if w.tap, err = openTap(args[0]); err != nil {
		return err
	}
	if w.out, err = openPacket(args[1]); err != nil {
		return err
	}
	var ended atomic.Bool
	ending := make(chan os.Signal, 1)
	signal.Notify(ending, syscall.SIGTERM)
	go func() { <-ending; ended.Store(true) }()
	fmt.Fprintln(os.Stdout, "ready")
	return w.run(ended.Load)
}

// openTap makes the device that the kernel puts packets into, and sets it up.
func openTap(name string) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return -1, err
	}
	// The device must say nothing of its own.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0o644); err != nil {
		return -1, err
	}
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(control)
	for _, set := range []struct {
		what  uint
		value uint32
	}{{unix.SIOCSIFTXQLEN, 20_000}, {unix.SIOCSIFMTU, 1500}} {
		request.SetUint32(set.value)
		if err := unix.IoctlIfreq(control, set.what, request); err != nil {
			return -1, err
		}
	}
	request.SetUint16(unix.IFF_UP)
	return fd, unix.IoctlIfreq(control, unix.SIOCSIFFLAGS, request)
}

// openPacket opens a socket whose frames go out on the device as they are.
func openPacket(device string) (int, error) {
	iface, err := net.InterfaceByName(device)
	if err != nil {
		return -1, err
	}
	// Protocol 0: nothing is received.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, wireMark); err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20); err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: iface.Index})
}

// run carries packets until ended says so, and then what it still has.
func (w *wire) run(ended func() bool) error {
	fds := []unix.PollFd{{Fd: int32(w.tap), Events: unix.POLLIN}}
	buf := make([]byte, 64<<10)
	for !ended() {
		patience := 100 * time.Millisecond
		if len(w.waiting) > 0 {
			patience = min(patience, max(0, time.Until(w.waiting[0].due)))
		}
		// Not Go's timers: they are only as fine as a millisecond here.
		timeout := unix.NsecToTimespec(patience.Nanoseconds())
		if _, err := unix.Ppoll(fds, &timeout, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		w.take(buf)
		w.send(time.Now())
	}
	w.take(buf)
	w.send(time.Now().Add(time.Hour))
	return nil
}

// take reads what the tap has, but not for ever.
func (w *wire) take(buf []byte) {
	for range 256 {
		n, err := unix.Read(w.tap, buf)
		if err != nil || n <= 0 {
			return
		}
		if len(w.waiting) >= maxWaiting {
			continue
		}
		later := w.delay
		if w.jitter > 0 {
			later += rand.N(w.jitter)
		}
		if w.share > 0 && rand.Float64() < w.share {
			later += w.late
		}
		w.order++
		heap.Push(&w.waiting, waitingFrame{due: time.Now().Add(later), order: w.order, frame: append([]byte(nil), buf[:n]...)})
	}
}

// send puts on the device what is due.
func (w *wire) send(now time.Time) {
	for len(w.waiting) > 0 && !w.waiting[0].due.After(now) {
		f := heap.Pop(&w.waiting).(waitingFrame)
		_, _ = unix.Write(w.out, f.frame) // a full queue loses it
	}
}

type waitingFrame struct {
	due   time.Time
	order uint64 // of arrival, where due is the same
	frame []byte
}

// waitingFrames is a heap, the next one first.
type waitingFrames []waitingFrame

func (h waitingFrames) Len() int { return len(h) }
func (h waitingFrames) Less(i, j int) bool {
	if h[i].due.Equal(h[j].due) {
		return h[i].order < h[j].order
	}
	return h[i].due.Before(h[j].due)
}
func (h waitingFrames) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *waitingFrames) Push(x any)   { *h = append(*h, x.(waitingFrame)) }
func (h *waitingFrames) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = waitingFrame{}
	*h = old[:len(old)-1]
	return last
}
