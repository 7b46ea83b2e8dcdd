package netstack

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// checkUnreachable has gVisor's header package judge an unreachable message
// about a packet from `from` to `to` with n bytes of payload.
func checkUnreachable(t *testing.T, b []byte, from, to netip.AddrPort, code byte, proto byte, n int) {
	t.Helper()
	var quote []byte
	if from.Addr().Is4() {
		ip := header.IPv4(b)
		if !ip.IsValid(len(b)) || !ip.IsChecksumValid() || ip.TransportProtocol() != header.ICMPv4ProtocolNumber {
			t.Fatalf("not a valid IPv4 packet: %x", b)
		}
		if ip.SourceAddress() != tcpipAddr(to.Addr()) || ip.DestinationAddress() != tcpipAddr(from.Addr()) {
			t.Errorf("from %v to %v", ip.SourceAddress(), ip.DestinationAddress())
		}
		m := header.ICMPv4(ip.Payload())
		if checksum.Checksum(m, 0) != 0xffff {
			t.Errorf("ICMP checksum")
		}
		if m.Type() != header.ICMPv4DstUnreachable || byte(m.Code()) != code {
			t.Errorf("type %d code %d, want code %d", m.Type(), m.Code(), code)
		}
		if len(b) > 576 {
			t.Errorf("%d bytes", len(b))
		}
		quote = m[header.ICMPv4MinimumSize:]
		q := header.IPv4(quote)
		if !q.IsChecksumValid() || q.SourceAddress() != tcpipAddr(from.Addr()) || q.DestinationAddress() != tcpipAddr(to.Addr()) || q.Protocol() != proto {
			t.Errorf("quoted %x", quote[:20])
		}
		quote = quote[20:]
	} else {
		ip := header.IPv6(b)
		if !ip.IsValid(len(b)) || ip.NextHeader() != uint8(header.ICMPv6ProtocolNumber) {
			t.Fatalf("not a valid IPv6 packet: %x", b)
		}
		m := header.ICMPv6(ip.Payload())
		want := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m, Src: ip.SourceAddress(), Dst: ip.DestinationAddress()})
		if m.Checksum() != want {
			t.Errorf("ICMPv6 checksum %04x, want %04x", m.Checksum(), want)
		}
		if m.Type() != header.ICMPv6DstUnreachable || byte(m.Code()) != code {
			t.Errorf("type %d code %d, want code %d", m.Type(), m.Code(), code)
		}
		if len(b) > 1280 {
			t.Errorf("%d bytes", len(b))
		}
		q := header.IPv6(m[header.ICMPv6DstUnreachableMinimumSize:])
		if q.SourceAddress() != tcpipAddr(from.Addr()) || q.DestinationAddress() != tcpipAddr(to.Addr()) || q.NextHeader() != proto {
			t.Errorf("quoted %x", q[:40])
		}
		quote = q[40:]
	}
	u := header.UDP(quote)
	if u.SourcePort() != from.Port() || u.DestinationPort() != to.Port() || int(u.Length()) != 8+n {
		t.Errorf("quoted ports %d, %d, length %d", u.SourcePort(), u.DestinationPort(), u.Length())
	}
}

func TestSimplifyUnreachable(t *testing.T) {
	for code := byte(0); code < 8; code++ {
		b := make([]byte, 40+8+60)
		(&pattern{at: uint64(code)}).fill(b[48:])
		putIPv6(b, protoICMPv6, world6, client6)
		m := b[40:]
		m[0], m[1] = icmpv6Unreachable, code
		putChecksum(m[2:], sum(pseudoSum(world6, client6, protoICMPv6, len(m)), m))
		simplifyUnreachable(m)
		if want := code; code != icmpv6Port {
			want = icmpv6Net
			if m[1] != want {
				t.Errorf("code %d became %d", code, m[1])
			}
		} else if m[1] != want {
			t.Errorf("code %d became %d", code, m[1])
		}
		ip := header.IPv6(b)
		want := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: header.ICMPv6(m), Src: ip.SourceAddress(), Dst: ip.DestinationAddress()})
		if got := binary.BigEndian.Uint16(m[2:]); got != want {
			t.Errorf("code %d: checksum %04x, want %04x", code, got, want)
		}
	}
}

// The sum is judged by gVisor's.
func TestSum(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		b := make([]byte, rng.IntN(200))
		for i := range b {
			b[i] = byte(rng.Uint32())
			if rng.IntN(3) == 0 {
				b[i] = 0xff
			}
		}
		if got, want := fold(sum(0, b)), checksum.Checksum(b, 0); got != want {
			t.Fatalf("sum of %x is %04x, want %04x", b, got, want)
		}
	}
}
