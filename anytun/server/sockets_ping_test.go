package server

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// pingPacket is an inner echo request as a client's netstack makes it.
func pingPacket(t testing.TB, from, to netip.Addr, id, seq int, data []byte) []byte {
	t.Helper()
	m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq, Data: data}}
	proto := uint8(protoICMP)
	if to.Is6() {
		m.Type, proto = ipv6.ICMPTypeEchoRequest, protoICMPv6
	}
	msg, err := m.Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, ipHeaderLen(to)+len(msg))
	copy(b[ipHeaderLen(to):], msg)
	putIPHeader(b, from, to, proto)
	return b
}

// pingModes runs f once for every kind of ICMP socket this host gives.
func pingModes(t *testing.T, f func(t *testing.T, v6 bool, open egressPingOpen)) {
	for _, v6 := range []bool{false, true} {
		for _, raw := range []bool{false, true} {
			name := map[bool]string{false: "IPv4", true: "IPv6"}[v6] + map[bool]string{false: " ping socket", true: " raw socket"}[raw]
			t.Run(name, func(t *testing.T) {
				s, err := openPingSocket(v6, raw)
				if err != nil {
					// A skip must be the host's decision, not a mistake here.
					if !os.IsPermission(err) && !strings.Contains(err.Error(), syscall.EAFNOSUPPORT.Error()) {
						t.Fatal(err)
					}
					t.Skipf("this host gives no such socket (TestPingSocketsAllowed, as root, runs this where it does): %v", err)
				}
				s.close()
				f(t, v6, func(v6, isRaw bool) (*egressUDPSocket, error) {
					if isRaw != raw {
						return nil, os.ErrPermission
					}
					return openPingSocket(v6, raw)
				})
			})
		}
	}
}

// TestEgressPing pings the host through real ICMP sockets.
func TestEgressPing(t *testing.T) {
	pingModes(t, func(t *testing.T, v6 bool, open egressPingOpen) {
		r := newEgressRig(t, func(c *socketsConfig) { c.ping = open })
		from, other, to := egressClient4, egressOther4, loopback4
		parseAs, echoReply := protoICMP, icmp.Type(ipv4.ICMPTypeEchoReply)
		if v6 {
			from, other, to = egressClient6, egressClient6, netip.IPv6Loopback()
			parseAs, echoReply = protoICMPv6, ipv6.ICMPTypeEchoReply
			if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
				t.Skip("this host has no IPv6")
			}
		}
		replies := make(chan []byte, 100)
		r.down.watch(func(pkt []byte) { replies <- pkt })
		big := bytes.Repeat([]byte("x"), egressTestMTU-ipHeaderLen(to)-icmpEchoLen)
		for _, c := range []struct {
			from    netip.Addr
			id, seq int
			data    []byte
		}{
			{from, 1, 1, []byte("hello")},
			{from, 1, 2, nil},
			{from, 0xfffe, 3, []byte("odd")},
			{other, 1, 4, []byte("somebody else with the same id")},
			{from, 1, 5, big},
		} {
			pkt := pingPacket(t, c.from, to, c.id, c.seq, c.data)
			keep := append([]byte(nil), pkt...)
			r.e.Input([][]byte{pkt})
			if !bytes.Equal(pkt, keep) {
				t.Error("the request was changed")
			}
			b := <-replies
			var p egressPacket
			if !p.parse(b) || p.src != to || p.dst != c.from {
				t.Fatalf("reply % x", b)
			}
			hl := ipHeaderLen(to)
			whole := p.payload
			if v6 {
				whole = append(pseudoHeader(b, hl), whole...)
			} else if slowSum(b[:hl]) != 0xffff {
				t.Error("wrong IPv4 header checksum")
			}
			if sum := slowSum(whole); sum != 0xffff {
				t.Errorf("wrong ICMP checksum: sum %04x", sum)
			}
			m, err := icmp.ParseMessage(parseAs, p.payload)
			if err != nil {
				t.Fatal(err)
			}
			echo, ok := m.Body.(*icmp.Echo)
			if !ok || m.Type != echoReply || echo.ID != c.id || echo.Seq != c.seq || !bytes.Equal(echo.Data, c.data) {
				t.Errorf("reply %v %+v to %+v", m.Type, echo, c)
			}
		}
		want := 3
		if v6 {
			want = 2 // its other client is the same one
		}
		egressUntil(t, "the counters", func() bool { return r.e.Stats().PingIn == 5 })
		if st := r.e.Stats(); st.FlowsPing != want || st.PingOut != 5 || st.PingIn != 5 {
			t.Errorf("stats: %+v", st)
		}
		r.e.expire(r.e.now().Add(defaultQuickTimeout))
		if st := r.e.Stats(); st.FlowsPing != 0 || st.PingExpired != uint64(want) {
			t.Errorf("stats after the end: %+v", st)
		}
		for _, raw := range r.e.ping.raw {
			if raw != nil {
				raw.mu.Lock()
				if len(raw.id) != 0 {
					t.Errorf("%d identifiers are still taken", len(raw.id))
				}
				raw.mu.Unlock()
			}
		}
	})
}

// TestEgressPingOff is a host that gives no ICMP sockets.
func TestEgressPingOff(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) {
		c.ping = func(bool, bool) (*egressUDPSocket, error) { return nil, os.ErrPermission }
	})
	r.down.watch(func(pkt []byte) { t.Errorf("client got % x", pkt) })
	r.e.Input([][]byte{pingPacket(t, egressClient4, loopback4, 1, 1, nil), pingPacket(t, egressClient6, netip.IPv6Loopback(), 1, 1, nil)})
	if st := r.e.Stats(); st.PingDropNoSocket != 2 || st.Flows != 0 {
		t.Errorf("stats: %+v", st)
	}
}

// TestEgressPingRefused sends what must not leave, and must not be answered by
// the netstack in the name of the destination either.
func TestEgressPingRefused(t *testing.T) {
	r := newEgressRig(t, func(c *socketsConfig) { c.AllowLocal = false })
	r.down.watch(func(pkt []byte) { t.Errorf("client got % x", pkt) })
	world := netip.MustParseAddr("192.0.2.1")
	first := pingPacket(t, egressClient4, world, 1, 1, []byte("first part"))
	first[6] = 0x20
	later := pingPacket(t, egressClient4, world, 1, 1, []byte("later part"))
	later[7] = 2
	later[20] = 0x77 // data, not a type
	first6 := pingPacket(t, egressClient6, netip.MustParseAddr("2001:db8::1"), 1, 1, nil)
	first6[6] = protoFragment
	first6 = append(first6[:40], append([]byte{protoICMPv6, 0, 0, 1, 0, 0, 0, 1}, first6[40:]...)...)
	binary.BigEndian.PutUint16(first6[4:], uint16(len(first6)-40))
	cut := pingPacket(t, egressClient4, world, 1, 1, nil)[:24]
	binary.BigEndian.PutUint16(cut[2:], 24)
	r.e.Input([][]byte{
		pingPacket(t, egressClient4, loopback4, 1, 1, nil),
		pingPacket(t, egressClient4, egressOther4, 1, 1, nil),
		pingPacket(t, egressClient6, netip.MustParseAddr("fe80::1"), 1, 1, nil),
		first, later, first6, cut,
	})
	if st := r.e.Stats(); st.DropForbidden != 3 || st.PingDropFragment != 4 || st.Flows != 0 {
		t.Errorf("stats: %+v", st)
	}
}

// TestEgressPingGateway pings the server itself: its netstack answers.
func TestEgressPingGateway(t *testing.T) {
	r := newEgressRig(t)
	replies := make(chan []byte, 10)
	r.down.watch(func(pkt []byte) { replies <- pkt })
	r.e.Input([][]byte{pingPacket(t, egressClient4, egressGate4, 9, 1, []byte("hi"))})
	b := <-replies
	if b[20] != icmpEchoReply || !bytes.HasSuffix(b, []byte("hi")) {
		t.Errorf("reply % x", b)
	}
	if n := r.e.Stats().PingOpened; n != 0 {
		t.Errorf("%d mappings", n)
	}
}

func TestEgressRawPingIDs(t *testing.T) {
	raw := &egressRawPing{id: make(map[uint16]*egressPingFlow)}
	var all []*egressPingFlow
	for range egressRawPings {
		f := &egressPingFlow{raw: raw}
		if !raw.alloc(f) || raw.find(f.id) != f {
			t.Fatalf("no identifier after %d", len(all))
		}
		all = append(all, f)
	}
	if raw.alloc(&egressPingFlow{raw: raw}) {
		t.Error("more identifiers than the bound")
	}
	all[5].endFlow()
	again := &egressPingFlow{raw: raw}
	if !raw.alloc(again) {
		t.Error("the identifier was not given back")
	}
	all[5].id = again.id
	all[5].endFlow() // ended twice: must not take another's
	if raw.find(again.id) != again {
		t.Error("ending a mapping twice freed another's identifier")
	}
}
