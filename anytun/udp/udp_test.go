package udp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// implementation is one way of making a Conn, all of which must behave alike.
type implementation struct {
	name   string
	listen func(netip.AddrPort, Options) (Conn, error)
}

func portableOnly() []implementation {
	return []implementation{{"portable", listenPortable}}
}

// family is one way of addressing on this host.
type family struct {
	name         string
	bind, target netip.Addr
}

var families = []family{
	{"v4", netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")},
	{"v4 wildcard", netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1")},
	{"v6", netip.IPv6Loopback(), netip.IPv6Loopback()},
	{"dual stack v4", netip.IPv6Unspecified(), netip.MustParseAddr("127.0.0.1")},
	{"dual stack v6", netip.IPv6Unspecified(), netip.IPv6Loopback()},
}

// skipWithoutIPv6 skips only where the host has no IPv6 loopback at all.
func skipWithoutIPv6(t testing.TB, f family) {
	t.Helper()
	if !f.bind.Is6() {
		return
	}
	pc, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		t.Skipf("this host has no IPv6 loopback: %v", err)
	}
	pc.Close()
}

// open listens and closes at the end of the test, or earlier if the test hangs.
func open(t testing.TB, im implementation, bind netip.Addr, o Options) Conn {
	t.Helper()
	c, err := im.listen(netip.AddrPortFrom(bind, 0), o)
	if err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(20*time.Second, func() { c.Close() })
	t.Cleanup(func() {
		watchdog.Stop()
		c.Close()
	})
	return c
}

// plain is a socket of package net.
func plain(t testing.TB, at netip.Addr) *net.UDPConn {
	t.Helper()
	uc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		t.Fatal(err)
	}
	if err := uc.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { uc.Close() })
	return uc
}

// read collects n datagrams.
func read(t testing.TB, c Conn, n int) (pkts [][]byte, from []Endpoint) {
	t.Helper()
	for len(pkts) < n {
		groups, err := c.ReadBatch()
		if err != nil {
			t.Fatalf("after %d of %d datagrams: %v", len(pkts), n, err)
		}
		for _, g := range groups {
			if len(g.Packets) == 0 {
				t.Fatal("empty group")
			}
			for _, p := range g.Packets {
				pkts = append(pkts, bytes.Clone(p))
				from = append(from, g.From)
			}
		}
	}
	return pkts, from
}

func compare(t testing.TB, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d datagrams, want %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("datagram %d differs: %d bytes, want %d", i, len(got[i]), len(want[i]))
		}
	}
}

// makePackets fills datagrams of the given sizes with bytes that tell them apart.
// Those of one batch lie behind one another in memory, but for a gap (such as an
// engine's headroom) after each.
func makePackets(sizes []int, gap int) [][]byte {
	total := 0
	for _, n := range sizes {
		total += n + gap
	}
	buf := make([]byte, total)
	rng := rand.New(rand.NewPCG(uint64(total), uint64(len(sizes))))
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	var pkts [][]byte
	for _, n := range sizes {
		pkts = append(pkts, buf[:n:n])
		buf = buf[n+gap:]
	}
	return pkts
}

func repeat(size, n int, tail ...int) []int {
	var sizes []int
	for range n {
		sizes = append(sizes, size)
	}
	return append(sizes, tail...)
}

// batches are the shapes of WriteBatch calls: none holds more than a default
// socket buffer does, since unprivileged test runs have no more.
var batches = []struct {
	name  string
	sizes []int
}{
	{"one", []int{1400}},
	{"one byte", []int{1}},
	{"empty datagram", []int{0}},
	{"empty ones among others", []int{0, 100, 0, 0, 100, 100, 0}},
	{"a run", repeat(1436, 44)},
	{"a run with a tail", repeat(1436, 43, 100)},
	{"a tail of one byte", repeat(1200, 10, 1)},
	{"tail, then a new run", append(repeat(1200, 5, 300), repeat(1200, 5)...)},
	{"rising", []int{100, 200, 300, 400}},
	{"falling", []int{400, 300, 200, 100}},
	{"falling pairs", []int{400, 400, 300, 300, 200, 200}},
	{"63", repeat(60, 63)},
	{"64", repeat(60, 64)},
	{"65", repeat(60, 65)},
	{"64 and a tail", repeat(60, 64, 10)},
	{"many messages", repeat(0, 70)},
	{"long ones", []int{9000, 9000, 9000, 5000}},
	{"longest", []int{65507}},
	{"up to the run's limit", []int{32500, 32500}},
	{"over the run's limit", []int{32501, 32501}},
	{"over the kernel's limit", []int{40000, 40000}},
	{"random", randomSizes(60, 1500)},
	{"random few sizes", randomOf(60, 100, 1000, 1400)},
}

func randomSizes(n, limit int) (sizes []int) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range n {
		sizes = append(sizes, rng.IntN(limit))
	}
	return sizes
}

func randomOf(n int, choice ...int) (sizes []int) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range n {
		sizes = append(sizes, choice[rng.IntN(len(choice))])
	}
	return sizes
}

// TestTwinSend holds every implementation's WriteBatch against package net: the
// datagrams that arrive at a plain socket are those that were given, in order.
func TestTwinSend(t *testing.T) {
	for _, im := range implementations() {
		for _, f := range families {
			t.Run(im.name+"/"+f.name, func(t *testing.T) {
				skipWithoutIPv6(t, f)
				c := open(t, im, f.bind, Options{})
				sink := plain(t, f.target)
				to := Endpoint{Addr: localAddr(sink)}
				buf := make([]byte, 1<<16)
				for _, b := range batches {
					for _, gap := range []int{0, 36} {
						want := makePackets(b.sizes, gap)
						if err := c.WriteBatch(want, to); err != nil {
							t.Fatalf("%s: %v", b.name, err)
						}
						var got [][]byte
						for range want {
							n, from, err := sink.ReadFromUDPAddrPort(buf)
							if err != nil {
								t.Fatalf("%s: after %d datagrams: %v", b.name, len(got), err)
							}
							if from.Port() != c.LocalAddr().Port() {
								t.Fatalf("%s: from %v", b.name, from)
							}
							got = append(got, bytes.Clone(buf[:n]))
						}
						compare(t, got, want)
					}
				}
				if s := c.(StatsReader).Stats(); s.Resent != 0 || s.Drops != [NumDropReasons]uint64{} {
					t.Errorf("runs were made that the kernel refused: %+v", s)
				}
			})
		}
	}
}

// TestTwinReceive is the way back: what a plain socket sends arrives, in order,
// from its plain address.
func TestTwinReceive(t *testing.T) {
	for _, im := range implementations() {
		for _, f := range families {
			t.Run(im.name+"/"+f.name, func(t *testing.T) {
				skipWithoutIPv6(t, f)
				c := open(t, im, f.bind, Options{})
				source := plain(t, f.target)
				to := netip.AddrPortFrom(f.target, c.LocalAddr().Port())
				for _, b := range batches {
					want := makePackets(b.sizes, 0)
					for _, p := range want {
						if _, err := source.WriteToUDPAddrPort(p, to); err != nil {
							t.Fatal(err)
						}
					}
					got, from := read(t, c, len(want))
					compare(t, got, want)
					for _, e := range from {
						if e.Addr != localAddr(source) {
							t.Fatalf("%s: from %v, want %v", b.name, e.Addr, localAddr(source))
						}
						if e.Local != f.target && (im.name != "portable" || !f.bind.IsUnspecified()) {
							t.Fatalf("%s: to %v, want %v", b.name, e.Local, f.target)
						}
					}
				}
			})
		}
	}
}

// TestBetween sends from every implementation to every other.
func TestBetween(t *testing.T) {
	for _, a := range implementations() {
		for _, b := range implementations() {
			t.Run(a.name+" to "+b.name, func(t *testing.T) {
				f := families[0]
				from := open(t, a, f.bind, Options{})
				to := open(t, b, f.bind, Options{})
				for _, shape := range batches {
					want := makePackets(shape.sizes, 0)
					if err := from.WriteBatch(want, Endpoint{Addr: to.LocalAddr()}); err != nil {
						t.Fatal(err)
					}
					got, ends := read(t, to, len(want))
					compare(t, got, want)
					for _, e := range ends {
						if e.Addr != from.LocalAddr() {
							t.Fatalf("%s: from %v, want %v", shape.name, e.Addr, from.LocalAddr())
						}
					}
				}
			})
		}
	}
}

// TestPacketsDoNotOverlap appends to each packet and changes it in place, as a
// cipher may.
func TestPacketsDoNotOverlap(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			a := open(t, im, families[0].bind, Options{})
			b := open(t, im, families[0].bind, Options{})
			want := makePackets(repeat(100, 20), 0)
			if err := a.WriteBatch(want, Endpoint{Addr: b.LocalAddr()}); err != nil {
				t.Fatal(err)
			}
			for seen := 0; seen < len(want); {
				groups, err := b.ReadBatch()
				if err != nil {
					t.Fatal(err)
				}
				for _, g := range groups {
					for _, p := range g.Packets {
						if !bytes.Equal(p, want[seen]) {
							t.Fatalf("datagram %d was overwritten", seen)
						}
						if cap(p) != len(p) {
							t.Errorf("capacity %d for %d bytes", cap(p), len(p))
						}
						clear(p)
						_ = append(p, bytes.Repeat([]byte{0xff}, 50)...)
						seen++
					}
				}
			}
		})
	}
}

// TestManyEndpoints reads interleaved datagrams of several senders: each group
// has one sender, and the order within a sender is kept.
func TestManyEndpoints(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			c := open(t, im, families[0].bind, Options{})
			senders := make(map[netip.AddrPort]uint32)
			var conns []*net.UDPConn
			for range 3 {
				uc := plain(t, families[0].target)
				conns = append(conns, uc)
				senders[localAddr(uc)] = 0
			}
			const rounds = 20
			for i := range rounds {
				for _, uc := range conns {
					p := binary.BigEndian.AppendUint32(nil, uint32(i))
					if _, err := uc.WriteToUDPAddrPort(p, c.LocalAddr()); err != nil {
						t.Fatal(err)
					}
				}
			}
			pkts, from := read(t, c, rounds*len(conns))
			for i, p := range pkts {
				next, known := senders[from[i].Addr]
				if !known || binary.BigEndian.Uint32(p) != next {
					t.Fatalf("datagram %x from %v, want %d", p, from[i].Addr, next)
				}
				senders[from[i].Addr]++
			}
		})
	}
}

func TestCloseUnblocksRead(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			c := open(t, im, families[0].bind, Options{})
			done := make(chan error)
			go func() {
				_, err := c.ReadBatch()
				done <- err
			}()
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errors.Is(err, net.ErrClosed) {
				t.Fatalf("ReadBatch: %v, want net.ErrClosed", err)
			}
			if err := c.Close(); err != nil {
				t.Fatalf("second Close: %v", err)
			}
			err := c.WriteBatch([][]byte{{1}}, Endpoint{Addr: c.LocalAddr()})
			if !errors.Is(err, net.ErrClosed) {
				t.Fatalf("WriteBatch after Close: %v, want net.ErrClosed", err)
			}
		})
	}
}

// TestConcurrentWriters checks that batches of several goroutines don't mix
// their bytes.
func TestConcurrentWriters(t *testing.T) {
	const writers, rounds, perBatch = 8, 30, 12
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			a := open(t, im, netip.IPv4Unspecified(), Options{})
			b := open(t, im, families[0].bind, Options{})
			// No more in flight than a default receive buffer holds.
			flight := make(chan struct{}, 8)
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for r := range rounds {
						var pkts [][]byte
						for i := range perBatch {
							// Sizes differ by writer, so mixed-up runs show.
							p := bytes.Repeat([]byte{byte(w)}, 50+w)
							p[1], p[2] = byte(r), byte(i)
							pkts = append(pkts, p)
						}
						flight <- struct{}{}
						if err := a.WriteBatch(pkts, Endpoint{Addr: b.LocalAddr()}); err != nil {
							t.Errorf("writer %d: %v", w, err)
						}
					}
				})
			}
			seen := make(map[string]int)
			for n := 1; n <= writers*rounds*perBatch; n++ {
				pkts, _ := read(t, b, 1)
				n += len(pkts) - 1
				for i, p := range pkts {
					if w := int(p[0]); len(p) != 50+w || !bytes.Equal(p[3:], bytes.Repeat([]byte{byte(w)}, 47+w)) {
						t.Fatalf("mixed bytes: %x", p)
					}
					seen[string(p)]++
					if (n-len(pkts)+1+i)%perBatch == 0 {
						<-flight
					}
				}
			}
			wg.Wait()
			if len(seen) != writers*rounds*perBatch {
				t.Fatalf("%d different datagrams, want %d", len(seen), writers*rounds*perBatch)
			}
		})
	}
}

// TestLostDatagrams sends what can't be sent: counted, not an error, and the rest
// of the batch arrives.
func TestLostDatagrams(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			a := open(t, im, families[0].bind, Options{})
			b := open(t, im, families[0].bind, Options{})
			want := makePackets([]int{100, 70000, 50}, 0)
			if err := a.WriteBatch(want, Endpoint{Addr: b.LocalAddr()}); err != nil {
				t.Fatal(err)
			}
			got, _ := read(t, b, 2)
			compare(t, got, [][]byte{want[0], want[2]})
			if n := a.(StatsReader).Stats().Drops[DropTooBig]; n != 1 {
				t.Errorf("%d drops for size, want 1", n)
			}
			for _, to := range []netip.AddrPort{{}, netip.MustParseAddrPort("[2001:db8::1]:9")} {
				if err := a.WriteBatch(want[:1], Endpoint{Addr: to}); err != nil {
					t.Fatalf("to %v: %v", to, err)
				}
			}
			if n := a.(StatsReader).Stats().Drops[DropBadAddress]; n != 2 {
				t.Errorf("%d drops for the address, want 2", n)
			}
		})
	}
}

func TestStats(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			a := open(t, im, families[0].bind, Options{})
			b := open(t, im, families[0].bind, Options{})
			want := makePackets(repeat(1000, 10), 0)
			if err := a.WriteBatch(want, Endpoint{Addr: b.LocalAddr()}); err != nil {
				t.Fatal(err)
			}
			read(t, b, len(want))
			sent, received := a.(StatsReader).Stats(), b.(StatsReader).Stats()
			for _, s := range []Traffic{sent.Sent, received.Received} {
				if s.Datagrams != 10 || s.Bytes != 10000 || s.Messages == 0 || s.Messages > 10 ||
					s.Calls == 0 || s.Calls > s.Messages {
					t.Errorf("traffic %+v", s)
				}
			}
			if sent.Received != (Traffic{}) || received.Sent != (Traffic{}) {
				t.Error("counted in the wrong direction")
			}
			if sent.SendBuffer <= 0 || received.RecvBuffer <= 0 {
				t.Errorf("buffer sizes unknown: %+v", sent)
			}
			if sent.Drops != [NumDropReasons]uint64{} {
				t.Errorf("drops %v", sent.Drops)
			}
		})
	}
}

func TestDropReasonNames(t *testing.T) {
	seen := make(map[string]bool)
	for r := range DropReason(NumDropReasons) {
		if name := r.String(); name == "" || name == "unknown" || seen[name] {
			t.Errorf("reason %d is called %q", r, name)
		} else {
			seen[name] = true
		}
	}
	if DropReason(NumDropReasons).String() != "unknown" {
		t.Error("a reason too many has a name")
	}
}

func TestReusePort(t *testing.T) {
	a, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"), Options{ReusePort: true})
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("this system has no SO_REUSEPORT")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Listen(a.LocalAddr(), Options{ReusePort: true})
	if err != nil {
		t.Fatalf("second socket on %v: %v", a.LocalAddr(), err)
	}
	defer b.Close()
	if _, err := Listen(a.LocalAddr(), Options{}); err == nil {
		t.Error("a third one without ReusePort succeeded")
	}
}

func TestListenAnywhere(t *testing.T) {
	c, err := Listen(netip.AddrPort{}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if a := c.LocalAddr(); !a.Addr().IsUnspecified() || a.Port() == 0 {
		t.Fatalf("bound to %v", a)
	}
	if _, err := Listen(c.LocalAddr(), Options{}); err == nil {
		t.Error("the port could be taken twice")
	}
	skipWithoutIPv6(t, families[2])
	// Half an address isn't anywhere: no silent retreat to IPv4.
	taken := localAddr(plain(t, netip.IPv6Loopback())).Port()
	if c, err := Listen(netip.AddrPortFrom(netip.Addr{}, taken), Options{}); err == nil {
		t.Errorf("bound to %v with [::1]:%d taken", c.LocalAddr(), taken)
		c.Close()
	}
}

func BenchmarkBatch(b *testing.B) {
	for _, im := range implementations() {
		for _, size := range []int{64, 1436} {
			b.Run(fmt.Sprintf("%s/%d", im.name, size), func(b *testing.B) {
				from := open(b, im, families[0].bind, Options{})
				to := open(b, im, families[0].bind, Options{})
				pkts := makePackets(repeat(size, 44), 0)
				b.SetBytes(int64(size * len(pkts)))
				b.ReportAllocs()
				for b.Loop() {
					if err := from.WriteBatch(pkts, Endpoint{Addr: to.LocalAddr()}); err != nil {
						b.Fatal(err)
					}
					for n := 0; n < len(pkts); {
						groups, err := to.ReadBatch()
						if err != nil {
							b.Fatal(err)
						}
						for _, g := range groups {
							n += len(g.Packets)
						}
					}
				}
			})
		}
	}
}
