//go:build linux

// Command delay is a link with a delay, and with losses, for kernels that have
// no netem. It makes a TUN device; what the kernel routes into it comes out
// again after a while, and the kernel routes it on. IPv4 only.
//
//	delay -device delay0 -ms 20 -loss 0.001
//
// One thread does everything, so packets stay in order. Super-packets of the
// kernel's segmentation offload stay whole, which is what makes the link faster
// than what is measured across it; only where a segment of one is lost it is
// cut there (see lose).
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "delay: error:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(args []string) error {
	fs := flag.NewFlagSet("delay", flag.ContinueOnError)
	device := fs.String("device", "delay0", "`NAME` of the device to make")
	ms := fs.Float64("ms", 20, "`MILLISECONDS` from one end to the other")
	loss := fs.Float64("loss", 0, "`SHARE` of packets that are lost")
	seed := fs.Uint64("seed", 1, "`NUMBER` that decides which")
	if err := fs.Parse(args); err != nil {
		return err
	}
	fd, err := open(*device)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	l := link{fd: fd, delay: time.Duration(*ms * float64(time.Millisecond))}
	if *loss > 0 {
		random := rand.New(rand.NewPCG(*seed, 0))
		l.lost = func() bool { return random.Float64() < *loss }
	}
	err = l.loop(stop)
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Info("link ends", "in", l.in, "out", l.out, "lost", l.losses, "dropped", l.dropped)
	return err
}

// open makes the device.
func open(name string) (fd int, err error) {
	fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return -1, fmt.Errorf("make %s: %w", name, err)
	}
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6); err == nil {
		return fd, nil
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp); err != nil { // a kernel before 6.2
		return -1, fmt.Errorf("offloads of %s: %w", name, err)
	}
	return fd, nil
}

const (
	// readsAtOnce bounds how long packets that are due wait for others to be read.
	readsAtOnce = 64
	// mostQueued bounds what waits, in bytes: more than 10 GB/s for 50 ms.
	mostQueued = 512 << 20
	// wakeEarly is how much before its time a packet may go: to sleep for less
	// costs more than it is worth.
	wakeEarly = 20 * time.Microsecond
)

// A link is the device and what is under way. Nothing of it is safe for
// concurrent use.
type link struct {
	fd    int
	delay time.Duration
	lost  func() bool // of the next packet; nil: none
	queue queue

	in, out, losses, dropped int // reads, writes, segments, packets
}

// loop moves packets until there is a signal.
func (l *link) loop(stop <-chan os.Signal) error {
	began := time.Now()
	poll := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		more, err := l.read(func() time.Duration { return time.Since(began) })
		if err != nil {
			return err
		}
		now := time.Since(began)
		for p, ok := l.queue.pop(now + wakeEarly); ok; p, ok = l.queue.pop(now + wakeEarly) {
			if _, err := unix.Write(l.fd, p); err != nil {
				l.dropped++ // the kernel has no route, or no memory: a link loses what it can't deliver
			} else {
				l.out++
			}
			l.queue.release(p)
		}
		if more {
			continue
		}
		wait := 100 * time.Millisecond // then see whether there was a signal
		if due, ok := l.queue.due(); ok {
			wait = min(wait, due-time.Since(began))
		}
		if wait > wakeEarly {
			limit := unix.NsecToTimespec(int64(wait))
			if _, err := unix.Ppoll(poll, &limit, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("poll: %w", err)
			}
		}
	}
}

// read takes what there is, up to readsAtOnce packets, and says whether there
// may be more.
func (l *link) read(clock func() time.Duration) (more bool, err error) {
	for range readsAtOnce {
		b := l.queue.buffer()
		n, err := unix.Read(l.fd, b)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			l.queue.release(b)
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read: %w", err)
		}
		l.in++
		due := clock() + l.delay
		if l.lost == nil {
			l.push(due, b[:n])
			continue
		}
		whole, lost := lose(b[:n], l.lost, func(p []byte) { l.push(due, append(l.queue.buffer()[:0], p...)) })
		l.losses += lost
		if whole {
			l.push(due, b[:n])
		} else {
			l.queue.release(b)
		}
	}
	return true, nil
}

func (l *link) push(due time.Duration, p []byte) {
	if !l.queue.push(due, p) {
		l.dropped++
		l.queue.release(p)
	}
}
