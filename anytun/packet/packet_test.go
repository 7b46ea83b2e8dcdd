package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The packets here are made by gVisor's header package, which shares nothing with
// the code under test.

var (
	src4, dst4 = netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("198.51.100.7")
	src6, dst6 = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("2001:db8::7")
)

func gaddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// ip4 and ip6 put an upper layer into a packet.
func ip4(p Protocol, upper []byte, options ...byte) []byte {
	b := make([]byte, 20+len(options), 20+len(options)+len(upper))
	copy(b[20:], options)
	header.IPv4(b).Encode(&header.IPv4Fields{
		TotalLength: uint16(len(b) + len(upper)), TTL: 64, Protocol: uint8(p),
		SrcAddr: gaddr(src4), DstAddr: gaddr(dst4),
	})
	header.IPv4(b).SetHeaderLength(uint8(len(b)))
	header.IPv4(b).SetChecksum(0)
	header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	return append(b, upper...)
}

func ip6(p Protocol, upper []byte) []byte {
	b := make([]byte, 40, 40+len(upper))
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(upper)), TransportProtocol: tcpip.TransportProtocolNumber(p),
		HopLimit: 64, SrcAddr: gaddr(src6), DstAddr: gaddr(dst6),
	})
	return append(b, upper...)
}

// pseudo is the sum of the pseudo header of n bytes of upper layer.
func pseudo(six bool, p Protocol, n int) uint16 {
	s, d := src4, dst4
	if six {
		s, d = src6, dst6
	}
	return header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(p), gaddr(s), gaddr(d), uint16(n))
}

func tcpSegment(six bool, payload string) []byte {
	b := make([]byte, 24, 24+len(payload))
	header.TCP(b).Encode(&header.TCPFields{
		SrcPort: 1234, DstPort: 443, SeqNum: 1, AckNum: 2, DataOffset: 24,
		Flags: header.TCPFlagSyn | header.TCPFlagAck, WindowSize: 100,
	})
	copy(b[20:], []byte{2, 4, 5, 180})
	b = append(b, payload...)
	sum := twinSum([]byte(payload), pseudo(six, TCP, len(b)))
	header.TCP(b).SetChecksum(^header.TCP(b).CalculateChecksum(sum))
	return b
}

func udpDatagram(six bool, payload string) []byte {
	b := make([]byte, 8, 8+len(payload))
	header.UDP(b).Encode(&header.UDPFields{SrcPort: 1234, DstPort: 53, Length: uint16(8 + len(payload))})
	b = append(b, payload...)
	sum := twinSum([]byte(payload), pseudo(six, UDP, len(b)))
	header.UDP(b).SetChecksum(^header.UDP(b).CalculateChecksum(sum))
	return b
}

func icmpMessage(six bool, kind, code uint8, rest string) []byte {
	b := append([]byte{kind, code, 0, 0}, rest...)
	initial := uint16(0)
	if six {
		initial = pseudo(true, ICMPv6, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^twinSum(b, initial))
	return b
}

// extension is an IPv6 extension header of 8·(1+more) bytes.
func extension(next Protocol, more int, inner []byte) []byte {
	b := make([]byte, 8*(1+more))
	b[0], b[1] = uint8(next), uint8(more)
	return append(b, inner...)
}

func fragment6(next Protocol, offset uint16, more bool, inner []byte) []byte {
	b := []byte{uint8(next), 0, 0, 0, 0, 0, 0x12, 0x34}
	if more {
		offset |= 1
	}
	binary.BigEndian.PutUint16(b[2:], offset)
	return append(b, inner...)
}

// fragment4 makes a fragment of an IPv4 packet's header and keeps its checksum right.
func fragment4(b []byte, offset uint16, more bool) []byte {
	flags := uint8(0)
	if more {
		flags = header.IPv4FlagMoreFragments
	}
	header.IPv4(b).SetFlagsFragmentOffset(flags, offset)
	header.IPv4(b).SetID(0x1234)
	header.IPv4(b).SetChecksum(0)
	header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	return b
}

// wants are a View's fields that a sample is about.
type wants struct {
	protocol         Protocol
	hasPorts         bool
	srcPort, dstPort uint16
	payload          string
	flags            uint8
	fragmented, more bool
	offset           int
	isError          bool
}

type sample struct {
	name  string
	bytes []byte
	want  wants
}

func samples() []sample {
	both := func(name string, p4, p6 Protocol, upper func(six bool) []byte, want wants) []sample {
		w4, w6 := want, want
		w4.protocol, w6.protocol = p4, p6
		return []sample{
			{name + " v4", ip4(p4, upper(false)), w4},
			{name + " v6", ip6(p6, upper(true)), w6},
			{name + " v4 with options", ip4(p4, upper(false), 1, 1, 7, 3, 4, 0, 0, 0), w4},
			{name + " v6 with extensions", ip6(HopByHop, extension(DestOptions, 0, extension(p6, 2, upper(true)))), w6},
			{name + " v6 atomic fragment", ip6(FragmentHeader, fragment6(p6, 0, false, upper(true))), w6},
		}
	}
	synAck := wants{hasPorts: true, srcPort: 1234, dstPort: 443, payload: "hello", flags: SYN | ACK}
	list := slices.Concat(
		both("tcp", TCP, TCP, func(six bool) []byte { return tcpSegment(six, "hello") }, synAck),
		both("udp", UDP, UDP, func(six bool) []byte { return udpDatagram(six, "hello") },
			wants{hasPorts: true, srcPort: 1234, dstPort: 53, payload: "hello"}),
		both("empty udp", UDP, UDP, func(six bool) []byte { return udpDatagram(six, "") },
			wants{hasPorts: true, srcPort: 1234, dstPort: 53}),
		both("echo", ICMPv4, ICMPv6, func(six bool) []byte {
			return icmpMessage(six, map[bool]uint8{false: 8, true: 128}[six], 0, "\x11\x22\x00\x01ping")
		}, wants{hasPorts: true, srcPort: 0x1122, payload: "ping"}),
		both("echo reply", ICMPv4, ICMPv6, func(six bool) []byte {
			return icmpMessage(six, map[bool]uint8{false: 0, true: 129}[six], 0, "\x11\x22\x00\x01pong")
		}, wants{hasPorts: true, dstPort: 0x1122, payload: "pong"}),
		both("unreachable", ICMPv4, ICMPv6, func(six bool) []byte {
			quoted := ip4(UDP, udpDatagram(false, "lost"))
			if six {
				quoted = ip6(UDP, udpDatagram(true, "lost"))
			}
			return icmpMessage(six, map[bool]uint8{false: 3, true: 1}[six], 3, "\x00\x00\x00\x00"+string(quoted))
		}, wants{isError: true, payload: "*"}),
		both("another protocol", 132, 132, func(bool) []byte { return []byte("sctp, say") }, wants{payload: "sctp, say"}),
		both("esp", ESP, ESP, func(bool) []byte { return []byte("sealed") }, wants{payload: "sealed"}),
		both("nothing", NoNext, NoNext, func(bool) []byte { return nil }, wants{}),
	)
	return append(list,
		sample{
			"authenticated v6", ip6(AH, append([]byte{uint8(TCP), 1, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9}, tcpSegment(true, "hello")...)),
			wants{protocol: TCP, hasPorts: true, srcPort: 1234, dstPort: 443, payload: "hello", flags: SYN | ACK},
		},
		sample{
			"routed v6, arrived", ip6(Routing, extension(UDP, 2, udpDatagram(true, "hello"))),
			wants{protocol: UDP, hasPorts: true, srcPort: 1234, dstPort: 53, payload: "hello"},
		},
		sample{"icmp of the other version v6", ip6(ICMPv4, []byte("\x08\x00ppiiss")), wants{protocol: ICMPv4, payload: "\x08\x00ppiiss"}},
		sample{"icmp of the other version v4", ip4(ICMPv6, []byte("\x80\x00ppiiss")), wants{protocol: ICMPv6, payload: "\x80\x00ppiiss"}},
		sample{
			"first fragment v4", fragment4(ip4(UDP, udpDatagram(false, "12345678 and so on")[:16]), 0, true),
			wants{protocol: UDP, hasPorts: true, srcPort: 1234, dstPort: 53, payload: "12345678", fragmented: true, more: true},
		},
		sample{
			"last fragment v4", fragment4(ip4(UDP, []byte("the rest of the datagram")), 1480, false),
			wants{protocol: UDP, payload: "the rest of the datagram", fragmented: true, offset: 1480},
		},
		sample{
			"first fragment v6", ip6(FragmentHeader, fragment6(UDP, 0, true, udpDatagram(true, "12345678 and so on")[:16])),
			wants{protocol: UDP, hasPorts: true, srcPort: 1234, dstPort: 53, payload: "12345678", fragmented: true, more: true},
		},
		sample{
			"middle fragment v6", ip6(FragmentHeader, fragment6(TCP, 1232, true, []byte("24 bytes of the middle.."))),
			wants{protocol: TCP, payload: "24 bytes of the middle..", fragmented: true, more: true, offset: 1232},
		},
		sample{
			"last fragment v6 of extensions", ip6(FragmentHeader, fragment6(DestOptions, 1232, false, extension(UDP, 0, []byte("!")))),
			wants{protocol: DestOptions, payload: "\x11\x00\x00\x00\x00\x00\x00\x00!", fragmented: true, offset: 1232},
		},
	)
}

func TestParse(t *testing.T) {
	var v View // reused, as on the packet path
	for _, s := range samples() {
		t.Run(s.name, func(t *testing.T) {
			// What follows the packet in the buffer is not part of it.
			if r := v.Parse(append(bytes.Clone(s.bytes), "trailing"...)); r != OK {
				t.Fatalf("%v", r)
			}
			six := s.bytes[0]>>4 == 6
			src, dst, version := src4, dst4, uint8(4)
			if six {
				src, dst, version = src6, dst6, 6
			}
			if v.Version != version || v.Source != src || v.Destination != dst || v.TTL != 64 {
				t.Errorf("IPv%d %v → %v ttl %d", v.Version, v.Source, v.Destination, v.TTL)
			}
			if !bytes.Equal(v.Bytes, s.bytes) || cap(v.Bytes) != len(s.bytes) {
				t.Errorf("%d bytes (capacity %d), want %d", len(v.Bytes), cap(v.Bytes), len(s.bytes))
			}
			if s.want.payload == "*" {
				s.want.payload = string(v.Payload())
			}
			got := wants{
				protocol: v.Protocol, hasPorts: v.HasPorts, srcPort: v.SourcePort, dstPort: v.DestinationPort,
				payload: string(v.Payload()), flags: v.TCPFlags,
				fragmented: v.Fragmented, more: v.More, offset: v.FragmentOffset, isError: v.IsICMPError(),
			}
			if got != s.want {
				t.Errorf("got  %+v\nwant %+v", got, s.want)
			}
			if v.Fragmented && v.FragmentID != 0x1234 {
				t.Errorf("fragment ID %#x", v.FragmentID)
			}
			if !v.ChecksumsValid() {
				t.Error("gVisor's checksums are not valid")
			}
		})
	}
}

// TestTruncated parses every prefix of every sample.
func TestTruncated(t *testing.T) {
	var v, q View
	for _, s := range samples() {
		for n := range s.bytes {
			prefix := bytes.Clone(s.bytes[:n:n])
			if r := v.Parse(prefix); r == OK {
				t.Errorf("%s: OK with %d of %d bytes", s.name, n, len(s.bytes))
			}
			// As a quotation it may be short, but then every setter must be
			// content with what is there.
			if r := q.ParseQuoted(prefix); r == OK {
				rewriteAll(&q)
			}
		}
	}
}

// rewriteAll calls everything that changes a packet.
func rewriteAll(v *View) {
	if v.Version == 4 {
		v.SetSource(netip.MustParseAddr("203.0.113.200"))
		v.SetDestination(netip.MustParseAddr("10.255.0.1"))
	} else {
		v.SetSource(netip.MustParseAddr("fdff:1234::99"))
		v.SetDestination(netip.MustParseAddr("2001:db8:ffff::1"))
	}
	v.SetSourcePort(0xfedc)
	v.SetDestinationPort(0x0123)
	v.DecrementTTL()
}

func TestRefused(t *testing.T) {
	mutate := func(b []byte, f func(b []byte)) []byte {
		b = bytes.Clone(b)
		f(b)
		return b
	}
	udp4, udp6 := ip4(UDP, udpDatagram(false, "hello")), ip6(UDP, udpDatagram(true, "hello"))
	tcp4 := ip4(TCP, tcpSegment(false, "hello"))
	chain := udpDatagram(true, "x")
	next := UDP
	for range 9 {
		chain, next = extension(next, 0, chain), DestOptions
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want Reason
	}{
		{"empty", nil, Truncated},
		{"version 5", mutate(udp4, func(b []byte) { b[0] = 0x55 }), BadVersion},
		{"version 0", make([]byte, 100), BadVersion},
		{"header length 4 words", mutate(udp4, func(b []byte) { b[0] = 0x44 }), BadHeader},
		{"header longer than packet", mutate(udp4, func(b []byte) { b[0] = 0x4f }), BadHeader},
		{"total length below header", mutate(udp4, func(b []byte) { b[2], b[3] = 0, 19 }), BadHeader},
		{"total length beyond end", mutate(udp4, func(b []byte) { b[3]++ }), Truncated},
		{"payload length beyond end", mutate(udp6, func(b []byte) { b[5]++ }), Truncated},
		{"option without end", ip4(UDP, udpDatagram(false, ""), 7, 9, 0, 0), BadHeader},
		{"option of length 1", ip4(UDP, udpDatagram(false, ""), 7, 1, 0, 0), BadHeader},
		{"option without length", ip4(UDP, udpDatagram(false, ""), 1, 1, 1, 7), BadHeader},
		{"loose source route", ip4(UDP, udpDatagram(false, ""), 131, 7, 4, 1, 2, 3, 4, 0), SourceRouted},
		{"strict source route", ip4(UDP, udpDatagram(false, ""), 1, 137, 7, 4, 1, 2, 3, 4), SourceRouted},
		{"routing header on the way", ip6(Routing, mutate(extension(UDP, 2, udpDatagram(true, "")), func(b []byte) { b[3] = 1 })), SourceRouted},
		{"nine extensions", ip6(next, chain), TooManyExtensions},
		{"extension beyond end", ip6(DestOptions, []byte{17, 1, 0, 0, 0, 0, 0, 0}), Truncated},
		{"fragment of a fragment", ip6(FragmentHeader, fragment6(FragmentHeader, 0, true, fragment6(UDP, 0, true, udpDatagram(true, "")))), BadHeader},
		{"ping of death v4", fragment4(ip4(ICMPv4, make([]byte, 100)), 65528, false), BadHeader},
		{"ping of death v6", ip6(FragmentHeader, fragment6(ICMPv6, 65528, false, make([]byte, 100))), BadHeader},
		{"tcp cut off", ip4(TCP, tcpSegment(false, "")[:19]), BadTransport},
		{"tcp data offset 4", mutate(tcp4, func(b []byte) { b[20+12] = 0x40 }), BadTransport},
		{"tcp data offset beyond end", mutate(tcp4, func(b []byte) { b[20+12] = 0xf0 }), BadTransport},
		{"udp cut off", ip4(UDP, udpDatagram(false, "")[:7]), BadTransport},
		{"udp length 7", mutate(udp4, func(b []byte) { b[20+5] = 7 }), BadTransport},
		{"udp length beyond end", mutate(udp4, func(b []byte) { b[20+5]++ }), BadTransport},
		{"tiny first fragment", fragment4(ip4(TCP, tcpSegment(false, "")[:8]), 0, true), BadTransport},
		{"icmp cut off", ip6(ICMPv6, []byte{128, 0, 0, 0, 0, 0, 0}), BadTransport},
	} {
		var v View
		if r := v.Parse(tt.b); r != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, r, tt.want)
		}
	}
	if r := new(View).Parse(ip6(DestOptions, chainOf(8))); r != OK {
		t.Errorf("eight extensions: %v", r)
	}
}

func chainOf(n int) []byte {
	chain, next := udpDatagram(true, "x"), UDP
	for range n {
		chain, next = extension(next, 0, chain), DestOptions
	}
	return chain
}

// TestRewrite changes everything that can be changed, in random packets, and has
// the checksums verified by gVisor.
func TestRewrite(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var v View
	for range 300 {
		for _, s := range samples() {
			b := bytes.Clone(s.bytes)
			if r := v.Parse(b); r != OK {
				t.Fatal(r)
			}
			src, dst := randomAddr(rng, v.Version), randomAddr(rng, v.Version)
			sport, dport := uint16(rng.Uint32()), uint16(rng.Uint32())
			had, payload := v, bytes.Clone(v.Payload())
			if !v.SetSource(src) || !v.SetDestination(dst) {
				t.Fatalf("%s: addresses refused", s.name)
			}
			okS, okD := v.SetSourcePort(sport), v.SetDestinationPort(dport)
			transport := v.Protocol == TCP || v.Protocol == UDP
			if wantS := had.HasPorts && (transport || had.SourcePort != 0); okS != wantS {
				t.Fatalf("%s: source port set: %v", s.name, okS)
			}
			if wantD := had.HasPorts && (transport || had.DestinationPort != 0); okD != wantD {
				t.Fatalf("%s: destination port set: %v", s.name, okD)
			}
			if !v.DecrementTTL() {
				t.Fatalf("%s: no TTL left", s.name)
			}

			var w View
			if r := w.Parse(b); r != OK {
				t.Fatalf("%s: afterwards %v", s.name, r)
			}
			if w.Source != src || w.Destination != dst || w.TTL != 63 ||
				okS && w.SourcePort != sport || okD && w.DestinationPort != dport {
				t.Fatalf("%s: %v:%d → %v:%d ttl %d", s.name, w.Source, w.SourcePort, w.Destination, w.DestinationPort, w.TTL)
			}
			if w.Source != v.Source || w.SourcePort != v.SourcePort || w.DestinationPort != v.DestinationPort || w.TTL != v.TTL {
				t.Fatalf("%s: the view differs from the packet", s.name)
			}
			if !bytes.Equal(w.Payload(), payload) {
				t.Fatalf("%s: the payload changed", s.name)
			}
			if !w.ChecksumsValid() {
				t.Fatalf("%s: checksums not valid", s.name)
			}
			verify(t, s.name, &w)
		}
	}
}

// verify is ChecksumsValid by gVisor's account.
func verify(t *testing.T, name string, v *View) {
	t.Helper()
	if v.Version == 4 && !header.IPv4(v.Bytes).IsChecksumValid() {
		t.Fatalf("%s: IPv4 header checksum", name)
	}
	if v.Fragmented {
		return
	}
	src, dst, upper := gaddr(v.Source), gaddr(v.Destination), v.Upper()
	ok := true
	switch v.Protocol {
	case TCP:
		ok = header.TCP(upper).IsChecksumValid(src, dst, twinSum(v.Payload(), 0), uint16(len(v.Payload())))
	case UDP:
		ok = header.UDP(upper).IsChecksumValid(src, dst, twinSum(v.Payload(), 0))
	case ICMPv4:
		ok = v.Version != 4 || header.ICMPv4Checksum(upper, 0) == binary.BigEndian.Uint16(upper[2:])
	case ICMPv6:
		ok = v.Version != 6 || header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: upper, Src: src, Dst: dst}) == binary.BigEndian.Uint16(upper[2:])
	default: // no checksum of its own
	}
	if !ok {
		t.Fatalf("%s: transport checksum by gVisor's account", name)
	}
}

func randomAddr(rng *rand.Rand, version uint8) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], rng.Uint64())
	binary.BigEndian.PutUint64(b[8:], rng.Uint64())
	if version == 4 {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16(b)
}

// TestFillChecksums breaks checksums and has them filled.
func TestFillChecksums(t *testing.T) {
	var v View
	for _, s := range samples() {
		b := bytes.Clone(s.bytes)
		if r := v.Parse(b); r != OK {
			t.Fatal(r)
		}
		if v.Version == 4 {
			b[10] ^= 0x55
		}
		if at := v.checksumAt(); at != 0 && !v.Fragmented {
			b[at+1] ^= 0x55
		}
		if (v.Version == 4 || v.checksumAt() != 0 && !v.Fragmented) && v.ChecksumsValid() {
			t.Errorf("%s: wrong checksums pass as valid", s.name)
		}
		if ok := v.FillChecksums(); ok == v.Fragmented {
			t.Errorf("%s: FillChecksums says %v", s.name, ok)
		}
		if !bytes.Equal(b, s.bytes) {
			t.Errorf("%s: differs from gVisor's:\n%x\n%x", s.name, b, s.bytes)
		}
	}
}

// TestUDPZeroChecksum: absent stays absent; computed as zero is written as 0xffff.
func TestUDPZeroChecksum(t *testing.T) {
	b := ip4(UDP, udpDatagram(false, "hello"))
	b[26], b[27] = 0, 0
	var v View
	if r := v.Parse(b); r != OK || !v.ChecksumsValid() {
		t.Fatalf("%v", r)
	}
	v.SetSource(netip.MustParseAddr("10.1.2.3"))
	v.SetSourcePort(9)
	if b[26] != 0 || b[27] != 0 {
		t.Error("a checksum appeared")
	}
	six := ip6(UDP, udpDatagram(true, "hello"))
	six[46], six[47] = 0, 0
	if r := v.Parse(six); r != OK || v.ChecksumsValid() {
		t.Errorf("IPv6 without UDP checksum: %v, valid", r)
	}

	// Find the source port for which the checksum is zero.
	seen := false
	b = ip4(UDP, udpDatagram(false, "hello"))
	if r := v.Parse(b); r != OK {
		t.Fatal(r)
	}
	for port := range 1 << 16 {
		v.SetSourcePort(uint16(port))
		if !v.ChecksumsValid() {
			t.Fatalf("port %d: not valid", port)
		}
		switch binary.BigEndian.Uint16(b[26:]) {
		case 0:
			t.Fatalf("port %d: checksum 0 means none", port)
		case 0xffff:
			seen = true
			v.FillChecksums()
			if b[26] != 0xff || b[27] != 0xff {
				t.Errorf("FillChecksums wrote %x", b[26:28])
			}
		}
	}
	if !seen {
		t.Error("no port gave a checksum of zero")
	}
}

func TestSettersRefuse(t *testing.T) {
	for _, s := range samples() {
		b := bytes.Clone(s.bytes)
		var v View
		v.Parse(b)
		other := src6
		if v.Version == 6 {
			other = src4
		}
		for _, a := range []netip.Addr{{}, other, netip.MustParseAddr("::ffff:1.2.3.4")} {
			if v.Version == 6 && a.Is4In6() {
				continue
			}
			if v.SetSource(a) || v.SetDestination(a) {
				t.Errorf("%s: accepted %v", s.name, a)
			}
		}
		if !bytes.Equal(b, s.bytes) {
			t.Errorf("%s: changed", s.name)
		}
	}
}

func TestDecrementTTL(t *testing.T) {
	for _, b := range [][]byte{ip4(UDP, udpDatagram(false, "")), ip6(UDP, udpDatagram(true, ""))} {
		var v View
		if r := v.Parse(b); r != OK {
			t.Fatal(r)
		}
		for want := 63; want > 0; want-- {
			if !v.DecrementTTL() || int(v.TTL) != want || !v.ChecksumsValid() {
				t.Fatalf("ttl %d, want %d", v.TTL, want)
			}
		}
		before := bytes.Clone(b)
		if v.DecrementTTL() || !bytes.Equal(b, before) {
			t.Error("went on below 1")
		}
	}
}

func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for r := range Reason(NumReasons) {
		if s := r.String(); s == "" || s == "unknown" || seen[s] {
			t.Errorf("reason %d is called %q", r, s)
		} else {
			seen[s] = true
		}
	}
	if s := Reason(NumReasons).String(); s != "unknown" {
		t.Errorf("a reason too many is called %q", s)
	}
}

func TestNoAllocations(t *testing.T) {
	list := samples()
	var v, q View
	buf := make([]byte, 0, MaxErrorLen)
	from4, from6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::ffff")
	n := testing.AllocsPerRun(100, func() {
		for _, s := range list {
			if r := v.Parse(s.bytes); r != OK {
				t.Fatal(r)
			}
			if v.IsICMPError() {
				v.Quoted(&q)
			}
			rewriteAll(&v)
			v.FillChecksums()
			v.ChecksumsValid()
			from := from4
			if v.Version == 6 {
				from = from6
			}
			v.TTL = 64
			v.AppendError(buf, from, TooBig, 1280)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParse(b *testing.B) {
	for _, s := range samples()[:2] {
		b.Run(s.name, func(b *testing.B) {
			var v View
			for b.Loop() {
				v.Parse(s.bytes)
			}
		})
	}
}

func BenchmarkRewrite(b *testing.B) {
	for _, s := range samples()[:2] {
		b.Run(s.name, func(b *testing.B) {
			var v View
			v.Parse(s.bytes)
			for b.Loop() {
				v.SetSource(v.Source)
				v.SetSourcePort(1)
			}
		})
	}
}

func BenchmarkSum(b *testing.B) {
	for _, n := range []int{20, 1400, 65535} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				Sum(p, 0)
			}
		})
	}
}
