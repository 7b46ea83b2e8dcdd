package udp

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func implementations() []implementation {
	return append(portableOnly(),
		implementation{"offload", Listen},
		implementation{"no offload", func(a netip.AddrPort, o Options) (Conn, error) {
			o.NoOffload = true
			return Listen(a, o)
		}},
		implementation{"one message", func(a netip.AddrPort, o Options) (Conn, error) {
			o.Messages = 1
			return Listen(a, o)
		}})
}

func openKernel(t *testing.T, bind netip.Addr, o Options) *kernelConn {
	t.Helper()
	return open(t, implementation{"", Listen}, bind, o).(*kernelConn)
}

// TestLocalAddress is the anycast server's need: what was sent to 127.0.0.2 is
// answered from there.
func TestLocalAddress(t *testing.T) {
	asked := netip.MustParseAddr("127.0.0.2")
	for _, f := range []family{families[1], families[3]} {
		for _, offload := range []bool{true, false} {
			t.Run(f.name, func(t *testing.T) {
				skipWithoutIPv6(t, f)
				c := openKernel(t, f.bind, Options{NoOffload: !offload})
				client := plain(t, f.target)
				port := c.LocalAddr().Port()
				if _, err := client.WriteToUDPAddrPort([]byte("ask"), netip.AddrPortFrom(asked, port)); err != nil {
					t.Fatal(err)
				}
				_, from := read(t, c, 1)
				if want := (Endpoint{Addr: localAddr(client), Local: asked}); from[0] != want {
					t.Fatalf("from %v, want %v", from[0], want)
				}
				want := makePackets([]int{300, 300, 300, 100, 500}, 0)
				if err := c.WriteBatch(want, from[0]); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 1000)
				for _, w := range want {
					n, src, err := client.ReadFromUDPAddrPort(buf)
					if err != nil {
						t.Fatal(err)
					}
					if unmap(src) != netip.AddrPortFrom(asked, port) || !bytes.Equal(buf[:n], w) {
						t.Fatalf("%d bytes from %v, want %d from %v", n, src, len(w), asked)
					}
				}
			})
		}
	}
}

func TestLocalAddressV6(t *testing.T) {
	skipWithoutIPv6(t, families[2])
	c := openKernel(t, netip.IPv6Unspecified(), Options{})
	client := plain(t, netip.IPv6Loopback())
	if _, err := client.WriteToUDPAddrPort([]byte("ask"), netip.AddrPortFrom(netip.IPv6Loopback(), c.LocalAddr().Port())); err != nil {
		t.Fatal(err)
	}
	_, from := read(t, c, 1)
	if want := (Endpoint{Addr: localAddr(client), Local: netip.IPv6Loopback()}); from[0] != want {
		t.Fatalf("from %v, want %v", from[0], want)
	}
	if err := c.WriteBatch([][]byte{{1}, {2}}, from[0]); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, src, err := client.ReadFromUDPAddrPort(buf); err != nil || n != 1 || src.Addr() != netip.IPv6Loopback() {
		t.Fatalf("%d bytes from %v, %v", n, src, err)
	}
}

// TestBroadcast: the local address of what came to a broadcast address is one that
// can be answered from.
func TestBroadcast(t *testing.T) {
	c := openKernel(t, netip.IPv4Unspecified(), Options{})
	to := netip.AddrPortFrom(netip.MustParseAddr("127.255.255.255"), c.LocalAddr().Port())
	if _, err := plain(t, families[0].target).WriteToUDPAddrPort([]byte("all"), to); err != nil {
		t.Fatal(err)
	}
	if _, from := read(t, c, 1); from[0].Local != families[0].target {
		t.Errorf("local address %v", from[0].Local)
	}
}

// TestForeignLocalAddress asks for a source that this host doesn't have, or of the
// other family: lost and counted, or left to the kernel.
func TestForeignLocalAddress(t *testing.T) {
	c := openKernel(t, netip.IPv4Unspecified(), Options{})
	client := plain(t, families[0].target)
	to := Endpoint{Addr: localAddr(client), Local: netip.MustParseAddr("192.0.2.1")}
	if err := c.WriteBatch(makePackets(repeat(10, 3), 0), to); err != nil {
		t.Fatal(err)
	}
	// Which of the two the kernel says depends on the route.
	if s := c.Stats(); s.Drops[DropBadAddress]+s.Drops[DropUnreachable] != 3 || s.Sent.Datagrams != 0 {
		t.Fatalf("%+v", s)
	}
	to.Local = netip.MustParseAddr("2001:db8::1")
	if err := c.WriteBatch([][]byte{{7}}, to); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, src, err := client.ReadFromUDPAddrPort(buf); err != nil || n != 1 || src.Addr() != families[0].target {
		t.Fatalf("%d bytes from %v, %v", n, src, err)
	}
}

// TestOffloadIsUsed: a test of offload would be worth nothing if the kernel was
// silently asked for single datagrams.
func TestOffloadIsUsed(t *testing.T) {
	a := openKernel(t, families[0].bind, Options{})
	b := openKernel(t, families[0].bind, Options{})
	if s := a.Stats(); !s.SendOffload || !s.RecvOffload {
		skipIfNew(t, 5, 0)
		t.Skip("this kernel has no UDP_SEGMENT (4.18) or UDP_GRO (5.0)")
	}
	want := makePackets(repeat(1000, 40, 10), 0)
	if err := a.WriteBatch(want, Endpoint{Addr: b.LocalAddr()}); err != nil {
		t.Fatal(err)
	}
	read(t, b, len(want))
	if s := a.Stats().Sent; s != (Traffic{Datagrams: 41, Bytes: 40010, Messages: 1, Calls: 1}) {
		t.Errorf("sent %+v", s)
	}
	if s := b.Stats().Received; s != (Traffic{Datagrams: 41, Bytes: 40010, Messages: 1, Calls: 1}) {
		t.Errorf("received %+v", s)
	}
}

// skipIfNew fails if the kernel is new enough to have what the caller is about to
// skip for.
func skipIfNew(t *testing.T, major, minor int) {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		t.Fatalf("kernel %q: %v", release, err)
	}
	if a > major || a == major && b >= minor {
		t.Fatalf("kernel %s should be able to do this", release)
	}
}

// TestMemoryAdjacency looks at what the kernel is told: packets behind one another
// are one iovec, others one each.
func TestMemoryAdjacency(t *testing.T) {
	c := openKernel(t, families[0].bind, Options{})
	c.sendOffload.Store(true)
	var iovecs []int
	c.sendmmsg = func(_ uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		for _, m := range msgs {
			iovecs = append(iovecs, int(m.hdr.Iovlen))
		}
		return len(msgs), 0
	}
	to := Endpoint{Addr: netip.MustParseAddrPort("127.0.0.1:9")}
	for _, tt := range []struct {
		pkts [][]byte
		want []int
	}{
		{makePackets(repeat(100, 10), 0), []int{1}},
		{makePackets(repeat(100, 10), 4), []int{10}},
		{makePackets(repeat(100, 65), 0), []int{1, 1}},
		{makePackets([]int{100, 50, 100}, 0), []int{1, 1}},
		{makePackets([]int{0, 0}, 0), []int{0, 0}},
	} {
		iovecs = nil
		if err := c.WriteBatch(tt.pkts, to); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(iovecs, tt.want) {
			t.Errorf("iovecs per message %v, want %v", iovecs, tt.want)
		}
	}
}

// TestLargeBatch gives more packets, and more pieces of memory, than one sendmmsg
// takes.
func TestLargeBatch(t *testing.T) {
	for _, offload := range []bool{true, false} {
		c := openKernel(t, families[0].bind, Options{})
		c.sendOffload.Store(offload)
		k := &fakeKernel{}
		c.sendmmsg = k.sendmmsg
		want := makePackets(repeat(10, 2000), 4)
		if err := c.WriteBatch(want, Endpoint{Addr: netip.MustParseAddrPort("127.0.0.1:9")}); err != nil {
			t.Fatal(err)
		}
		if got := bytes.Join(k.got, nil); !bytes.Equal(got, bytes.Join(want, nil)) {
			t.Errorf("offload %v: %d bytes, want %d, or others", offload, len(got), 20000)
		}
	}
}

// gathered is the payload of a message.
func gathered(m *mmsghdr) []byte {
	var b []byte
	if m.hdr.Iovlen == 0 {
		return b
	}
	for _, v := range unsafe.Slice(m.hdr.Iov, int(m.hdr.Iovlen)) {
		b = append(b, unsafe.Slice(v.Base, int(v.Len))...)
	}
	return b
}

// fakeKernel takes single datagrams, refuses runs with the error given, and
// loses datagrams that begin with 0xee.
type fakeKernel struct {
	refuse, lose syscall.Errno
	runs         int
	got          [][]byte
}

func (k *fakeKernel) sendmmsg(_ uintptr, msgs []mmsghdr) (int, syscall.Errno) {
	for i := range msgs {
		payload := gathered(&msgs[i])
		run := msgs[i].hdr.Controllen > 0
		var errno syscall.Errno
		switch {
		case run && k.refuse != 0:
			errno = k.refuse
		case len(payload) > 0 && payload[0] == 0xee:
			errno = k.lose
		}
		if errno != 0 {
			if i > 0 {
				return i, 0 // as Linux does: the error comes with the next call
			}
			if run {
				k.runs++
			}
			return -1, errno
		}
		k.got = append(k.got, payload)
	}
	return len(msgs), 0
}

// TestRefusedSegmentation: no datagram is lost or sent twice when the kernel
// won't cut a run, wherever in the batch it is.
func TestRefusedSegmentation(t *testing.T) {
	to := Endpoint{Addr: netip.MustParseAddrPort("127.0.0.1:9")}
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EINVAL, syscall.EMSGSIZE} {
		for _, b := range batches {
			c := openKernel(t, families[0].bind, Options{})
			c.sendOffload.Store(true)
			k := &fakeKernel{refuse: errno}
			c.sendmmsg = k.sendmmsg
			want := makePackets(b.sizes, 0)
			if err := c.WriteBatch(want, to); err != nil {
				t.Fatalf("%v, %s: %v", errno, b.name, err)
			}
			compare(t, k.got, want)
			if k.runs > 1 {
				t.Errorf("%v, %s: %d runs tried after the first refusal", errno, b.name, k.runs-1)
			}
			if s := c.Stats(); s.Resent != uint64(k.runs) || s.Sent.Datagrams != uint64(len(want)) {
				t.Errorf("%v, %s: %+v", errno, b.name, s)
			}
			if on := c.sendOffload.Load(); on != (errno != syscall.EIO || k.runs == 0) {
				t.Errorf("%v, %s: offload is %v afterwards", errno, b.name, on)
			}
			c.Close()
		}
	}
}

// TestSendErrors: the errors that mean a lost packet, each by its reason.
func TestSendErrors(t *testing.T) {
	to := Endpoint{Addr: netip.MustParseAddrPort("127.0.0.1:9")}
	for errno, reason := range map[syscall.Errno]DropReason{
		syscall.EPERM:         DropDenied,
		syscall.EACCES:        DropDenied,
		syscall.ENOBUFS:       DropQueueFull,
		syscall.ENOMEM:        DropQueueFull,
		syscall.EHOSTUNREACH:  DropUnreachable,
		syscall.ENETUNREACH:   DropUnreachable,
		syscall.ENETDOWN:      DropUnreachable,
		syscall.ECONNREFUSED:  DropRefused,
		syscall.EMSGSIZE:      DropTooBig,
		syscall.EINVAL:        DropBadAddress,
		syscall.EADDRNOTAVAIL: DropBadAddress,
	} {
		c := openKernel(t, families[0].bind, Options{NoOffload: true})
		k := &fakeKernel{lose: errno}
		c.sendmmsg = k.sendmmsg
		pkts := [][]byte{{1}, {0xee}, {2}, {0xee}, {0xee}, {3}}
		if err := c.WriteBatch(pkts, to); err != nil {
			t.Errorf("%v: %v", errno, err)
		}
		compare(t, k.got, [][]byte{{1}, {2}, {3}})
		if s := c.Stats(); s.Drops[reason] != 3 || s.Sent.Datagrams != 3 {
			t.Errorf("%v: %+v", errno, s)
		}
		c.Close()
	}
	c := openKernel(t, families[0].bind, Options{})
	c.sendmmsg = (&fakeKernel{lose: syscall.EBADF}).sendmmsg
	if err := c.WriteBatch([][]byte{{0xee}}, to); !errors.Is(err, syscall.EBADF) {
		t.Errorf("EBADF gives %v", err)
	}
}

// TestIdleRoad: the socket knows whether datagrams come one by one or many at once.
func TestIdleRoad(t *testing.T) {
	c := openKernel(t, families[0].bind, Options{})
	send := func(n int) {
		t.Helper()
		pkts := make([][]byte, n)
		for i := range pkts {
			pkts[i] = []byte{byte(i)}
		}
		if err := c.WriteBatch(pkts, Endpoint{Addr: c.LocalAddr()}); err != nil {
			t.Fatal(err)
		}
		read(t, c, n)
	}
	send(2)
	for range 20 {
		send(1)
	}
	if !c.calls.Idle() {
		t.Error("not idle while datagrams come alone")
	}
	send(2)
	if c.calls.Idle() {
		t.Error("idle while several come at once")
	}
}

// TestReadErrors: what ICMP left behind is skipped, a broken socket is not.
func TestReadErrors(t *testing.T) {
	c := openKernel(t, families[0].bind, Options{})
	pending := []syscall.Errno{syscall.ECONNREFUSED, syscall.EINTR, syscall.EHOSTUNREACH, syscall.EMSGSIZE, syscall.ENOMEM}
	c.recvmmsg = func(fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
		if len(pending) > 0 {
			errno := pending[0]
			pending = pending[1:]
			return -1, errno
		}
		return c.callRecvmmsg(fd, msgs)
	}
	if err := c.WriteBatch([][]byte{{42}}, Endpoint{Addr: c.LocalAddr()}); err != nil {
		t.Fatal(err)
	}
	got, _ := read(t, c, 1)
	compare(t, got, [][]byte{{42}})
	d := c.Stats().Drops
	if d[DropRefused] != 1 || d[DropUnreachable] != 1 || d[DropTooBig] != 1 || d[DropQueueFull] != 1 {
		t.Errorf("drops %v", d)
	}
	for range maxReadErrors {
		pending = append(pending, syscall.ENOMEM)
	}
	if _, err := c.ReadBatch(); !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("ENOMEM without end gives %v", err)
	}
	for _, errno := range []syscall.Errno{syscall.EBADF, syscall.EINVAL} {
		pending = []syscall.Errno{errno}
		if _, err := c.ReadBatch(); !errors.Is(err, errno) {
			t.Errorf("%v gives %v", errno, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	for _, flag := range []int32{unix.MSG_TRUNC, unix.MSG_CTRUNC} {
		c := openKernel(t, families[0].bind, Options{NoOffload: true})
		c.recvmmsg = func(fd uintptr, msgs []mmsghdr) (int, syscall.Errno) {
			n, errno := c.callRecvmmsg(fd, msgs)
			for i := range max(n, 0) {
				if *msgs[i].hdr.Iov.Base == 0xee {
					msgs[i].hdr.Flags |= flag
				}
			}
			return n, errno
		}
		pkts := [][]byte{{0xee}, {1}, {0xee}, {2}}
		if err := c.WriteBatch(pkts, Endpoint{Addr: c.LocalAddr()}); err != nil {
			t.Fatal(err)
		}
		got, _ := read(t, c, 2)
		compare(t, got, [][]byte{{1}, {2}})
		if n := c.Stats().Drops[DropTruncated]; n != 2 {
			t.Errorf("%d truncated, want 2", n)
		}
	}
}

func TestCloseUnblocksWrite(t *testing.T) {
	c := openKernel(t, families[0].bind, Options{})
	full := make(chan struct{}, 100)
	c.sendmmsg = func(uintptr, []mmsghdr) (int, syscall.Errno) {
		full <- struct{}{}
		return -1, syscall.EAGAIN
	}
	done := make(chan error)
	go func() { done <- c.WriteBatch([][]byte{{1}}, Endpoint{Addr: c.LocalAddr()}) }()
	<-full
	c.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Fatalf("WriteBatch: %v, want net.ErrClosed", err)
	}
}

func TestBuffersAreRaised(t *testing.T) {
	before := plain(t, families[0].target)
	rc, err := before.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var system int
	if err := rc.Control(func(fd uintptr) {
		system, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
	}); err != nil {
		t.Fatal(err)
	}
	s := openKernel(t, families[0].bind, Options{}).Stats()
	if s.RecvBuffer < system/2 || s.SendBuffer < system/2 {
		t.Errorf("buffers %d and %d are below the system's %d", s.RecvBuffer, s.SendBuffer, system/2)
	}
	if unix.Geteuid() == 0 && (s.RecvBuffer != defaultRecvBuffer || s.SendBuffer != defaultSendBuffer) {
		t.Logf("root without CAP_NET_ADMIN: buffers %d and %d", s.RecvBuffer, s.SendBuffer)
	}
	s = openKernel(t, families[0].bind, Options{RecvBuffer: -1, SendBuffer: -1}).Stats()
	if s.RecvBuffer != system/2 {
		t.Errorf("buffer %d was changed from %d", s.RecvBuffer, system/2)
	}
}

func TestBacklogDropsAreCounted(t *testing.T) {
	a := openKernel(t, families[0].bind, Options{})
	b := openKernel(t, families[0].bind, Options{RecvBuffer: 4096, Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096)
		})
	}})
	for range 200 {
		if err := a.WriteBatch(makePackets([]int{1000}, 0), Endpoint{Addr: b.LocalAddr()}); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.Stats().Drops[DropBacklog]; n == 0 || n >= 200 {
		t.Errorf("%d of 200 datagrams lost to a buffer of 4 KiB", n)
	}
}

func TestNoAllocations(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			skipWithoutIPv6(t, f)
			a := openKernel(t, f.bind, Options{})
			b := openKernel(t, f.bind, Options{})
			pkts := makePackets(repeat(1400, 32, 100, 700), 0)
			to := Endpoint{Addr: netip.AddrPortFrom(f.target, b.LocalAddr().Port())}
			n := testing.AllocsPerRun(200, func() {
				if err := a.WriteBatch(pkts, to); err != nil {
					t.Fatal(err)
				}
				for n := 0; n < len(pkts); {
					groups, err := b.ReadBatch()
					if err != nil {
						t.Fatal(err)
					}
					for _, g := range groups {
						n += len(g.Packets)
						to.Local = g.From.Local
					}
				}
			})
			if n != 0 {
				t.Errorf("%v allocations per batch", n)
			}
		})
	}
}

// TestSmallPathMTU lets a real kernel refuse: in a network namespace of its own,
// loopback carries 1500 bytes, and datagrams of 2000 can't be segments. They
// arrive all the same, fragmented, since DF is clear.
func TestSmallPathMTU(t *testing.T) {
	entered := make(chan error)
	finish := make(chan struct{})
	sockets := make(chan [2]*kernelConn)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so nobody else
		// gets to run in the namespace.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			entered <- err
			return
		}
		if err := raiseLoopback(1500); err != nil {
			entered <- err
			return
		}
		entered <- nil
		var pair [2]*kernelConn
		for i := range pair {
			c, err := listenKernel(netip.MustParseAddrPort("127.0.0.1:0"), Options{})
			if err != nil {
				t.Error(err)
			}
			pair[i] = c
		}
		sockets <- pair
		<-finish
	}()
	if err := <-entered; err != nil {
		t.Skipf("no network namespace (root needed): %v", err)
	}
	defer close(finish)
	pair := <-sockets
	a, b := pair[0], pair[1]
	if a == nil || b == nil {
		return
	}
	defer a.Close()
	defer b.Close()
	want := makePackets(repeat(2000, 20, 100), 0)
	if err := a.WriteBatch(want, Endpoint{Addr: b.LocalAddr()}); err != nil {
		t.Fatal(err)
	}
	got, _ := read(t, b, len(want))
	compare(t, got, want)
	if s := a.Stats(); s.SendOffload && s.Resent == 0 {
		t.Errorf("the kernel was expected to refuse: %+v", s)
	}
}

func raiseLoopback(mtu uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint32(mtu)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr); err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// TestPathMTUPolicy: see the package comment.
func TestPathMTUPolicy(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			skipWithoutIPv6(t, f)
			c := openKernel(t, f.bind, Options{})
			if err := c.rc.Control(func(fd uintptr) {
				if v, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER); err != nil || v != unix.IP_PMTUDISC_OMIT {
					t.Errorf("IPv4: %d, %v", v, err)
				}
				if !c.is6 {
					return
				}
				if v, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER); err != nil || v != unix.IPV6_PMTUDISC_DONT {
					t.Errorf("IPv6: %d, %v", v, err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A socket that shares has no receive buffers while it waits, and several take
// turns with the same ones.
func TestShareBuffers(t *testing.T) {
	o := Options{ShareBuffers: true, Messages: 3, NoOffload: true}
	var conns []*kernelConn
	for range 3 {
		c, err := listenKernel(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	sender := plain(t, conns[0].local.Addr())
	for round := range 4 {
		for _, c := range conns {
			want := makePackets(repeat(100+round, 7), 0)
			for _, p := range want {
				if _, err := sender.WriteToUDPAddrPort(p, c.local); err != nil {
					t.Fatal(err)
				}
			}
			got, _ := read(t, c, len(want))
			compare(t, got, want)
			if len(c.reader.msgs) != 3 {
				t.Errorf("a ring of %d messages", len(c.reader.msgs))
			}
			// The next read finds nothing and lets go of the ring.
			if err := c.uc.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.ReadBatch(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			if c.reader != nil || len(c.free) != 0 {
				t.Error("an idle socket holds buffers")
			}
			if err := c.uc.SetReadDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
		}
	}
}
