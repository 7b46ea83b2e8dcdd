package registry

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// The bytes are written down by hand, so that servers of two versions agree.
var vectors = []struct {
	name    string
	message Message
	hex     string
}{
	{
		"location",
		Message{Type: TypeLocation, Locations: []Location{{
			Client: 0x01020304, Session: 0x1112131415161718, Epoch: 0x21, Counter: 0x3132333435363738,
			Endpoint: netip.MustParseAddrPort("192.0.2.1:4660"), Local: netip.MustParseAddrPort("[2001:db8::1]:4444"),
			Server: 0x4142, Left: true,
		}}},
		"01 01020304 1112131415161718 21 3132333435363738 c0000201 000000000000000000000000 1234" +
			"20010db8000000000000000000000001 115c 4142 13",
	},
	{
		"location without endpoints",
		Message{Type: TypeLocation, Locations: []Location{{Client: 1}}},
		"01 00000001 0000000000000000 00 0000000000000000 " + strings.Repeat("00", 36) + "0000 00",
	},
	{
		"seen",
		Message{Type: TypeSeen, Seen: []Seen{{1, 2}, {3, 4}}},
		"02 00000001 0000000000000002 00000003 0000000000000004",
	},
	{
		"mapping",
		Message{Type: TypeMapping, Mappings: []Mapping{{Client: 1, Protocol: 17, Inner: 0x1234, Public: 0x5678, Since: 9}}},
		"03 00000001 11 1234 5678 0000000000000009",
	},
	{
		"claim",
		Message{Type: TypeClaim, Claims: []Claim{{Kind: ClaimServer, Index: 5, Owner: 6, Until: time.Unix(1, 2)}}},
		"04 02 00000005 00000006 000000003b9aca02",
	},
	{
		"release",
		Message{Type: TypeRelease, Claims: []Claim{{Kind: ClaimBlock, Index: 5, Owner: 6, Until: time.Unix(0, 0)}}},
		"05 01 00000005 00000006 0000000000000000",
	},
	{"hello", Message{Type: TypeHello, Hello: Hello{Peer: 7, Age: 8}}, "06 0000000000000007 00000008"},
	{"ask", Message{Type: TypeAsk}, "07"},
	{"ask own", Message{Type: TypeAskOwn}, "08"},
	{"done", Message{Type: TypeDone}, "09"},
}

func TestCodec(t *testing.T) {
	var reused Message
	for _, v := range vectors {
		want, err := hex.DecodeString(strings.ReplaceAll(v.hex, " ", ""))
		if err != nil {
			t.Fatal(v.name, err)
		}
		if got := v.message.Append(nil); !bytes.Equal(got, want) {
			t.Errorf("%s: %x, want %x", v.name, got, want)
		}
		var fresh Message
		if err := fresh.Parse(want); err != nil || !reflect.DeepEqual(fresh, v.message) {
			t.Errorf("%s: %v, parsed %+v", v.name, err, fresh)
		}
		if err := reused.Parse(want); err != nil || reused.Records() != v.message.Records() {
			t.Errorf("%s into a used message: %v, %d records", v.name, err, reused.Records())
		}
		for n := range want {
			if n == 1+SeenSize && v.message.Type == TypeSeen {
				continue // one record of two is a message
			}
			if err := fresh.Parse(want[:n]); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s cut to %d bytes: %v", v.name, n, err)
			}
		}
		if err := fresh.Parse(append(want, 0)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s and a byte: %v", v.name, err)
		}
	}
	// Not the one encoding.
	location := vectors[0].message.Append(nil)
	for name, spoil := range map[string]func([]byte){
		"type 0":                func(b []byte) { b[0] = 0 },
		"unknown type":          func(b []byte) { b[0] = NumTypes },
		"unknown flag":          func(b []byte) { b[len(b)-1] |= 0x20 },
		"unknown family":        func(b []byte) { b[len(b)-1] |= 0x06 },
		"IPv4 with more":        func(b []byte) { b[1+endpointOffset+4] = 1 },
		"bytes where none are":  func(b []byte) { b[len(b)-1] &^= 0x06 },
		"port without endpoint": func(b []byte) { b[len(b)-1] = 0; clear(b[1+endpointOffset : 1+endpointOffset+16]) },
	} {
		b := bytes.Clone(location)
		spoil(b)
		if err := new(Message).Parse(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	zone := Message{Type: TypeLocation, Locations: []Location{{Endpoint: netip.MustParseAddrPort("[fe80::1%eth0]:1")}}}
	var got Message
	if err := got.Parse(zone.Append(nil)); err != nil || got.Locations[0].Endpoint != netip.MustParseAddrPort("[fe80::1]:1") {
		t.Error("zone:", got, err)
	}
}

func FuzzMessage(f *testing.F) {
	for _, v := range vectors {
		f.Add(v.message.Append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m Message
		if err := m.Parse(b); err != nil {
			if !errors.Is(err, ErrMalformed) || m.Type != 0 {
				t.Fatal(err, m.Type)
			}
			return
		}
		if again := m.Append(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
		if len(b) > 1 && m.Records() == 0 {
			t.Fatalf("nothing in %x", b)
		}
	})
}

func TestSeal(t *testing.T) {
	s, err := NewSealer([]byte("secret of the cluster"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	plain := []byte("where it is")
	sealed := s.Seal([]byte("head"), plain, "bus", now)[4:]
	if len(sealed) != len(plain)+SealOverhead {
		t.Errorf("%d bytes around the message", len(sealed)-len(plain))
	}
	if got, err := s.OpenFresh([]byte("head"), sealed, "bus", now.Add(Fresh)); err != nil || string(got) != "headwhere it is" {
		t.Errorf("%q %v", got, err)
	}
	for _, late := range []time.Duration{Fresh + 1, -Fresh - 1} {
		if _, err := s.OpenFresh(nil, sealed, "bus", now.Add(late)); !errors.Is(err, ErrStale) {
			t.Errorf("%v later: %v", late, err)
		}
	}
	if _, at, err := s.Open(nil, sealed, "bus"); err != nil || !at.Equal(now) {
		t.Error(at, err)
	}
	if _, _, err := s.Open(nil, sealed, "another"); !errors.Is(err, ErrForged) {
		t.Error("in another context:", err)
	}
	other, err := NewSealer([]byte("secret of another"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := other.Open(nil, sealed, "bus"); !errors.Is(err, ErrForged) {
		t.Error("by another cluster:", err)
	}
	for i := range sealed {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		if _, _, err := s.Open(nil, b, "bus"); !errors.Is(err, ErrForged) {
			t.Errorf("byte %d changed: %v", i, err)
		}
		if _, _, err := s.Open(nil, sealed[:i], "bus"); !errors.Is(err, ErrForged) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
	if bytes.Equal(sealed, s.Seal(nil, plain, "bus", now)) {
		t.Error("a nonce was used twice")
	}
	if _, err := NewSealer(nil); err == nil {
		t.Error("a sealer without a secret")
	}
}

func BenchmarkSealedLocation(b *testing.B) {
	s, err := NewSealer([]byte("secret"))
	if err != nil {
		b.Fatal(err)
	}
	m := Message{Type: TypeLocation, Locations: []Location{location(1, 1, 1)}}
	var plain, sealed, opened []byte
	var got Message
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		plain = m.Append(plain[:0])
		sealed = s.Seal(sealed[:0], plain, "bus", now)
		if opened, err = s.OpenFresh(opened[:0], sealed, "bus", now); err != nil {
			b.Fatal(err)
		}
		if err := got.Parse(opened); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(sealed)), "B/message")
}
