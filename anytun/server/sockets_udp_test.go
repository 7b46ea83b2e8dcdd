package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

// egressListenUDP opens a socket on the host's loopback.
func egressListenUDP(t testing.TB, at string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	a := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at))
	network := "udp4"
	if a.IP.To4() == nil {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, a)
	if err != nil {
		if strings.Contains(at, "::1") {
			t.Skipf("this host has no IPv6 loopback: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(egressWait)); err != nil {
		t.Fatal(err)
	}
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// socket opens a UDP socket of the client.
func (r *egressRig) socket() *netstack.PacketConn {
	r.t.Helper()
	c, err := r.client.ListenUDP(netip.AddrPort{})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(egressWait)); err != nil {
		r.t.Fatal(err)
	}
	return c
}

type udpSide interface {
	ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort([]byte, netip.AddrPort) (int, error)
}

func sendUDP(t testing.TB, c udpSide, to netip.AddrPort, payload []byte) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort(payload, to); err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

func receiveUDP(t testing.TB, c udpSide) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func TestEgressUDPEcho(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(at, func(t *testing.T) {
			r := newEgressRig(t)
			h, to := egressListenUDP(t, at)
			c := r.socket()
			for _, text := range []string{"one", "", "three"} {
				sendUDP(t, c, to, []byte(text))
				got, from := receiveUDP(t, h)
				if got != text {
					t.Fatalf("host got %q, want %q", got, text)
				}
				sendUDP(t, h, from, []byte(text+"!"))
				if got, from := receiveUDP(t, c); got != text+"!" || from != to {
					t.Fatalf("client got %q from %s", got, from)
				}
			}
			egressUntil(t, "the counters", func() bool { return r.e.Stats().UDPPacketsOut == 3 }) // they come after the packets
			st := r.e.Stats()
			if st.FlowsUDP != 1 || st.UDPOpened != 1 || st.UDPPacketsOut != 3 || st.UDPPacketsIn != 3 || st.UDPBytesOut != 8 || st.UDPBytesIn != 11 {
				t.Errorf("stats: %+v", st)
			}
		})
	}
}

// TestEgressUDPMapping is RFC 4787: one client socket is one socket of the host
// whatever it sends to, and anybody may answer it.
func TestEgressUDPMapping(t *testing.T) {
	r := newEgressRig(t)
	h1, to1 := egressListenUDP(t, "127.0.0.1:0")
	h2, to2 := egressListenUDP(t, "127.0.0.1:0")
	stranger, at3 := egressListenUDP(t, "127.0.0.1:0")
	c := r.socket()
	sendUDP(t, c, to1, []byte("a"))
	sendUDP(t, c, to2, []byte("b"))
	_, from1 := receiveUDP(t, h1)
	_, from2 := receiveUDP(t, h2)
	if from1 != from2 {
		t.Errorf("one socket became %s and %s", from1, from2)
	}
	sendUDP(t, h2, from1, []byte("two"))
	if got, from := receiveUDP(t, c); got != "two" || from != to2 {
		t.Errorf("got %q from %s", got, from)
	}
	sendUDP(t, stranger, netip.AddrPortFrom(loopback4, from1.Port()), []byte("three"))
	if got, from := receiveUDP(t, c); got != "three" || from != at3 {
		t.Errorf("got %q from %s", got, from)
	}
	other := r.socket()
	sendUDP(t, other, to1, []byte("c"))
	if _, from := receiveUDP(t, h1); from == from1 {
		t.Error("two sockets of the client share one of the host")
	}
	if n := r.e.Stats().FlowsUDP; n != 2 {
		t.Errorf("%d mappings, want 2", n)
	}
}

// TestEgressUDPBig sends datagrams that need fragments inside the tunnel, up to
// the largest there is.
func TestEgressUDPBig(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	c := r.socket()
	for _, size := range []int{egressTestMTU - 28, egressTestMTU - 27, 9000, 65507} {
		sent := make([]byte, size)
		for i := range sent {
			sent[i] = byte(rand.Uint32())
		}
		sendUDP(t, c, to, sent)
		got, from := receiveUDP(t, h)
		if !bytes.Equal([]byte(got), sent) {
			t.Fatalf("%d bytes up: other ones arrived (%d)", size, len(got))
		}
		sendUDP(t, h, from, sent)
		if got, _ := receiveUDP(t, c); !bytes.Equal([]byte(got), sent) {
			t.Fatalf("%d bytes down: other ones arrived (%d)", size, len(got))
		}
	}
}

// TestEgressUDPTrain sends many datagrams at once to the client, of the sizes
// that make trouble when they are read and written in batches.
func TestEgressUDPTrain(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	c := r.socket()
	sendUDP(t, c, to, []byte("hello"))
	_, from := receiveUDP(t, h)
	for _, size := range []int{1, 100, 1200, 1372, 1373} {
		const n = 50
		for i := range n {
			b := make([]byte, size)
			b[0] = byte(i)
			if i == n-1 && size > 2 {
				b = b[:size/2]
			}
			sendUDP(t, h, from, b)
		}
		for i := range n {
			got, _ := receiveUDP(t, c)
			want := size
			if i == n-1 && size > 2 {
				want = size / 2
			}
			if len(got) != want || got[0] != byte(i) {
				t.Fatalf("size %d: datagram %d is number %d with %d bytes", size, i, got[0], len(got))
			}
		}
	}
}

// TestEgressUDPGather holds Output up while datagrams of two peers, some too large
// for one packet, come in: what has come goes on together, in order.
func TestEgressUDPGather(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere each datagram goes on by itself")
	}
	held, release := make(chan struct{}), make(chan struct{})
	const many = 48
	var batches atomic.Int64
	r := newEgressRig(t, func(c *socketsConfig) {
		output := c.Output
		c.Output = func(pkts [][]byte) {
			if batches.Add(1) == 1 {
				close(held)
				<-release
			}
			output(pkts)
		}
	})
	c := r.socket()
	var hosts [2]*net.UDPConn
	for i := range hosts {
		h, to := egressListenUDP(t, "127.0.0.1:0")
		sendUDP(t, c, to, []byte("open"))
		_, from := receiveUDP(t, h)
		if err := h.SetDeadline(time.Now().Add(egressWait)); err != nil {
			t.Fatal(err)
		}
		hosts[i] = h
		if i == 0 {
			sendUDP(t, h, from, []byte("0"))
			<-held
			continue
		}
		for k := 1; k <= many; k++ {
			payload := fmt.Sprint(k)
			if k%20 == 0 {
				payload += strings.Repeat(" ", 3000) // several packets
			}
			sendUDP(t, hosts[k%2], from, []byte(payload))
		}
	}
	close(release)
	for k := range many + 1 {
		got, from := receiveUDP(t, c)
		if strings.TrimSpace(got) != fmt.Sprint(k) || from != hosts[k%2].LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Fatalf("datagram %d: %.10q from %s", k, got, from)
		}
	}
	// One for the first, one for each 16, and three for each large one: the packets
	// before it, its own, and those behind it.
	if n := batches.Load(); n > 1+4+3*2 {
		t.Errorf("%d datagrams in %d batches", many+1, n)
	}
}

// TestUDPInbound cuts a train into packets, as a kernel with UDP_GRO gives it,
// and checks every byte of them.
func TestUDPInbound(t *testing.T) {
	for _, c := range []struct {
		peer, client netip.AddrPort
		total, size  int
		sizes        []int
	}{
		{netip.MustParseAddrPort("192.0.2.1:53"), netip.AddrPortFrom(egressClient4, 4000), 2500, 1000, []int{1000, 1000, 500}},
		{netip.MustParseAddrPort("192.0.2.1:53"), netip.AddrPortFrom(egressClient4, 4000), 0, 1, []int{0}},
		{netip.MustParseAddrPort("[2001:db8::1]:443"), netip.AddrPortFrom(egressClient6, 4000), 2403, 801, []int{801, 801, 801}},
		{netip.MustParseAddrPort("[2001:db8::1]:443"), netip.AddrPortFrom(egressClient6, 4000), 7, 1, []int{1, 1, 1, 1, 1, 1, 1}},
	} {
		var got [][]byte
		batches := 0
		e := &sockets{cfg: socketsConfig{MTU: egressTestMTU, Headroom: 20, Tailroom: 16, Output: func(pkts [][]byte) {
			batches++
			for _, p := range pkts {
				got = append(got, append([]byte(nil), p[20:len(p)-16]...))
			}
		}}}
		data := make([]byte, c.total)
		for i := range data {
			data[i] = byte(rand.Uint32())
		}
		out := new(egressOut)
		e.udpInbound(out, c.peer, c.client, data, c.size)
		e.flush(out)
		if len(got) != len(c.sizes) || batches != 1 {
			t.Errorf("%d bytes by %d: %d packets in %d batches", c.total, c.size, len(got), batches)
			continue
		}
		for i, b := range got {
			var p egressPacket
			if !p.parse(b) {
				t.Fatalf("packet %d is malformed", i)
			}
			from, to, payload, ok := p.udp()
			if !ok || from != c.peer || to != c.client || !bytes.Equal(payload, data[:c.sizes[i]]) {
				t.Errorf("packet %d: from %s to %s, %d bytes", i, from, to, len(payload))
			}
			data = data[c.sizes[i]:]
			hl := ipHeaderLen(c.client.Addr())
			if hl == ipv4HeaderLen && slowSum(b[:hl]) != 0xffff {
				t.Error("wrong IPv4 header checksum")
			}
			if sum := slowSum(append(pseudoHeader(b, hl), b[hl:]...)); sum != 0xffff {
				t.Errorf("wrong UDP checksum: sum %04x", sum)
			}
		}
	}
}

// pseudoHeader writes out what RFC 768 and RFC 8200 section 8.1 add to a
// checksum.
func pseudoHeader(b []byte, hl int) []byte {
	var p []byte
	proto := b[6]
	if hl == ipv4HeaderLen {
		p, proto = append(p, b[12:20]...), b[9]
	} else {
		p = append(p, b[8:40]...)
	}
	p = binary.BigEndian.AppendUint32(p, uint32(len(b)-hl))
	return append(p, 0, 0, 0, proto)
}

// slowSum is RFC 1071 by the book.
func slowSum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		if i%2 == 0 {
			sum += uint32(c) << 8
		} else {
			sum += uint32(c)
		}
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

func TestEgressUDPIdle(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	idle, used := r.socket(), r.socket()
	sendUDP(t, idle, to, []byte("a"))
	_, idleFrom := receiveUDP(t, h)
	sendUDP(t, used, to, []byte("b"))
	_, usedFrom := receiveUDP(t, h)

	r.ahead.Store(int64(defaultUDPTimeout - time.Second))
	sendUDP(t, used, to, []byte("b"))
	receiveUDP(t, h)
	// What comes in keeps nothing alive: else strangers could.
	sendUDP(t, h, idleFrom, []byte("x"))
	receiveUDP(t, idle)
	r.e.expire(time.Now().Add(defaultUDPTimeout + time.Second))
	if st := r.e.Stats(); st.FlowsUDP != 1 || st.UDPExpired != 1 {
		t.Fatalf("stats: %+v", st)
	}
	sendUDP(t, h, usedFrom, []byte("y"))
	if got, _ := receiveUDP(t, used); got != "y" {
		t.Errorf("got %q", got)
	}
	sendUDP(t, idle, to, []byte("again"))
	if got, _ := receiveUDP(t, h); got != "again" {
		t.Errorf("got %q", got)
	}
}

func TestEgressUDPForbidden(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) { c.AllowLocal = false })
	h, to := egressListenUDP(t, "127.0.0.1:0")
	icmp := make(chan []byte, 10)
	r.down.watch(func(pkt []byte) { icmp <- pkt })
	c := r.socket()
	sendUDP(t, c, to, []byte("a"))
	select {
	case b := <-icmp:
		if b[9] != protoICMP || b[20] != 3 || b[21] != 13 { // RFC 1812: administratively prohibited
			t.Errorf("client got % x", b)
		}
	case <-time.After(egressWait):
		t.Error("client hears nothing")
	}
	if st := r.e.Stats(); st.DropForbidden != 1 || st.UDPOpened != 0 {
		t.Errorf("stats: %+v", st)
	}
	if err := h.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, from, err := h.ReadFromUDPAddrPort(make([]byte, 10)); err == nil {
		t.Errorf("datagram from %s has come through", from)
	}
}

// TestEgressUDPUnreachable passes the host's ICMP errors on to the client.
func TestEgressUDPUnreachable(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux reports ICMP errors of unconnected sockets")
	}
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(at, func(t *testing.T) {
			r := newEgressRig(t)
			h, to := egressListenUDP(t, at)
			h.Close()
			icmp := make(chan []byte, 10)
			r.down.watch(func(pkt []byte) { icmp <- pkt })
			c := r.socket()
			sendUDP(t, c, to, []byte("anybody?"))
			select {
			case b := <-icmp:
				var p egressPacket
				if !p.parse(b) || p.src != to.Addr() || !bytes.HasSuffix(b, []byte("anybody?")) {
					t.Fatalf("client got % x", b)
				}
				want := []byte{3, 3}
				if p.src.Is6() {
					want = []byte{1, 4}
				}
				if !bytes.Equal(p.payload[:2], want) {
					t.Errorf("client got type and code %v, want %v", p.payload[:2], want)
				}
			case <-time.After(egressWait):
				t.Fatal("client hears nothing")
			}
			if n := r.e.Stats().UDPErrors; n != 1 {
				t.Errorf("%d errors counted", n)
			}
			// The mapping goes on: the next datagram is sent although the
			// socket had an error to tell.
			h2, to2 := egressListenUDP(t, at)
			sendUDP(t, c, to, []byte("dead"))
			sendUDP(t, c, to2, []byte("live"))
			if got, _ := receiveUDP(t, h2); got != "live" {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestEgressUDPBroadcast(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("relies on Linux's SO_BROADCAST")
	}
	s, err := openEgressUDP(false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	err = s.send([]byte("x"), netip.MustParseAddrPort("127.255.255.255:9"))
	if code, ok := unreachableOf(err); !ok || code != netstack.UnreachableProhibited {
		t.Errorf("broadcast: %v", err)
	}
}

// TestEgressUDPLimit has a client open more mappings than it may.
func TestEgressUDPLimit(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) { c.MaxFlowsPerClient = 2; c.MaxFlows = 3 })
	h, to := egressListenUDP(t, "127.0.0.1:0")
	a, b, c := r.socket(), r.socket(), r.socket()
	sendUDP(t, a, to, []byte("a"))
	receiveUDP(t, h)
	sendUDP(t, b, to, []byte("b"))
	_, fromB := receiveUDP(t, h)
	sendUDP(t, c, to, []byte("c"))
	egressUntil(t, "a refusal", func() bool { return r.e.Stats().DropClientFull == 1 })

	// Half a minute later a is the one that has been unused longest.
	r.ahead.Store(int64(defaultQuickTimeout))
	sendUDP(t, b, to, []byte("b"))
	if _, from := receiveUDP(t, h); from != fromB {
		t.Error("b has got another mapping")
	}
	sendUDP(t, c, to, []byte("c"))
	if got, _ := receiveUDP(t, h); got != "c" {
		t.Errorf("got %q", got)
	}
	if st := r.e.Stats(); st.Evicted != 1 || st.FlowsUDP != 2 {
		t.Errorf("stats: %+v", st)
	}
	sendUDP(t, b, to, []byte("b"))
	if _, from := receiveUDP(t, h); from != fromB {
		t.Error("b was evicted, not a")
	}
	// Another client still has room, up to the limit of all.
	for port := uint16(1); port <= 2; port++ {
		r.e.Input([][]byte{egressUDPPacket(netip.AddrPortFrom(egressOther4, port), to, []byte("d"))})
	}
	if got, _ := receiveUDP(t, h); got != "d" {
		t.Errorf("got %q", got)
	}
	if st := r.e.Stats(); st.DropAllFull != 1 || st.Clients != 2 {
		t.Errorf("stats: %+v", st)
	}
}

func egressUDPPacket(from, to netip.AddrPort, payload []byte) []byte {
	hl := ipHeaderLen(to.Addr())
	b := make([]byte, hl+udpHeaderLen+len(payload))
	copy(b[hl+udpHeaderLen:], payload)
	putIPHeader(b, from.Addr(), to.Addr(), protoUDP)
	putUDPHeader(b, from, to)
	return b
}

func TestEgressUDPStrange(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	from := netip.AddrPortFrom(egressClient4, 4000)
	r.e.Input([][]byte{
		egressUDPPacket(from, netip.AddrPortFrom(loopback4, 0), nil),
		egressUDPPacket(netip.AddrPortFrom(egressClient4, 0), to, nil),
		egressUDPPacket(netip.AddrPortFrom(netip.MustParseAddr("100.64.9.9"), 1), to, nil),
	})
	if st := r.e.Stats(); st.UDPDropInvalid != 2 || st.DropUnknownClient != 1 || st.Flows != 0 {
		t.Errorf("stats: %+v", st)
	}
	// Options don't hide a datagram, nor do bytes behind it.
	plain := egressUDPPacket(from, to, []byte("x"))
	b := append([]byte(nil), plain[:20]...)
	b[0] = 0x46
	b = append(b, 1, 1, 1, 0)
	b = append(b, plain[20:]...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	b = append(b, "trailer"...)
	r.e.Input([][]byte{b})
	if got, _ := receiveUDP(t, h); got != "x" {
		t.Errorf("got %q", got)
	}
}

func TestEgressUDPDrain(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	a, b := r.socket(), r.socket()
	sendUDP(t, a, to, []byte("a"))
	receiveUDP(t, h)
	r.e.Drain()
	sendUDP(t, b, to, []byte("b"))
	egressUntil(t, "a refusal", func() bool { return r.e.Stats().DropDraining == 1 })
	sendUDP(t, a, to, []byte("a2"))
	if got, _ := receiveUDP(t, h); got != "a2" {
		t.Errorf("got %q", got)
	}
}

func TestEgressUDPNoAllocs(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("package net allocates elsewhere")
	}
	if egressRaced {
		t.Skip("under the race detector sync.Pool allocates")
	}
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	pkt := egressUDPPacket(netip.AddrPortFrom(egressClient4, 4000), to, make([]byte, 1000))
	batch := [][]byte{pkt, pkt}
	r.e.Input(batch)
	receiveUDP(t, h) // the only one that is read
	if n := testing.AllocsPerRun(200, func() { r.e.Input(batch) }); n != 0 {
		t.Errorf("%v allocations for a datagram out", n)
	}
	e := &sockets{cfg: socketsConfig{MTU: egressTestMTU, Headroom: 20, Tailroom: 16, Output: func([][]byte) {}}}
	data := make([]byte, 12000)
	client, peer := netip.AddrPortFrom(egressClient4, 1), netip.MustParseAddrPort("192.0.2.1:2")
	out := new(egressOut)
	if n := testing.AllocsPerRun(200, func() {
		e.udpInbound(out, peer, client, data, 1200)
		e.flush(out)
	}); n != 0 {
		t.Errorf("%v allocations for a train in", n)
	}
}

func TestUnreachableOf(t *testing.T) {
	if _, ok := unreachableOf(errors.New("other")); ok {
		t.Error("an unknown error has a code")
	}
}
