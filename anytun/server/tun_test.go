package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

var (
	tunEgress4  = netip.MustParseAddr("198.51.100.1")
	tunEgress42 = netip.MustParseAddr("198.51.100.2")
	tunEgress6  = netip.MustParseAddr("2001:db8:e::1")
	tunWorld4   = netip.MustParseAddr("192.0.2.80")
	tunWorld6   = netip.MustParseAddr("2001:db8:d::80")
)

// tunHost stands for the kernel behind the device, and for the clients.
type tunHost struct {
	mu     sync.Mutex
	out    [][]byte // given to the kernel
	in     [][]byte // given to clients
	closed chan struct{}
	once   sync.Once
}

func (h *tunHost) ReadBatch() ([][]byte, error) { <-h.closed; return nil, net.ErrClosed }
func (h *tunHost) Close() error                 { h.once.Do(func() { close(h.closed) }); return nil }

// WriteBatch does what the device's kernel does: it computes checksums.
func (h *tunHost) WriteBatch(pkts [][]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range pkts {
		q := slices.Clone(p)
		var v packet.View
		if v.Parse(q) == packet.OK && !v.Fragmented && (v.Protocol == packet.TCP || v.Protocol == packet.UDP) {
			v.FillChecksums()
		}
		h.out = append(h.out, q)
	}
}

func (h *tunHost) toClients(bufs [][]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, b := range bufs {
		h.in = append(h.in, slices.Clone(inside(b)))
	}
}

// tunRig is a tun egress between a kernel and clients, 1 to 63 on the first
// egress address; client 9 may use any port.
type tunRig struct {
	*tunEgress
	host      *tunHost
	leases    portblock.Leases
	published []registry.Mapping
	rejected  []packet.ErrorKind
	t         *testing.T
}

func newTunRig(t *testing.T) *tunRig {
	t.Helper()
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{tunEgress4, tunEgress42}, []netip.Addr{tunEgress6}, netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	r := &tunRig{t: t, host: &tunHost{closed: make(chan struct{})}}
	gateway := []netip.Addr{testInner.IPv4(session.Gateway), testInner.IPv6(session.Gateway)}
	services, err := newSockets(socketsConfig{
		MTU: 1400, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Gateway: gateway,
		Output: r.host.toClients, ClientOf: testInner.Client, DNS: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9")},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.tunEgress = newTunEgress(tunConfig{
		Device: r.host, Plan: &plan, Leases: &r.leases, Inner: testInner,
		AnyPort: func(c uint32) bool { return c == 9 }, Service: []netip.AddrPort{netip.AddrPortFrom(tunEgress4, 4444)}, MTU: 1400, Services: services,
		Policy: newEgressPolicy(gateway, false), Output: r.host.toClients,
		Reject:  func(_ uint32, _ []byte, kind packet.ErrorKind) { r.rejected = append(r.rejected, kind) },
		Publish: func(m registry.Mapping) { r.published = append(r.published, m) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

// out sends a client's packet and returns what the kernel is given.
func (r *tunRig) out(p []byte) [][]byte {
	r.t.Helper()
	r.host.out, r.host.in = nil, nil
	r.Input([][]byte{p})
	return r.host.out
}

// in lets a packet come from the kernel and returns what clients are given.
func (r *tunRig) in(p []byte) [][]byte {
	r.t.Helper()
	r.host.out, r.host.in = nil, nil
	buf := room(len(p))
	copy(inside(buf), p)
	r.fromDevice([][]byte{buf})
	return r.host.in
}

func (r *tunRig) dropped(want TunDrop, f func() [][]byte) {
	r.t.Helper()
	before := r.stats().Drops[want.String()]
	if got := f(); len(got) != 0 {
		r.t.Errorf("a packet went on that should be dropped as %v: % x", want, got[0])
	}
	if got := r.stats().Drops[want.String()] - before; got != 1 {
		r.t.Errorf("%d packets dropped as %v, want 1; all: %v", got, want, r.stats().Drops)
	}
}

// one parses the only packet of a list and checks that its checksums are good.
func one(t *testing.T, list [][]byte) *packet.View {
	t.Helper()
	if len(list) != 1 {
		t.Fatalf("%d packets, want 1", len(list))
	}
	v := new(packet.View)
	if why := v.Parse(list[0]); why != packet.OK {
		t.Fatalf("not a packet: %v", why)
	}
	return v
}

func valid(t *testing.T, v *packet.View) {
	t.Helper()
	if !v.ChecksumsValid() {
		t.Errorf("wrong checksum in a packet from %v to %v", v.Source, v.Destination)
	}
}

// datagram makes a TCP SYN or a UDP datagram.
func datagram(proto packet.Protocol, from, to netip.AddrPort, payload int) []byte {
	n := 8
	if proto == packet.TCP {
		n = 24
	}
	p := ipPacket(from.Addr(), to.Addr(), n+payload)
	l4 := p[len(p)-n-payload:]
	p[map[bool]int{true: 9, false: 6}[from.Addr().Is4()]] = byte(proto)
	binary.BigEndian.PutUint16(l4, from.Port())
	binary.BigEndian.PutUint16(l4[2:], to.Port())
	if proto == packet.TCP {
		l4[12], l4[13] = 6<<4, packet.SYN
		l4[20], l4[21] = 2, 4
		binary.BigEndian.PutUint16(l4[22:], 1460)
	} else {
		binary.BigEndian.PutUint16(l4[4:], uint16(n+payload))
	}
	for i := range l4[n:] {
		l4[n+i] = byte(i * 7)
	}
	return summed(p)
}

// summed fills the checksums in.
func summed(p []byte) []byte {
	var v packet.View
	if v.Parse(p) == packet.OK {
		v.FillChecksums()
	}
	return p
}

// ping makes an echo request or reply.
func ping(from, to netip.Addr, reply bool, id uint16) []byte {
	p := ipPacket(from, to, 8+32)
	m := p[len(p)-40:]
	if from.Is4() {
		p[9] = byte(packet.ICMPv4)
		m[0] = icmpEchoRequest
		if reply {
			m[0] = icmpEchoReply
		}
	} else {
		p[6] = byte(packet.ICMPv6)
		m[0] = icmpv6EchoRequest
		if reply {
			m[0] = icmpv6EchoReply
		}
	}
	binary.BigEndian.PutUint16(m[4:], id)
	return summed(p)
}

// icmpError makes an error of host from about p.
func icmpError(t *testing.T, from netip.Addr, p []byte, kind packet.ErrorKind, mtu int) []byte {
	t.Helper()
	var v packet.View
	if v.Parse(p) != packet.OK {
		t.Fatal("can't quote that")
	}
	b, ok := v.AppendError(nil, from, kind, mtu)
	if !ok {
		t.Fatal("no error about that")
	}
	return b
}

// families are the addresses of client 2 inside and outside, and somebody's.
func families(f func(inner, public, world netip.Addr)) {
	f(testInner.IPv4(2), tunEgress4, tunWorld4)
	f(testInner.IPv6(2), tunEgress6, tunWorld6)
}

const port2 = 1024 + 1024 + 5 // of client 2

func TestTunBothWays(t *testing.T) {
	r := newTunRig(t)
	families(func(inner, public, world netip.Addr) {
		for _, proto := range []packet.Protocol{packet.TCP, packet.UDP} {
			p := datagram(proto, netip.AddrPortFrom(inner, port2), netip.AddrPortFrom(world, 80), 100)
			p[len(p)-100-map[packet.Protocol]int{packet.TCP: 8, packet.UDP: 2}[proto]] ^= 0x5a // inner checksums need not be valid
			v := one(t, r.out(p))
			valid(t, v)
			if v.Source != public || v.SourcePort != port2 || v.Destination != world || v.DestinationPort != 80 {
				t.Errorf("%v: left as %v:%d to %v:%d", proto, v.Source, v.SourcePort, v.Destination, v.DestinationPort)
			}
			q := datagram(proto, netip.AddrPortFrom(world, 80), netip.AddrPortFrom(public, port2), 100)
			v = one(t, r.in(q))
			if v.Source != world || v.Destination != inner || v.DestinationPort != port2 {
				t.Errorf("%v: came as %v to %v:%d", proto, v.Source, v.Destination, v.DestinationPort)
			}
			if !bytes.Equal(v.Payload()[len(v.Payload())-100:], q[len(q)-100:]) {
				t.Error("the payload was changed")
			}
		}
		v := one(t, r.out(ping(inner, world, false, port2)))
		valid(t, v)
		if v.Source != public || v.SourcePort != port2 {
			t.Errorf("ping left as %v, id %d", v.Source, v.SourcePort)
		}
		v = one(t, r.in(ping(world, public, true, port2)))
		valid(t, v)
		if v.Destination != inner {
			t.Errorf("pong came to %v", v.Destination)
		}
	})
	s := r.stats()
	if s.PacketsOut != 6 || s.PacketsIn != 6 || s.BytesOut == 0 || s.BytesIn == 0 {
		t.Errorf("counted %+v", s)
	}
}

// A client's ports are its own, and nobody else's packets are let out.
func TestTunRefuses(t *testing.T) {
	r := newTunRig(t)
	at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
	families(func(inner, public, world netip.Addr) {
		for _, port := range []uint16{1024, 2047, 3072, 65535, 53} {
			r.dropped(TunDropPort, func() [][]byte { return r.out(datagram(packet.UDP, at(inner, port), at(world, 53), 10)) })
			r.dropped(TunDropPort, func() [][]byte { return r.out(ping(inner, world, false, port)) })
		}
		if len(r.rejected) == 0 || r.rejected[0] != packet.AdminProhibited {
			t.Errorf("the client was told %v", r.rejected)
		}
		r.dropped(TunDropProtocol, func() [][]byte { return r.out(ping(inner, world, true, port2)) })
		sctp := ipPacket(inner, world, 40)
		sctp[map[bool]int{true: 9, false: 6}[inner.Is4()]] = 132
		r.dropped(TunDropProtocol, func() [][]byte { return r.out(sctp) })
		for _, port := range []uint16{0, 80, 1023} {
			r.dropped(TunDropNobody, func() [][]byte { return r.in(datagram(packet.TCP, at(world, 80), at(public, port), 10)) })
		}
		r.dropped(TunDropNobody, func() [][]byte {
			return r.in(datagram(packet.TCP, at(world, 80), at(netip.MustParseAddr(map[bool]string{true: "198.51.100.9", false: "2001:db8:e::9"}[inner.Is4()]), port2), 10))
		})
	})
	for _, to := range []string{"127.0.0.1", "169.254.169.254", "0.1.2.3", "240.0.0.1"} {
		r.dropped(TunDropForbidden, func() [][]byte {
			return r.out(datagram(packet.TCP, at(testInner.IPv4(2), port2), at(netip.MustParseAddr(to), 80), 0))
		})
	}
	// What the servers listen at themselves is nobody's source, but for TCP.
	service := func(proto packet.Protocol) [][]byte {
		return r.out(datagram(proto, at(testInner.IPv4(4), 4444), at(tunWorld4, 80), 0))
	}
	r.dropped(TunDropPort, func() [][]byte { return service(packet.UDP) })
	if got := service(packet.TCP); len(got) != 1 {
		t.Error("TCP from the port of the service was refused")
	}
	r.dropped(TunDropMalformed, func() [][]byte { return r.out([]byte{0x45, 0}) })
	r.dropped(TunDropMalformed, func() [][]byte { return r.in([]byte{0x45, 0}) })
}

func TestTunClampsSegments(t *testing.T) {
	r := newTunRig(t)
	families(func(inner, public, world netip.Addr) {
		want := uint16(1360)
		if inner.Is6() {
			want = 1340
		}
		mss := func(v *packet.View) uint16 {
			l4 := v.Upper()
			return binary.BigEndian.Uint16(l4[22:])
		}
		if got := mss(one(t, r.out(datagram(packet.TCP, netip.AddrPortFrom(inner, port2), netip.AddrPortFrom(world, 80), 0)))); got != want {
			t.Errorf("a SYN left with %d", got)
		}
		if got := mss(one(t, r.in(datagram(packet.TCP, netip.AddrPortFrom(world, 80), netip.AddrPortFrom(public, port2), 0)))); got != want {
			t.Errorf("a SYN came with %d", got)
		}
	})
}

// ICMP errors find the client whose packet they quote, and what they quote is
// what the client sent; the other way round it is what the peer sent.
func TestTunErrors(t *testing.T) {
	r := newTunRig(t)
	router4, router6 := netip.MustParseAddr("203.0.113.99"), netip.MustParseAddr("2001:db8:99::1")
	families(func(inner, public, world netip.Addr) {
		router := router4
		if inner.Is6() {
			router = router6
		}
		for _, kind := range []packet.ErrorKind{packet.TooBig, packet.TimeExceeded, packet.PortUnreachable} {
			for _, sent := range [][]byte{
				datagram(packet.UDP, netip.AddrPortFrom(inner, port2), netip.AddrPortFrom(world, 33434), 1200),
				ping(inner, world, false, port2),
			} {
				left := r.out(slices.Clone(sent))[0]
				v := one(t, r.in(icmpError(t, router, left, kind, 1300)))
				valid(t, v)
				if v.Source != router || v.Destination != inner {
					t.Errorf("error from %v to %v", v.Source, v.Destination)
				}
				var q packet.View
				if v.Quoted(&q) != packet.OK || q.Source != inner || q.Destination != world || q.SourcePort != port2 {
					t.Errorf("it quotes %v:%d to %v", q.Source, q.SourcePort, q.Destination)
				}
				if mtu, ok := v.MTU(); kind == packet.TooBig && (!ok || mtu != 1300) {
					t.Errorf("MTU %d", mtu)
				}
				if n := min(len(q.Bytes), 200); inner.Is4() && !bytes.Equal(q.Bytes[12:n], sent[12:n]) {
					t.Error("the quotation isn't what was sent")
				}
			}
		}
		came := r.in(datagram(packet.UDP, netip.AddrPortFrom(world, 53), netip.AddrPortFrom(public, port2), 60))[0]
		v := one(t, r.out(icmpError(t, inner, came, packet.PortUnreachable, 0)))
		valid(t, v)
		var q packet.View
		if v.Quoted(&q) != packet.OK || v.Source != public || q.Destination != public || q.DestinationPort != port2 || q.Source != world {
			t.Errorf("error from %v quotes %v to %v:%d", v.Source, q.Source, q.Destination, q.DestinationPort)
		}

		// About a stranger's packet, or a port that isn't the client's.
		foreign := datagram(packet.UDP, netip.AddrPortFrom(router, 5), netip.AddrPortFrom(world, 53), 20)
		r.dropped(TunDropQuote, func() [][]byte {
			return r.out(summed(requote(icmpError(t, world, foreign, packet.PortUnreachable, 0), inner, world)))
		})
		r.dropped(TunDropQuote, func() [][]byte {
			return r.in(summed(requote(icmpError(t, router, foreign, packet.PortUnreachable, 0), router, public)))
		})
		other := datagram(packet.UDP, netip.AddrPortFrom(world, 53), netip.AddrPortFrom(inner, port2+1024), 20)
		r.dropped(TunDropPort, func() [][]byte { return r.out(icmpError(t, inner, other, packet.PortUnreachable, 0)) })
	})
}

// requote gives an ICMP error other addresses, not what it quotes.
func requote(p []byte, from, to netip.Addr) []byte {
	var v packet.View
	v.Parse(p)
	v.SetSource(from)
	v.SetDestination(to)
	return p
}

// Datagrams above the MTU go in fragments both ways, whatever order they come
// in, and their checksum is good.
func TestTunFragments(t *testing.T) {
	r := newTunRig(t)
	families(func(inner, public, world netip.Addr) {
		for _, way := range []struct {
			name     string
			from, to netip.AddrPort
			pass     func([]byte) [][]byte
			source   netip.Addr
			dest     netip.Addr
		}{
			{"out", netip.AddrPortFrom(inner, port2), netip.AddrPortFrom(world, 9), r.out, public, world},
			{"in", netip.AddrPortFrom(world, 9), netip.AddrPortFrom(public, port2), r.in, world, inner},
		} {
			whole := datagram(packet.UDP, way.from, way.to, 4000)
			var parts [][]byte
			if !packet.Fragment(whole, 1280, 77, func(n int) []byte {
				b := make([]byte, n)
				parts = append(parts, b)
				return b
			}) || len(parts) < 4 {
				t.Fatal("can't make fragments")
			}
			slices.Reverse(parts)
			var got [][]byte
			for i, p := range parts {
				got = way.pass(p)
				if i < len(parts)-1 && len(got) != 0 {
					t.Fatalf("%s: something went on before the datagram was whole", way.name)
				}
			}
			if len(got) < 3 {
				t.Fatalf("%s: %d fragments went on", way.name, len(got))
			}
			again := packet.NewReassembler(packet.ReassemblyLimits{})
			var result []byte
			for _, p := range got {
				var v packet.View
				if v.Parse(p) != packet.OK || len(p) > 1400 || v.Source != way.source || v.Destination != way.dest {
					t.Fatalf("%s: fragment of %d bytes from %v to %v", way.name, len(p), v.Source, v.Destination)
				}
				result, _ = again.Add(&v, time.Now())
			}
			v := one(t, [][]byte{result})
			valid(t, v)
			if !bytes.Equal(v.Payload(), whole[len(whole)-4000:]) {
				t.Errorf("%s: the payload was changed", way.name)
			}
		}
	})
	// A part of what contradicts itself goes nowhere.
	p := datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv4(2), port2), netip.AddrPortFrom(tunWorld4, 9), 2000)
	var parts [][]byte
	packet.Fragment(p, 1280, 0, func(n int) []byte { b := make([]byte, n); parts = append(parts, b); return b })
	if got := r.out(slices.Clone(parts[0])); len(got) != 0 {
		t.Error("a first fragment went out alone")
	}
	parts[0][30] ^= 1
	r.dropped(TunDropFragment, func() [][]byte { return r.out(parts[0]) })
}

// A client can't say what no host says: errors to others than the quoted packet's
// sender, redirects, answers to what nobody could ask it.
func TestTunForgedControl(t *testing.T) {
	r := newTunRig(t)
	other := map[bool]netip.Addr{true: netip.MustParseAddr("192.0.2.99"), false: netip.MustParseAddr("2001:db8:99::9")}
	families(func(inner, public, world netip.Addr) {
		about := datagram(packet.UDP, netip.AddrPortFrom(world, 53), netip.AddrPortFrom(inner, port2), 60)
		good := icmpError(t, inner, about, packet.PortUnreachable, 0)
		if got := r.out(slices.Clone(good)); len(got) != 1 {
			t.Fatal("an honest error was dropped")
		}
		r.dropped(TunDropQuote, func() [][]byte {
			return r.out(summed(requote(slices.Clone(good), inner, other[inner.Is4()])))
		})
		third := testInner.IPv4(3)
		if inner.Is6() {
			third = testInner.IPv6(3)
		}
		foreign := icmpError(t, third, datagram(packet.UDP, netip.AddrPortFrom(world, 53), netip.AddrPortFrom(third, port2), 60), packet.PortUnreachable, 0)
		r.dropped(TunDropQuote, func() [][]byte { return r.out(summed(requote(foreign, inner, world))) })
		if inner.Is4() {
			redirect := slices.Clone(good)
			redirect[20] = icmpRedirect
			r.dropped(TunDropQuote, func() [][]byte { return r.out(summed(redirect)) })
		}
		// An any-port client's, too, whose identifiers are mapped; 0 is one.
		nine := testInner.IPv4(9)
		if inner.Is6() {
			nine = testInner.IPv6(9)
		}
		for _, id := range []uint16{0, 7} {
			r.dropped(TunDropProtocol, func() [][]byte { return r.out(ping(nine, world, true, id)) })
		}
		if got := r.out(ping(nine, world, false, 0)); len(got) != 1 {
			t.Error("a ping with the identifier 0 was dropped")
		}
	})
}

// Clients with an address of their own in a prefix have all of its ports, and
// nobody else's address.
func TestTunPrefix(t *testing.T) {
	r := newTunRig(t)
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{tunEgress4}, nil, netip.MustParsePrefix("2001:db8:e::/64"))
	if err != nil {
		t.Fatal(err)
	}
	r.Plan = &plan
	own := netip.MustParseAddr("2001:db8:e::2")
	for _, port := range []uint16{1, 53, 5000, 65535} {
		v := one(t, r.out(datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv6(2), port), netip.AddrPortFrom(tunWorld6, 53), 10)))
		valid(t, v)
		if v.Source != own || v.SourcePort != port {
			t.Errorf("left as %v:%d", v.Source, v.SourcePort)
		}
		v = one(t, r.in(datagram(packet.UDP, netip.AddrPortFrom(tunWorld6, 53), netip.AddrPortFrom(own, port), 10)))
		if v.Destination != testInner.IPv6(2) || v.DestinationPort != port {
			t.Errorf("came to %v:%d", v.Destination, v.DestinationPort)
		}
	}
	v := one(t, r.in(icmpError(t, tunWorld6, r.out(ping(testInner.IPv6(2), tunWorld6, false, 1))[0], packet.TimeExceeded, 0)))
	valid(t, v)
	if v.Destination != testInner.IPv6(2) {
		t.Errorf("an error came to %v", v.Destination)
	}
	for _, to := range []string{"2001:db8:e::", "2001:db8:e:1::2", "2001:db8:e::1:0:0:2"} {
		r.dropped(TunDropNobody, func() [][]byte {
			return r.in(datagram(packet.UDP, netip.AddrPortFrom(tunWorld6, 53), netip.AddrPortFrom(netip.MustParseAddr(to), 80), 10))
		})
	}
	// Between two of them nothing leaves.
	if got := r.out(datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv6(2), 80), netip.MustParseAddrPort("[2001:db8:e::3]:80"), 10)); len(got) != 0 {
		t.Error("it left")
	}
	if v := one(t, r.host.in); v.Destination != testInner.IPv6(3) || v.Source != own {
		t.Errorf("came as %v to %v", v.Source, v.Destination)
	}
}

// Between the public ports of two clients nothing leaves the cluster.
func TestTunHairpin(t *testing.T) {
	r := newTunRig(t)
	p := datagram(packet.TCP, netip.AddrPortFrom(testInner.IPv4(2), port2), netip.AddrPortFrom(tunEgress4, 1024+2*1024+7), 50)
	if got := r.out(p); len(got) != 0 {
		t.Error("it left")
	}
	v := one(t, r.host.in)
	if v.Source != tunEgress4 || v.SourcePort != port2 || v.Destination != testInner.IPv4(3) || v.DestinationPort != 1024+2*1024+7 {
		t.Errorf("came as %v:%d to %v:%d", v.Source, v.SourcePort, v.Destination, v.DestinationPort)
	}
	if n := r.stats().Hairpinned; n != 1 {
		t.Errorf("%d counted", n)
	}
	r.dropped(TunDropNobody, func() [][]byte {
		r.out(datagram(packet.TCP, netip.AddrPortFrom(testInner.IPv4(2), port2), netip.AddrPortFrom(tunEgress4, 80), 50))
		return r.host.in
	})
}

// A leased block is the client's until it is given back, on its own address.
func TestTunLeases(t *testing.T) {
	r := newTunRig(t)
	const block = 120 // position 56 on the second address
	place, ok := r.Plan.Block(block)
	if !ok || place.IPv4 != tunEgress42 {
		t.Fatalf("block %d is at %v", block, place)
	}
	p := func() []byte {
		return datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv4(2), place.First+9), netip.AddrPortFrom(tunWorld4, 53), 10)
	}
	r.dropped(TunDropPort, func() [][]byte { return r.out(p()) })
	r.leases.Set(block, 2, time.Now().Add(time.Hour))
	v := one(t, r.out(p()))
	if v.Source != tunEgress42 || v.SourcePort != place.First+9 {
		t.Errorf("left as %v:%d", v.Source, v.SourcePort)
	}
	back := datagram(packet.UDP, netip.AddrPortFrom(tunWorld4, 53), netip.AddrPortFrom(tunEgress42, place.First+9), 10)
	if v := one(t, r.in(slices.Clone(back))); v.Destination != testInner.IPv4(2) {
		t.Errorf("came to %v", v.Destination)
	}
	r.leases.Drop(block)
	r.dropped(TunDropPort, func() [][]byte { return r.out(p()) })
}

// An any-port client's ports are mapped into its block; what servers need to
// know of it is published once.
func TestTunAnyPort(t *testing.T) {
	r := newTunRig(t)
	inner := testInner.IPv4(9)
	place, _ := r.Plan.Of(9)
	send := func(port uint16) *packet.View {
		v := one(t, r.out(datagram(packet.UDP, netip.AddrPortFrom(inner, port), netip.AddrPortFrom(tunWorld4, 53), 10)))
		valid(t, v)
		return v
	}
	v := send(40000)
	public := v.SourcePort
	if v.Source != tunEgress4 || public < place.First || public > place.Last {
		t.Fatalf("left as %v:%d", v.Source, public)
	}
	if again := send(40000).SourcePort; again != public {
		t.Errorf("the same port left as %d, then %d", public, again)
	}
	if len(r.published) != 1 || r.published[0].Inner != 40000 || r.published[0].Public != public || r.published[0].Client != 9 {
		t.Errorf("published %v", r.published)
	}
	back := one(t, r.in(datagram(packet.UDP, netip.AddrPortFrom(tunWorld4, 53), netip.AddrPortFrom(tunEgress4, public), 10)))
	if back.Destination != inner || back.DestinationPort != 40000 {
		t.Errorf("came to %v:%d", back.Destination, back.DestinationPort)
	}
	sent := datagram(packet.UDP, netip.AddrPortFrom(inner, 40000), netip.AddrPortFrom(tunWorld4, 53), 10)
	left := r.out(slices.Clone(sent))[0]
	e := one(t, r.in(icmpError(t, tunWorld4, left, packet.PortUnreachable, 0)))
	valid(t, e)
	var q packet.View
	if e.Quoted(&q) != packet.OK || q.SourcePort != 40000 || q.Source != inner {
		t.Errorf("an error quotes %v:%d", q.Source, q.SourcePort)
	}
	request := one(t, r.out(ping(inner, tunWorld4, false, 7)))
	valid(t, request)
	reply := one(t, r.in(ping(tunWorld4, tunEgress4, true, request.SourcePort)))
	valid(t, reply)
	if reply.DestinationPort != 7 || reply.Destination != inner {
		t.Errorf("a pong came to %v, id %d", reply.Destination, reply.DestinationPort)
	}
	r.dropped(TunDropNobody, func() [][]byte {
		return r.in(datagram(packet.UDP, netip.AddrPortFrom(tunWorld4, 53), netip.AddrPortFrom(tunEgress4, public^1), 10))
	})
}

// Nothing is kept for an any-port client that is taken off the list.
func TestTunForgetsClient(t *testing.T) {
	r := newServerRig(t, withDevice(t))
	e := r.egress.(*tunEgress)
	t.Cleanup(func() { e.Services.stack.Close() })
	for _, n := range []uint32{8, 9} { // 8 isn't one
		(*news)(r.Server).Mapping(registry.Mapping{Client: n, Protocol: byte(packet.UDP), Inner: 40000, Public: 9999, Since: 1})
	}
	if got := e.nat.Stats().Mappings; got != 1 {
		t.Errorf("%d mappings, want 1", got)
	}
	r.table.peer(9)
	r.cfg.Clients.(*Directory).Replace(r.list[:8])
	r.Reload()
	if got := e.nat.Stats().Mappings; got != 0 {
		t.Errorf("%d mappings are left", got)
	}
}

// Egress addresses answer pings, since the host behind them doesn't.
func TestTunAnswersPings(t *testing.T) {
	r := newTunRig(t)
	families(func(_, public, world netip.Addr) {
		far := ping(world, public, false, 99) // the last hop it could make
		if world.Is4() {
			far[8] = 1
		} else {
			far[7] = 1
		}
		if got := r.in(summed(far)); len(got) != 0 {
			t.Error("a client got it")
		}
		v := one(t, r.host.out)
		valid(t, v)
		if v.TTL < 64 {
			t.Errorf("the answer has %d hops to go", v.TTL)
		}
		if v.Source != public || v.Destination != world || v.DestinationPort != 99 {
			t.Errorf("answered from %v to %v, id %d", v.Source, v.Destination, v.DestinationPort)
		}
	})
}

// The servers' own services answer inside.
func TestTunServices(t *testing.T) {
	r := newTunRig(t)
	egressUntil(t, "the services run", func() bool { return r.Services.running.Load() })
	r.out(ping(testInner.IPv4(2), testInner.IPv4(session.Gateway), false, 1))
	egressUntil(t, "the gateway answers a ping", func() bool {
		r.host.mu.Lock()
		defer r.host.mu.Unlock()
		return len(r.host.in) == 1
	})
}

func BenchmarkTunOut(b *testing.B) {
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{tunEgress4}, nil, netip.Prefix{})
	if err != nil {
		b.Fatal(err)
	}
	e := newTunEgress(tunConfig{
		Device: discard{}, Plan: &plan, Leases: new(portblock.Leases), Inner: testInner,
		AnyPort: func(uint32) bool { return false }, MTU: 1400, Policy: newEgressPolicy(nil, false),
	})
	const batch = 44
	pkts := make([][]byte, batch)
	fresh := datagram(packet.UDP, netip.AddrPortFrom(testInner.IPv4(2), port2), netip.AddrPortFrom(tunWorld4, 80), 1300)
	for i := range pkts {
		pkts[i] = slices.Clone(fresh)
	}
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range pkts {
			copy(p[:28], fresh)
		}
		e.Input(pkts)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
}

type discard struct{}

func (discard) ReadBatch() ([][]byte, error) { return nil, net.ErrClosed }
func (discard) WriteBatch([][]byte)          {}
func (discard) Close() error                 { return nil }

// rush is an outer socket that always has something to read, were it rubbish.
type rush struct {
	closed atomic.Bool
	sent   chan int
}

func (r *rush) ReadBatch() ([]udp.Group, error) {
	if r.closed.Load() {
		return nil, net.ErrClosed
	}
	return []udp.Group{{Packets: [][]byte{{0}}}}, nil
}

func (r *rush) WriteBatch(pkts [][]byte, _ udp.Endpoint) error {
	select {
	case r.sent <- len(pkts):
	default:
	}
	return nil
}

func (*rush) LocalAddr() netip.AddrPort { return netip.MustParseAddrPort("203.0.113.1:4444") }
func (r *rush) Close() error            { r.closed.Store(true); return nil }

// lazyDevice has packets that its reader never gets to see.
type lazyDevice struct {
	tunHost
	waiting []byte
}

func (d *lazyDevice) TryRead(handle func([][]byte)) {
	if d.waiting != nil {
		handle([][]byte{d.waiting})
		d.waiting = nil
	}
}

// A socket that always has datagrams must not keep the device waiting.
func TestReceiveLoopPollsTheDevice(t *testing.T) {
	conn := &rush{sent: make(chan int, 1)}
	fresh := datagram(packet.UDP, netip.AddrPortFrom(testWorld, 80), netip.AddrPortFrom(tunEgress4, port2), 100)
	device := &lazyDevice{tunHost: tunHost{closed: make(chan struct{})}, waiting: room(len(fresh))}
	copy(inside(device.waiting), fresh)
	r := newServerRig(t, withDevice(t), func(c *Config) { c.Conns, c.Device = []udp.Conn{conn}, device })
	g := granted(t, r.cluster, 2, time.Now())
	(*news)(r.Server).Location(registry.Location{
		Client: 2, Session: g.SessionID, Epoch: byte(g.Epoch), Counter: 1, Local: testService,
		Endpoint: netip.MustParseAddrPort("10.0.0.1:1"),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	select {
	case n := <-conn.sent:
		if n != 1 {
			t.Errorf("%d packets were sent, want 1", n)
		}
	case <-time.After(time.Minute):
		t.Error("the device's packet was never read")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
