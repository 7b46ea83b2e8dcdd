package packet

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// quoting makes an ICMP error, valid, that quotes the first n bytes of b.
func quoting(b []byte, n int) []byte {
	six := b[0]>>4 == 6
	rest := "\x00\x00\x05\x00" + string(b[:min(n, len(b))])
	if six {
		return ip6(ICMPv6, icmpMessage(true, 2, 0, rest))
	}
	return ip4(ICMPv4, icmpMessage(false, 3, 4, rest), 1, 1, 1, 0) // with options
}

// TestSetQuoted turns errors about every sample back, cut everywhere a quotation can
// be cut, and has every checksum that there is verified by gVisor.
func TestSetQuoted(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	done := 0
	for _, s := range samples() {
		var whole View
		if r := whole.Parse(s.bytes); r != OK {
			t.Fatal(r)
		}
		for cut := whole.transport; cut <= len(s.bytes); cut++ {
			for _, destination := range []bool{false, true} {
				b := quoting(s.bytes, cut)
				var v, q, w, wq View
				if r := v.Parse(b); r != OK {
					t.Fatalf("%s: %v", s.name, r)
				}
				if v.Quoted(&q) != OK {
					continue // cut too short, or a quoted error
				}
				a, port := randomAddr(rng, v.Version), uint16(rng.Uint32())
				before := bytes.Clone(b)
				set, can := v.SetQuotedSource, q.HasPorts && (!q.isICMP() || q.isICMPQuery())
				if destination {
					set, can = v.SetQuotedDestination, q.HasPorts && (!q.isICMP() || q.isICMPReply())
				}
				if ok := set(&q, a, port); ok != can {
					t.Fatalf("%s cut to %d: %v, want %v", s.name, cut, ok, can)
				} else if !ok {
					if !bytes.Equal(b, before) {
						t.Fatalf("%s cut to %d: refused, but changed", s.name, cut)
					}
					continue
				}
				done++
				if r := w.Parse(b); r != OK {
					t.Fatal(r)
				}
				verify(t, s.name, &w) // the error's own checksum
				if !w.ChecksumsValid() {
					t.Fatalf("%s cut to %d: the error isn't valid any more", s.name, cut)
				}
				if r := w.Quoted(&wq); r != OK {
					t.Fatal(r)
				}
				gotAddr, gotPort := wq.Source, wq.SourcePort
				if destination {
					gotAddr, gotPort = wq.Destination, wq.DestinationPort
				}
				if gotAddr != a || gotPort != port {
					t.Fatalf("%s cut to %d: %v:%d, want %v:%d", s.name, cut, gotAddr, gotPort, a, port)
				}
				// The quotation's own: its IP header's, and the transport's if it is
				// all there.
				if !wq.ChecksumsValid() {
					t.Fatalf("%s cut to %d: quoted checksums", s.name, cut)
				}
				if cut == len(s.bytes) {
					verify(t, s.name+", quoted", &wq)
				}
				// There and back again is as before.
				if destination {
					v.SetQuotedDestination(&q, whole.Destination, whole.DestinationPort)
				} else {
					v.SetQuotedSource(&q, whole.Source, whole.SourcePort)
				}
				if !sameButZero(b, before) {
					t.Fatalf("%s cut to %d: back again\n%x, was\n%x", s.name, cut, b, before)
				}
			}
		}
	}
	if done < 300 {
		t.Errorf("only %d translated", done)
	}
}

// sameButZero compares packets, apart from checksums that may be 0 or 0xffff, which
// are one number.
func sameButZero(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := 0; i+1 < len(a); i += 2 {
		x, y := uint16(a[i])<<8|uint16(a[i+1]), uint16(b[i])<<8|uint16(b[i+1])
		if x != y && !(x == 0 && y == 0xffff || x == 0xffff && y == 0) {
			return false
		}
	}
	return len(a)%2 == 0 || a[len(a)-1] == b[len(b)-1]
}

// TestSetQuotedUDPWithoutChecksum: absent in the quotation, it stays absent.
func TestSetQuotedUDPWithoutChecksum(t *testing.T) {
	inside := ip4(UDP, udpDatagram(false, "hello"))
	inside[26], inside[27] = 0, 0
	b := quoting(inside, 100)
	var v, q View
	v.Parse(b)
	v.Quoted(&q)
	if !v.SetQuotedSource(&q, gateway4, 99) || !v.ChecksumsValid() || q.Bytes[26] != 0 || q.Bytes[27] != 0 {
		t.Errorf("%x", q.Bytes)
	}
}

// TestSetQuotedWrong: a checksum that was wrong isn't made right.
func TestSetQuotedWrong(t *testing.T) {
	for _, inside := range [][]byte{ip4(UDP, udpDatagram(false, "hello")), ip6(UDP, udpDatagram(true, "hello"))} {
		b := quoting(inside, 100)
		var v, q View
		v.Parse(b)
		b[len(b)-1] ^= 1
		v.Quoted(&q)
		if !v.SetQuotedSource(&q, gateway(&v), 99) || v.ChecksumsValid() {
			t.Error("a broken error became valid")
		}
	}
}

func TestSetQuotedRefuses(t *testing.T) {
	b := quoting(ip4(UDP, udpDatagram(false, "hello")), 100)
	var v, q, p View
	v.Parse(b)
	v.Quoted(&q)
	p.Parse(ip4(UDP, udpDatagram(false, "hello")))
	before := bytes.Clone(b)
	if v.SetQuotedSource(&q, gateway6, 1) || v.SetQuotedDestination(&q, gateway6, 1) {
		t.Error("the other family")
	}
	if v.SetQuotedSource(&p, gateway4, 1) {
		t.Error("not a quotation")
	}
	if !bytes.Equal(b, before) {
		t.Error("changed")
	}
}

// TestPrepareChecksum does what a network card does with a prepared packet.
func TestPrepareChecksum(t *testing.T) {
	for _, s := range samples() {
		b := bytes.Clone(s.bytes)
		var v View
		v.Parse(b)
		start, offset, ok := v.PrepareChecksum()
		if want := !v.Fragmented && (v.Protocol == TCP || v.Protocol == UDP); ok != want {
			t.Errorf("%s: %v, want %v", s.name, ok, want)
		}
		if ok {
			sum := ^twinSum(b[start:], 0)
			b[start+offset], b[start+offset+1] = byte(sum>>8), byte(sum)
		}
		if !sameButZero(b, s.bytes) {
			t.Errorf("%s:\n%x, want\n%x", s.name, b, s.bytes)
		}
	}
	short := ip4(UDP, append(udpDatagram(false, "hello"), "trailer"...))
	before := bytes.Clone(short)
	var v View
	if v.Parse(short) != OK {
		t.Fatal("not parsed")
	}
	if _, _, ok := v.PrepareChecksum(); ok || !bytes.Equal(short, before) {
		t.Error("the card would sum more than the datagram")
	}
	if v.ParseQuoted(ip4(TCP, tcpSegment(false, "hello"))) != OK {
		t.Fatal("not parsed")
	}
	if _, _, ok := v.PrepareChecksum(); ok {
		t.Error("a quotation is not sent")
	}
}
