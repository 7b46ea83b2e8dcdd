package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"slices"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes of every fixed message, written by hand from PROTOCOL.md.
func TestDataHeaderBytes(t *testing.T) {
	h := DataHeader{Epoch: 0x11, Sender: 0x2233, SessionID: 0x445566778899aabb, Counter: 0xccddeeff00112233}
	want := unhex(t, "0411"+"2233"+"445566778899aabb"+"ccddeeff00112233")
	b := make([]byte, Overhead+1)
	PutData(b, h)
	if !bytes.Equal(b[:DataHeaderLen], want) {
		t.Fatalf("header is %x, want %x", b[:DataHeaderLen], want)
	}
	got, err := ParseData(b)
	if err != nil || got != h {
		t.Fatalf("parsed %+v, %v", got, err)
	}
	for n := range Overhead + 1 {
		if _, err := ParseData(b[:n]); !errors.Is(err, ErrShort) {
			t.Fatalf("%d bytes: %v, want ErrShort", n, err)
		}
	}
	b[0] = byte(TypeResponse)
	if _, err := ParseData(b); !errors.Is(err, ErrType) {
		t.Fatalf("type: %v", err)
	}
}

func TestHandshakeForms(t *testing.T) {
	x := Exchange{1, 2, 3, 4, 5, 6, 7, 8}
	prefix := "00" + "0102030405060708"
	t.Run("initiation", func(t *testing.T) {
		b := AppendInitiationPrefix(nil, x)
		if want := unhex(t, "01"+"01"+"00"+prefix); !bytes.Equal(b, want) {
			t.Fatalf("prefix %x, want %x", b, want)
		}
		for i := len(b); i < InitiationLen; i++ {
			b = append(b, byte(i))
		}
		m, err := ParseInitiation(b)
		if err != nil {
			t.Fatal(err)
		}
		if m.Exchange != x || len(m.Noise) != 340 || &m.MAC1[0] != &b[352] || &m.MAC2[0] != &b[368] ||
			len(m.Covered1) != 352 || len(m.Covered2) != 368 || len(m.Prefix) != 12 {
			t.Fatalf("fields lie wrong: %+v", m)
		}
		for n := range len(b) {
			if _, err := ParseInitiation(b[:n]); err == nil {
				t.Fatalf("prefix of %d bytes accepted", n)
			}
		}
		if _, err := ParseInitiation(append(b, 0)); !errors.Is(err, ErrLength) {
			t.Fatalf("long: %v", err)
		}
		b[1] = 2
		if _, err := ParseInitiation(b); !errors.Is(err, ErrVersion) {
			t.Fatalf("version: %v", err)
		}
		b[1], b[3] = 1, 1
		if _, err := ParseInitiation(b); !errors.Is(err, ErrValue) {
			t.Fatalf("reserved: %v", err)
		}
	})
	t.Run("response", func(t *testing.T) {
		b := append(AppendResponsePrefix(nil, x), make([]byte, minNoiseTwoLen)...)
		m, err := ParseResponse(b)
		if err != nil || m.Exchange != x || len(m.Noise) != minNoiseTwoLen {
			t.Fatalf("%+v, %v", m, err)
		}
		for n := range len(b) {
			if _, err := ParseResponse(b[:n]); !errors.Is(err, ErrShort) {
				t.Fatalf("prefix of %d bytes: %v", n, err)
			}
		}
		if _, err := ParseResponse(append(b, make([]byte, MaxResponseLen)...)); !errors.Is(err, ErrLength) {
			t.Fatalf("long: %v", err)
		}
	})
	t.Run("cookie", func(t *testing.T) {
		in := Cookie{Exchange: x, Nonce: bytes.Repeat([]byte{7}, CookieNonceLen), Sealed: bytes.Repeat([]byte{9}, CookieLen+TagLen)}
		b := AppendCookie(nil, in)
		if len(b) != CookieMessageLen || len(b) > InitiationLen {
			t.Fatalf("%d bytes", len(b))
		}
		m, err := ParseCookie(b)
		if err != nil || m.Exchange != x || !bytes.Equal(m.Nonce, in.Nonce) || !bytes.Equal(m.Sealed, in.Sealed) {
			t.Fatalf("%+v, %v", m, err)
		}
		for n := range len(b) {
			if _, err := ParseCookie(b[:n]); err == nil {
				t.Fatalf("prefix of %d bytes accepted", n)
			}
		}
	})
}

func TestOffer(t *testing.T) {
	o := Offer{Timestamp: 0x0102030405060708, KeepAlive: 0x0914, MTU: 0x0578, Ciphers: 3, FastAES: true}
	b := AppendOffer(nil, o)
	if want := unhex(t, "0102030405060708"+"0914"+"0578"+"03"+"01"); len(b) != OfferLen || !bytes.Equal(b[:len(want)], want) {
		t.Fatalf("offer %x", b)
	}
	if got, err := ParseOffer(b); err != nil || got != o {
		t.Fatalf("%+v, %v", got, err)
	}
	for n := range len(b) {
		if _, err := ParseOffer(b[:n]); err == nil {
			t.Fatalf("prefix of %d bytes accepted", n)
		}
	}
	if _, err := ParseOffer(AppendOffer(nil, Offer{MTU: MinMTU - 1})); !errors.Is(err, ErrValue) {
		t.Fatalf("small mtu: %v", err)
	}
}

func goodGrant() Grant {
	return Grant{
		Time: 1, Epoch: 2, Lifetime: 3, SessionID: 4, Secret: [32]byte{5}, Client: 6, Server: 7, KeepAlive: 8,
		MTU: 1400, FirstPort: 1024, LastPort: 2047, Cipher: ChaCha20Poly1305, PublicPort: true,
		IPv4: [4]byte{100, 64, 0, 6}, IPv6: [16]byte{0xfd, 15: 1}, Gateway4: [4]byte{100, 64}, Gateway6: [16]byte{0xfd, 15: 2},
		Public4: [4]byte{203, 0, 113, 2}, Public6: [16]byte{0x20, 1, 0x0d, 0xb8, 15: 3},
	}
}

func TestGrant(t *testing.T) {
	g := goodGrant()
	b := AppendGrant(nil, g)
	want := unhex(t, "0000000000000001"+"00000002"+"00000003"+"0000000000000004"+
		"05"+"00000000000000000000000000000000000000000000000000000000000000"+
		"00000006"+"0007"+"0008"+"0578"+"0400"+"07ff"+"01"+"01"+
		"64400006"+"fd000000000000000000000000000001"+"64400000"+"fd000000000000000000000000000002"+
		"cb007102"+"20010db8000000000000000000000003")
	if !bytes.Equal(b, want) {
		t.Fatalf("grant\n%x, want\n%x", b, want)
	}
	if got, err := ParseGrant(b); err != nil || got != g {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := ParseGrant(append(b, 1, 2, 3)); err != nil || got != g {
		t.Fatalf("later fields must be ignored: %v", err)
	}
	for n := range grantLen {
		if _, err := ParseGrant(b[:n]); !errors.Is(err, ErrShort) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
	old := g
	old.Public4, old.Public6 = [4]byte{}, [16]byte{}
	for n := grantLen; n < len(b); n++ {
		if got, err := ParseGrant(b[:n]); err != nil || got != old {
			t.Fatalf("%d bytes, as from an older server: %+v, %v", n, got, err)
		}
	}
	if n := prefixLen + 32 + TagLen + len(b) + TagLen; n > MaxResponseLen {
		t.Errorf("a response of %d bytes is larger than an initiation", n)
	}
	for name, spoil := range map[string]func(*Grant){
		"server 0": func(g *Grant) { g.Server = 0 }, "no keepalive": func(g *Grant) { g.KeepAlive = 0 },
		"mtu": func(g *Grant) { g.MTU = 100 }, "port 0": func(g *Grant) { g.FirstPort = 0 },
		"ports": func(g *Grant) { g.LastPort = 1 }, "lifetime": func(g *Grant) { g.Lifetime = 0 },
		"cipher": func(g *Grant) { g.Cipher = 2 },
	} {
		g := goodGrant()
		spoil(&g)
		if _, err := ParseGrant(AppendGrant(nil, g)); !errors.Is(err, ErrValue) {
			t.Errorf("%s: %v, want ErrValue", name, err)
		}
	}
}

func TestControl(t *testing.T) {
	ka := KeepAlive{Interval: 0x0014, Token: 0x1122334455667788}
	b := AppendKeepAlive(nil, ka)
	if want := unhex(t, "0100"+"0014"+"1122334455667788"); !bytes.Equal(b, want) {
		t.Fatalf("keep-alive %x", b)
	}
	if got, err := ParseKeepAlive(b); err != nil || got != ka {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, addr := range []string{"192.0.2.7:4444", "[2001:db8::1]:1"} {
		al := Alive{Server: 3, Token: 9, Observed: netip.MustParseAddrPort(addr)}
		b := AppendAlive(nil, al)
		if len(b) != AliveLen || !IsControl(b) {
			t.Fatalf("alive %x", b)
		}
		if got, err := ParseAlive(b); err != nil || got != al {
			t.Fatalf("%+v, %v", got, err)
		}
		for n := range len(b) {
			if _, err := ParseAlive(b[:n]); !errors.Is(err, ErrShort) {
				t.Fatalf("prefix of %d bytes: %v", n, err)
			}
		}
	}
	for n := range KeepAliveLen {
		if _, err := ParseKeepAlive(b[:n]); !errors.Is(err, ErrShort) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
	if r, err := ParseClose(AppendClose(nil, CloseUnknown)); err != nil || r != CloseUnknown {
		t.Fatalf("close: %v, %v", r, err)
	}
	if _, err := ParseClose([]byte{3}); !errors.Is(err, ErrShort) {
		t.Fatalf("short close: %v", err)
	}
	for _, p := range []byte{0x45, 0x60} {
		if IsControl([]byte{p}) {
			t.Errorf("a packet that starts with %#x counts as control", p)
		}
	}
	if IsControl(nil) {
		t.Error("nothing counts as control")
	}
}

func TestPortsRequestBytes(t *testing.T) {
	m := PortsRequest{Blocks: 3, Token: 0x1122334455667788}
	b := AppendPortsRequest(nil, m)
	if want := unhex(t, "0403"+"1122334455667788"); !bytes.Equal(b, want) || !IsControl(b) {
		t.Fatalf("request %x", b)
	}
	if got, err := ParsePortsRequest(append(b, 9)); err != nil || got != m {
		t.Fatalf("%+v, %v", got, err)
	}
	for n := range b {
		if _, err := ParsePortsRequest(b[:n]); !errors.Is(err, ErrShort) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
	b[0] = byte(ControlPorts)
	if _, err := ParsePortsRequest(b); !errors.Is(err, ErrType) {
		t.Fatalf("type: %v", err)
	}
}

func TestPortsBytes(t *testing.T) {
	m := Ports{
		Status: PortsNoneFree, Token: 0x1122334455667788, Lifetime: 3600,
		Blocks: []PortBlock{{2048, 3071, [4]byte{203, 0, 113, 2}}, {64512, 65535, [4]byte{}}},
	}
	b := AppendPorts(nil, m)
	if want := unhex(t, "0501"+"1122334455667788"+"00000e10"+"02"+"08000bffcb007102"+"fc00ffff00000000"); !bytes.Equal(b, want) || !IsControl(b) {
		t.Fatalf("ports %x, want %x", b, want)
	}
	same := func(got Ports, err error) bool {
		return err == nil && got.Status == m.Status && got.Token == m.Token && got.Lifetime == m.Lifetime &&
			slices.Equal(got.Blocks, m.Blocks)
	}
	if got, err := ParsePorts(b, nil); !same(got, err) {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := ParsePorts(append(b, 9), make([]PortBlock, 5)); !same(got, err) {
		t.Fatalf("with room and later fields: %+v, %v", got, err)
	}
	for n := range b {
		if _, err := ParsePorts(b[:n], nil); !errors.Is(err, ErrShort) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
	for name, spoil := range map[string]func(b []byte){
		"port 0":       func(b []byte) { b[15], b[16] = 0, 0 },
		"last < first": func(b []byte) { b[17], b[18] = 0, 1 },
		"count":        func(b []byte) { b[14] = MaxPortBlocks + 1 },
		"no lifetime":  func(b []byte) { clear(b[10:14]) },
	} {
		bad := append(bytes.Clone(b), make([]byte, 1000)...)
		spoil(bad)
		if _, err := ParsePorts(bad, nil); !errors.Is(err, ErrValue) {
			t.Errorf("%s: %v, want ErrValue", name, err)
		}
	}
	for s := range PortsStatus(5) {
		if got, err := ParsePorts(AppendPorts(nil, Ports{Status: s}), nil); err != nil || got.Status != s || s.String() == "" {
			t.Errorf("status %v: %+v, %v", s, got, err)
		}
	}
	many := AppendPorts(nil, Ports{Lifetime: 1, Blocks: slices.Repeat(m.Blocks, MaxPortBlocks)})
	if got, err := ParsePorts(many, nil); err != nil || len(got.Blocks) != MaxPortBlocks || len(many) > MinMTU {
		t.Errorf("too many blocks: %d in %d bytes, %v", len(got.Blocks), len(many), err)
	}
}

// FuzzParse feeds every parser of outside bytes; what parses must come back the
// same when it is written again.
func FuzzParse(f *testing.F) {
	f.Add(AppendGrant(nil, goodGrant()))
	f.Add(AppendOffer(nil, Offer{Timestamp: 1, MTU: 1400}))
	f.Add(AppendKeepAlive(nil, KeepAlive{Interval: 20, Token: 1}))
	f.Add(AppendAlive(nil, Alive{Server: 1}))
	f.Add(AppendClose(nil, CloseLeaving))
	f.Add(AppendGrant(nil, goodGrant())[:grantLen])
	f.Add(AppendPortsRequest(nil, PortsRequest{Blocks: 1, Token: 2}))
	f.Add(AppendPorts(nil, Ports{Token: 1, Lifetime: 60, Blocks: []PortBlock{{First: 1024, Last: 2047}}}))
	f.Add(append(AppendInitiationPrefix(nil, Exchange{1}), make([]byte, InitiationLen-prefixLen)...))
	f.Add(append(AppendResponsePrefix(nil, Exchange{1}), make([]byte, minNoiseTwoLen)...))
	f.Add(AppendCookie(nil, Cookie{Nonce: make([]byte, 24), Sealed: make([]byte, 32)}))
	d := make([]byte, 100)
	PutData(d, DataHeader{Epoch: 1, Sender: 2, SessionID: 3, Counter: 4})
	f.Add(d)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseData(b); err == nil {
			again := make([]byte, DataHeaderLen)
			PutData(again, h)
			if !bytes.Equal(again, b[:DataHeaderLen]) {
				t.Errorf("data header: %x became %x", b[:DataHeaderLen], again)
			}
		}
		if m, err := ParseInitiation(b); err == nil && !bytes.Equal(AppendInitiationPrefix(nil, m.Exchange), m.Prefix) {
			t.Error("initiation prefix changed")
		}
		if m, err := ParseResponse(b); err == nil && !bytes.Equal(append(AppendResponsePrefix(nil, m.Exchange), m.Noise...), b) {
			t.Error("response changed")
		}
		if m, err := ParseCookie(b); err == nil && !bytes.Equal(AppendCookie(nil, m), b) {
			t.Error("cookie changed")
		}
		if o, err := ParseOffer(b); err == nil {
			if p, err := ParseOffer(AppendOffer(nil, o)); err != nil || p != o {
				t.Errorf("offer: %+v became %+v, %v", o, p, err)
			}
		}
		if g, err := ParseGrant(b); err == nil {
			if h, err := ParseGrant(AppendGrant(nil, g)); err != nil || h != g {
				t.Errorf("grant: %+v became %+v, %v", g, h, err)
			}
		}
		if m, err := ParseKeepAlive(b); err == nil {
			if n, err := ParseKeepAlive(AppendKeepAlive(nil, m)); err != nil || n != m {
				t.Errorf("keep-alive: %+v became %+v", m, n)
			}
		}
		if m, err := ParseAlive(b); err == nil {
			if n, err := ParseAlive(AppendAlive(nil, m)); err != nil || n != m {
				t.Errorf("alive: %+v became %+v", m, n)
			}
		}
		if m, err := ParsePortsRequest(b); err == nil && !bytes.Equal(AppendPortsRequest(nil, m), b[:PortsRequestLen]) {
			t.Error("ports request changed")
		}
		if m, err := ParsePorts(b, nil); err == nil && !bytes.HasPrefix(b, AppendPorts(nil, m)) {
			t.Error("ports changed")
		}
		if r, err := ParseClose(b); err == nil {
			if s, err := ParseClose(AppendClose(nil, r)); err != nil || s != r {
				t.Errorf("close: %v became %v", r, s)
			}
		}
	})
}

func TestParseAllocatesNothing(t *testing.T) {
	b := append(AppendInitiationPrefix(nil, Exchange{1}), make([]byte, InitiationLen-prefixLen)...)
	d := make([]byte, 100)
	PutData(d, DataHeader{})
	ports := AppendPorts(nil, Ports{Lifetime: 1, Blocks: []PortBlock{{First: 1, Last: 2}}})
	room := make([]PortBlock, MaxPortBlocks)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = ParseInitiation(b)
		_, _ = ParseData(d)
		_, _ = ParsePorts(ports, room)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
