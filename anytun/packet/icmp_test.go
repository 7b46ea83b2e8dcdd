package packet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var (
	gateway4 = netip.MustParseAddr("100.64.0.0")
	gateway6 = netip.MustParseAddr("fd00::ffff")
)

func gateway(v *View) netip.Addr {
	if v.Version == 6 {
		return gateway6
	}
	return gateway4
}

func TestAppendError(t *testing.T) {
	kinds := map[ErrorKind][4]uint8{
		NetUnreachable:  {3, 0, 1, 0},
		HostUnreachable: {3, 1, 1, 3},
		PortUnreachable: {3, 3, 1, 4},
		AdminProhibited: {3, 13, 1, 1},
		TooBig:          {3, 4, 2, 0},
		TimeExceeded:    {11, 0, 3, 0},
	}
	for kind, want := range kinds {
		for _, size := range []int{0, 100, 1400} {
			for _, p := range [][]byte{
				ip4(UDP, udpDatagram(false, string(make([]byte, size)))),
				ip6(UDP, udpDatagram(true, string(make([]byte, size)))),
			} {
				var v, e, q View
				if r := v.Parse(p); r != OK {
					t.Fatal(r)
				}
				before := bytes.Clone(p)
				b, ok := v.AppendError([]byte("head"), gateway(&v), kind, 1280)
				if !ok || string(b[:4]) != "head" || !bytes.Equal(p, before) {
					t.Fatalf("kind %d: %v", kind, ok)
				}
				b = b[4:]
				if r := e.Parse(b); r != OK || len(e.Bytes) != len(b) {
					t.Fatalf("kind %d: %v", kind, r)
				}
				kind4, kind6, limit := [2]uint8{want[0], want[1]}, [2]uint8{want[2], want[3]}, 576
				if v.Version == 6 {
					kind4, limit = kind6, 1280
				}
				if got := [2]uint8{e.ICMPType, e.ICMPCode}; got != kind4 {
					t.Errorf("type and code %v, want %v", got, kind4)
				}
				if e.Source != gateway(&v) || e.Destination != v.Source || !e.IsICMPError() || e.HasPorts {
					t.Errorf("%v → %v", e.Source, e.Destination)
				}
				verify(t, "error", &e)
				header := len(b) - len(e.Payload())
				if wantLen := min(limit, header+len(p)); len(b) != wantLen {
					t.Errorf("%d bytes, want %d", len(b), wantLen)
				}
				if !bytes.HasPrefix(p, e.Payload()) {
					t.Error("doesn't quote the packet")
				}
				mtu, ok := e.MTU()
				if ok != (kind == TooBig) || ok && mtu != 1280 {
					t.Errorf("MTU %d, %v", mtu, ok)
				}
				if r := e.Quoted(&q); r != OK || q.Source != v.Source || q.SourcePort != v.SourcePort || q.DestinationPort != v.DestinationPort {
					t.Errorf("quoted %v: %v:%d", r, q.Source, q.SourcePort)
				}
			}
		}
	}
	var v View
	v.Parse(ip4(UDP, udpDatagram(false, "")))
	if _, ok := v.AppendError(nil, gateway4, TimeExceeded+1, 0); ok {
		t.Error("unknown kind accepted")
	}
	if _, ok := v.AppendError(nil, gateway6, HostUnreachable, 0); ok {
		t.Error("gateway of the other family accepted")
	}
}

// TestErrorsRefused are the cases of RFC 1122 section 3.2.2 and RFC 4443 section
// 2.4 e.
func TestErrorsRefused(t *testing.T) {
	with := func(b []byte, src, dst string) []byte {
		b = bytes.Clone(b)
		var v View
		v.Parse(b)
		if src != "" {
			v.SetSource(netip.MustParseAddr(src))
		}
		if dst != "" {
			v.SetDestination(netip.MustParseAddr(dst))
		}
		return b
	}
	udp4, udp6 := ip4(UDP, udpDatagram(false, "")), ip6(UDP, udpDatagram(true, ""))
	for name, b := range map[string][]byte{
		"error v4":             ip4(ICMPv4, icmpMessage(false, 3, 1, "\x00\x00\x00\x00")),
		"redirect v4":          ip4(ICMPv4, icmpMessage(false, 5, 1, "\x00\x00\x00\x00")),
		"source quench":        ip4(ICMPv4, icmpMessage(false, 4, 0, "\x00\x00\x00\x00")),
		"parameter problem v4": ip4(ICMPv4, icmpMessage(false, 12, 0, "\x00\x00\x00\x00")),
		"error v6":             ip6(ICMPv6, icmpMessage(true, 1, 1, "\x00\x00\x00\x00")),
		"unknown error v6":     ip6(ICMPv6, icmpMessage(true, 127, 1, "\x00\x00\x00\x00")),
		"redirect v6":          ip6(ICMPv6, icmpMessage(true, 137, 0, "\x00\x00\x00\x00")),
		"later fragment v4":    fragment4(ip4(UDP, []byte("rest")), 1480, false),
		"later fragment v6":    ip6(FragmentHeader, fragment6(UDP, 1480, false, []byte("rest"))),
		"from 0.0.0.0":         with(udp4, "0.0.0.0", ""),
		"from broadcast":       with(udp4, "255.255.255.255", ""),
		"from multicast":       with(udp4, "224.0.0.1", ""),
		"from loopback":        with(udp4, "127.0.0.1", ""),
		"to broadcast":         with(udp4, "", "255.255.255.255"),
		"to multicast":         with(udp4, "", "239.1.2.3"),
		"from ::":              with(udp6, "::", ""),
		"from ff02::1":         with(udp6, "ff02::1", ""),
		"from ::1":             with(udp6, "::1", ""),
		"to ff02::1":           with(udp6, "", "ff02::1"),
	} {
		var v View
		if r := v.Parse(b); r != OK {
			t.Errorf("%s: %v", name, r)
			continue
		}
		if got, ok := v.AppendError(nil, gateway(&v), HostUnreachable, 0); ok || len(got) != 0 {
			t.Errorf("%s: answered", name)
		}
	}
	var v View
	v.Parse(with(udp6, "", "ff02::1"))
	if _, ok := v.AppendError(nil, gateway6, TooBig, 1280); !ok {
		t.Error("an IPv6 multicast sender must hear of the path MTU")
	}
	v.Parse(ip4(ICMPv4, icmpMessage(false, 8, 0, "\x00\x00\x00\x00")))
	if _, ok := v.AppendError(nil, gateway4, HostUnreachable, 0); !ok {
		t.Error("an echo request may be answered with an error")
	}
}

// TestQuotedRewrite is what a translator does with an error from outside: the
// quoted packet's source becomes the inner one again.
func TestQuotedRewrite(t *testing.T) {
	var v, q, w View
	for _, s := range samples() {
		if !s.want.isError {
			continue
		}
		b := bytes.Clone(s.bytes)
		if v.Parse(b) != OK || v.Quoted(&q) != OK {
			t.Fatal(s.name)
		}
		inner := src4.Next()
		if v.Version == 6 {
			inner = src6.Next()
		}
		if !q.SetSource(inner) || !q.SetSourcePort(4321) || !v.SetDestination(inner) || !v.FillChecksums() {
			t.Fatalf("%s: refused", s.name)
		}
		if w.Parse(b) != OK {
			t.Fatal(s.name)
		}
		verify(t, s.name, &w)
		if w.Destination != inner || w.Quoted(&q) != OK || q.Source != inner || q.SourcePort != 4321 {
			t.Errorf("%s: %v quotes %v:%d", s.name, w.Destination, q.Source, q.SourcePort)
		}
		// The quotation is whole here, so its own checksums can be judged.
		if !q.ChecksumsValid() {
			t.Errorf("%s: quoted checksums", s.name)
		}
		verify(t, s.name+", quoted", &q)
	}
}

// TestShortQuote: eight bytes of TCP are enough for the ports, and for no checksum.
func TestShortQuote(t *testing.T) {
	whole := ip4(TCP, tcpSegment(false, "hello"))
	var q View
	if r := q.ParseQuoted(whole[:28]); r != OK || !q.HasPorts || q.SourcePort != 1234 || q.DestinationPort != 443 || q.TCPFlags != 0 {
		t.Fatalf("%v: %+v", r, q)
	}
	if r := q.ParseQuoted(whole[:27]); r == OK {
		t.Error("seven bytes are too few")
	}
	short := bytes.Clone(whole[:28])
	q.ParseQuoted(short)
	q.SetSource(netip.MustParseAddr("10.0.0.9"))
	q.SetSourcePort(99)
	if !header.IPv4(short).IsChecksumValid() || binary.BigEndian.Uint16(short[20:]) != 99 {
		t.Errorf("%x", short)
	}
	if q.FillChecksums() {
		t.Error("a TCP checksum was computed without its data")
	}
	if _, ok := q.AppendError(nil, gateway4, HostUnreachable, 0); ok {
		t.Error("an error about a quotation")
	}
}

func TestQuotedOfOther(t *testing.T) {
	var v, q View
	v.Parse(ip4(UDP, udpDatagram(false, "")))
	if r := v.Quoted(&q); r == OK {
		t.Error("UDP quotes nothing")
	}
	if _, ok := v.MTU(); ok {
		t.Error("UDP tells no MTU")
	}
}

// FuzzView parses anything, changes what can be changed, and checks that valid
// checksums stay valid.
func FuzzView(f *testing.F) {
	for _, s := range samples() {
		f.Add(s.bytes)
	}
	var v View
	for _, b := range [][]byte{ip4(TCP, tcpSegment(false, "hello")), ip6(TCP, tcpSegment(true, "hello"))} {
		v.Parse(b)
		e, _ := v.AppendError(nil, gateway(&v), TooBig, 1280)
		f.Add(e)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		data = bytes.Clone(data)
		var v, q, w View
		if q.ParseQuoted(bytes.Clone(data)) == OK {
			rewriteAll(&q)
			q.FillChecksums()
		}
		if v.Parse(data) != OK {
			return
		}
		if len(v.Upper()) < len(v.Payload()) || len(v.Bytes) > len(data) {
			t.Fatalf("%d bytes, upper %d, payload %d", len(v.Bytes), len(v.Upper()), len(v.Payload()))
		}
		if v.Version == 4 && v.Protocol == TCP && v.HasPorts {
			g := header.TCP(header.IPv4(v.Bytes).Payload())
			if g.SourcePort() != v.SourcePort || uint8(g.Flags()) != v.TCPFlags || !bytes.Equal(g.Payload(), v.Payload()) {
				t.Fatal("gVisor sees another segment")
			}
		}
		v.Quoted(&q)
		v.MTU()
		v.FillChecksums()
		// Without its checksum a UDP datagram over IPv6 is filled, too.
		if !v.ChecksumsValid() {
			t.Fatal("not valid after FillChecksums")
		}
		hops := v.TTL
		rewriteAll(&v)
		if hops > 1 && v.TTL != hops-1 {
			t.Fatalf("ttl %d after %d", v.TTL, hops)
		}
		if r := w.Parse(data); r != OK {
			t.Fatalf("rewritten: %v", r)
		}
		if !w.ChecksumsValid() {
			t.Fatal("not valid after rewriting")
		}
		e, ok := w.AppendError(nil, gateway(&w), AdminProhibited, 0)
		if !ok {
			return
		}
		if r := v.Parse(e); r != OK || !v.ChecksumsValid() || !v.IsICMPError() {
			t.Fatalf("error made: %v", r)
		}
		if r := v.Quoted(&q); r != OK || q.Source != w.Source || q.HasPorts != w.HasPorts || q.SourcePort != w.SourcePort {
			t.Fatalf("quoted: %v", r)
		}
	})
}
