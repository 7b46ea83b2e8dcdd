package server

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// answerBytes packs an answer to name with records of every section and an OPT
// record at the end.
func answerBytes(t testing.TB, name string, ttl uint32) []byte {
	t.Helper()
	n := dnsmessage.MustNewName(name)
	h := func(kind dnsmessage.Type) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: n, Type: kind, Class: dnsmessage.ClassINET, TTL: ttl}
	}
	m := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: 99, Response: true, RecursionAvailable: true},
		Questions:   []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		Answers:     []dnsmessage.Resource{{Header: h(dnsmessage.TypeA), Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}}}},
		Authorities: []dnsmessage.Resource{{Header: h(dnsmessage.TypeNS), Body: &dnsmessage.NSResource{NS: n}}},
		Additionals: []dnsmessage.Resource{{Header: h(dnsmessage.TypeAAAA), Body: &dnsmessage.AAAAResource{}}},
	}
	withEDNS(1232, false)(&m)
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parsedQuery(t testing.TB, msg []byte) *dnsQuery {
	t.Helper()
	q, rcode, ok := dnsParseQuery(msg)
	if !ok || rcode != 0 {
		t.Fatalf("question % x: rcode %d, %v", msg, rcode, ok)
	}
	return &q
}

// TestDNSTruncatedPrefixes: no beginning of a message is taken for a whole one.
func TestDNSTruncatedPrefixes(t *testing.T) {
	msg := answerBytes(t, "www.example.org.", 60)
	q := parsedQuery(t, question(t, "www.example.org.", dnsmessage.TypeA))
	if _, ok := dnsParseAnswer(slices.Clone(msg), 99, &q.key, time.Time{}); !ok {
		t.Fatal("the whole message is not accepted")
	}
	for n := range msg {
		if _, ok := dnsParseAnswer(slices.Clone(msg[:n]), 99, &q.key, time.Time{}); ok {
			t.Errorf("the first %d bytes of %d are accepted", n, len(msg))
		}
	}
	ask := question(t, "www.example.org.", dnsmessage.TypeA, withEDNS(1232, true))
	for n := range ask {
		if _, rcode, ok := dnsParseQuery(ask[:n]); ok && rcode == dnsRcodeOK {
			t.Errorf("the first %d bytes of a question of %d are accepted", n, len(ask))
		}
	}
}

// TestDNSOptNotLast cuts the message at an OPT record that is not the last, so
// that no name points to where nothing is any more.
func TestDNSOptNotLast(t *testing.T) {
	q := parsedQuery(t, question(t, "a.example.", dnsmessage.TypeA))
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 5, Response: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("a.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	extra := func(name string) {
		m.Additionals = append(m.Additionals, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 9},
			Body:   &dnsmessage.AResource{A: [4]byte{1, 2, 3, 4}},
		})
	}
	extra("before.example.")
	withEDNS(1232, false)(&m)
	extra("behind.other.")
	extra("x.behind.other.") // its name points behind the OPT record
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a, ok := dnsParseAnswer(b, 5, &q.key, time.Time{})
	if !ok {
		t.Fatal("not accepted")
	}
	var got dnsmessage.Message
	if err := got.Unpack(appendAnswer(nil, q, a, time.Time{}, 512)); err != nil {
		t.Fatal(err)
	}
	if len(got.Additionals) != 1 || got.Additionals[0].Header.Name.String() != "before.example." {
		t.Errorf("additional records: %v", got.Additionals)
	}
}

func TestDNSLifetime(t *testing.T) {
	ttl := func(n uint32) ttlMin { return ttlMin{any: true, ttl: n} }
	for i, c := range []struct {
		rcode               int
		truncated, answered bool
		positive, negative  ttlMin
		want                time.Duration
	}{
		{0, false, true, ttl(60), ttlMin{}, time.Minute},
		{0, false, true, ttl(1), ttlMin{}, dnsMinTTL},
		{0, false, true, ttl(0), ttlMin{}, 0},
		{0, false, true, ttl(1 << 30), ttlMin{}, dnsMaxTTL},
		{0, false, true, ttl(60), ttl(10), time.Minute}, // a stray SOA
		{0, true, true, ttl(60), ttlMin{}, 0},
		{0, false, false, ttlMin{}, ttl(60), time.Minute},
		{0, false, false, ttlMin{}, ttl(7200), dnsMaxNegative},
		{0, false, false, ttlMin{}, ttlMin{}, 0},
		{0, false, false, ttl(60), ttlMin{}, 0}, // an alias to nothing, without proof
		{0, false, false, ttl(60), ttl(30), 30 * time.Second},
		{dnsRcodeNXDomain, false, false, ttlMin{}, ttl(60), time.Minute},
		{dnsRcodeNXDomain, false, true, ttl(60), ttlMin{}, 0},
		{dnsRcodeServFail, false, false, ttlMin{}, ttl(60), 0},
		{dnsRcodeRefused, false, true, ttl(60), ttlMin{}, 0},
	} {
		if got := dnsLifetime(c.rcode, c.truncated, c.answered, c.positive, c.negative); got != c.want {
			t.Errorf("case %d: %v, want %v", i, got, c.want)
		}
	}
}

// TestDNSLyingTTL: a TTL with the top bit set is none (RFC 2181 section 8).
func TestDNSLyingTTL(t *testing.T) {
	q := parsedQuery(t, question(t, "a.example.", dnsmessage.TypeA))
	a, ok := dnsParseAnswer(answerBytes(t, "a.example.", 1<<31), 99, &q.key, time.Time{})
	if !ok || a.ttl != 0 {
		t.Errorf("kept for %v", a.ttl)
	}
}

func TestDNSCache(t *testing.T) {
	now := time.Unix(1e9, 0)
	key := func(i int) dnsKey { return dnsKey{name: fmt.Sprintf("\x04%04d\x00", i)} }
	put := func(c *dnsCache, i, size int) {
		c.put(key(i), &dnsAnswer{msg: make([]byte, size), since: now, ttl: time.Minute})
	}
	c := newDNSCache(3, 1<<20)
	for i := range 3 {
		put(c, i, 100)
	}
	if c.get(key(0), now) == nil { // used, so it stays
		t.Fatal("lost")
	}
	put(c, 3, 100)
	if c.get(key(1), now) != nil || c.get(key(0), now) == nil || c.get(key(3), now) == nil {
		t.Error("not the one that was unused longest has gone")
	}
	put(c, 3, 200) // again
	if n, bytes := c.size(); n != 3 || bytes != 100+100+200+3*(6+dnsCacheOverhead) {
		t.Errorf("%d entries, %d bytes", n, bytes)
	}
	if c.get(key(3), now.Add(time.Minute-1)) == nil || c.get(key(3), now.Add(time.Minute)) != nil {
		t.Error("not kept for its time")
	}
	if n, _ := c.size(); n != 2 {
		t.Error("what is over is still counted")
	}
	c = newDNSCache(100, 2000)
	for i := range 10 {
		put(c, i, 300)
	}
	if n, bytes := c.size(); n != 3 || bytes > 2000 {
		t.Errorf("%d entries, %d bytes", n, bytes)
	}
	put(c, 11, 5000)
	if c.get(key(11), now) != nil || c.get(key(9), now) == nil {
		t.Error("an answer larger than the cache has pushed out all others")
	}
	c.put(key(12), &dnsAnswer{since: now})
	if c.get(key(12), now) != nil {
		t.Error("an answer that must not be kept was")
	}
}

func TestDNSReverse(t *testing.T) {
	for text, want := range map[string]string{
		"4.3.2.1.in-addr.arpa":     "1.2.3.4",
		"0.0.0.0.in-addr.arpa":     "0.0.0.0",
		"255.0.0.127.in-addr.arpa": "127.0.0.255",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa": "2001:db8::1",
		"3.2.1.in-addr.arpa": "", "5.4.3.2.1.in-addr.arpa": "", "256.3.2.1.in-addr.arpa": "",
		"04.3.2.1.in-addr.arpa": "", "a.3.2.1.in-addr.arpa": "", "1000.3.2.1.in-addr.arpa": "",
		"in-addr.arpa": "", "ip6.arpa": "", "1.0.ip6.arpa": "", "example.org": "",
		"g.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa":  "",
		"11.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa": "",
	} {
		wire, ok := dnsWireName(text)
		if !ok {
			t.Fatal(text)
		}
		got, ok := dnsReverse(wire)
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %s, %v; want %q", text, got, ok, want)
		}
	}
}

func TestDNSNames(t *testing.T) {
	long := string(bytes.Repeat([]byte("a"), 63))
	for text, want := range map[string]string{
		"a":        "\x01a\x00",
		"A.Bc.":    "\x01a\x02bc\x00",
		long:       "\x3f" + long + "\x00",
		long + "a": "",
		"":         "",
		".":        "",
		"a..b":     "",
		long + "." + long + "." + long + "." + long: "",
	} {
		got, ok := dnsWireName(text)
		if got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", text, got, ok)
		}
	}
	for wire, want := range map[string]string{"\x00": "", "\x01a\x02bc\x00": "a.bc", "\x03a.b\x00": "", "\x01\x00\x00": ""} {
		if got, ok := dnsTextName(wire); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", wire, got, ok)
		}
	}
	for _, c := range []struct {
		name string
		want bool
	}{{"\x09localhost\x00", true}, {"\x01a\x09localhost\x00", true}, {"\x0anlocalhost\x00", false}, {"\x0a\x09localhost\x00", false}, {"\x00", false}} {
		if got := dnsUnder(c.name, dnsNameLocalhost); got != c.want {
			t.Errorf("%q under localhost: %v", c.name, got)
		}
	}
}

func TestParseResolvConf(t *testing.T) {
	got := *parseResolvConf([]byte("# comment\n; nameserver 9.9.9.9\nnameserver 192.0.2.1\n nameserver\t192.0.2.2 trailing\n" +
		"nameserver fe80::1%eth0\nnameserver bad\nnameserver\nsearch example.org\noptions edns0\nNAMESERVER 1.1.1.1\nnameserver 192.0.2.3"))
	want := "[192.0.2.1:53 192.0.2.2:53 [fe80::1%eth0]:53 192.0.2.3:53]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
	if n := len(*parseResolvConf(bytes.Repeat([]byte("nameserver 192.0.2.1\n"), 100))); n != dnsMaxResolver {
		t.Errorf("%d resolvers", n)
	}
}

func TestParseHosts(t *testing.T) {
	h := parseHosts([]byte("127.0.0.1 localhost\n\n# 1.2.3.4 no\n192.0.2.1\tHost.example. host#no\n192.0.2.1 alias host\nfe80::1%lo0 link\nbad host\n192.0.2.9\n::ffff:192.0.2.5 mapped\n"))
	name := func(s string) string { w, _ := dnsWireName(s); return w }
	for text, want := range map[string]string{
		"localhost": "[127.0.0.1]", "host.example": "[192.0.2.1]", "host": "[192.0.2.1]", "alias": "[192.0.2.1]",
		"link": "[fe80::1]", "no": "[]", "mapped": "[192.0.2.5]",
	} {
		if got := fmt.Sprint(h.addrs[name(text)]); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	if got := h.names[netip.MustParseAddr("192.0.2.1")]; got != name("host.example") {
		t.Errorf("192.0.2.1 is %q", got)
	}
}

// TestDNSFile: what was read stays when the file is gone.
func TestDNSFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f := dnsFile[[]netip.AddrPort]{path: path, parse: parseResolvConf}
	now := time.Unix(1e9, 0)
	if got := f.get(now); len(*got) != 0 {
		t.Errorf("no file: %v", got)
	}
	egressWriteFile(t, path, "nameserver 192.0.2.1\n")
	if got := f.get(now.Add(dnsFileCheck - 1)); len(*got) != 0 {
		t.Error("the file was looked at too soon")
	}
	if got := f.get(now.Add(dnsFileCheck)); len(*got) != 1 {
		t.Errorf("the file appeared: %v", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := f.get(now.Add(2 * dnsFileCheck)); len(*got) != 1 {
		t.Errorf("the file is gone: %v", got)
	}
}

func FuzzDNSQuery(f *testing.F) {
	f.Add(question(f, "a.example.", dnsmessage.TypeA))
	f.Add(question(f, "a.example.", dnsmessage.TypeALL, withEDNS(4096, true)))
	f.Add(question(f, "1.0.0.127.in-addr.arpa.", dnsmessage.TypePTR))
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1})
	s, err := newDNSService(dnsConfig{ClientOf: egressClientOf, now: time.Now, Host: dnsHostFiles{Hosts: "none", ResolvConf: "none"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, out, more := s.begin(b, func(q *dnsQuery) int { return q.size })
		if out == nil {
			if !more {
				return
			}
			// Everything that is asked for has an answer in the end.
			out = appendError(nil, q, dnsRcodeServFail, dnsFlagRA)
			up := appendQuestion(nil, 1, &q.key, q.question, true)
			again, rcode, ok := dnsParseQuery(up)
			if !ok || rcode != 0 || again.key != q.key {
				t.Fatalf("upstream is asked % x for % x", up, b)
			}
		}
		if len(out) > q.size+dnsMaxName+4+dnsOPTLen || out[0] != b[0] || out[1] != b[1] || out[2]&0x80 == 0 {
			t.Fatalf("answer % x to % x", out, b)
		}
		if !dnsWalk(out, func(*dnsRecord) {}) {
			t.Fatalf("broken answer % x to % x", out, b)
		}
	})
}

func FuzzDNSAnswer(f *testing.F) {
	f.Add(answerBytes(f, "a.example.", 60))
	f.Add(answerBytes(f, "a.example.", 1<<31))
	soa := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: 99, Response: true, RCode: dnsmessage.RCodeNameError},
		Questions:   []dnsmessage.Question{{Name: dnsmessage.MustNewName("a.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		Authorities: []dnsmessage.Resource{dnsSOA("example.", 1, 2)},
	}
	b, err := soa.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	q := parsedQuery(f, question(f, "A.example.", dnsmessage.TypeA, withEDNS(512, false)))
	f.Fuzz(func(t *testing.T, b []byte) {
		now := time.Unix(1e9, 0)
		in := slices.Clone(b)
		a, ok := dnsParseAnswer(in, binary.BigEndian.Uint16(append(slices.Clone(b), 0, 0)), &q.key, now)
		if !ok {
			return
		}
		if a.ttl < 0 || a.ttl > dnsMaxTTL {
			t.Fatalf("kept for %v", a.ttl)
		}
		for _, limit := range []int{512, 65535} {
			out := appendAnswer(nil, q, a, now.Add(time.Hour), limit)
			if len(out) > limit && len(out) > dnsHeaderLen+len(q.question)+dnsOPTLen {
				t.Fatalf("%d bytes, limit %d", len(out), limit)
			}
			if !dnsWalk(out, func(*dnsRecord) {}) {
				t.Fatalf("broken answer % x from % x", out, b)
			}
		}
	})
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nnameserver ::1\n#\n;\n"))
	f.Add([]byte("nameserver fe80::1%a\rnameserver"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, a := range *parseResolvConf(b) {
			if !a.IsValid() || a.Port() != dnsPort {
				t.Fatalf("resolver %v", a)
			}
		}
	})
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("127.0.0.1 localhost # x\n::1 localhost ip6-localhost\n"))
	f.Add([]byte("1.2.3.4 a..b .c d. \xff\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := parseHosts(b)
		for name, addrs := range h.addrs {
			if _, at, ok := dnsPlainName([]byte(name), 0); !ok || at != len(name) || len(addrs) == 0 {
				t.Fatalf("name %q: %v", name, addrs)
			}
		}
		for a, name := range h.names {
			if !slices.Contains(h.addrs[name], a) {
				t.Fatalf("%s is %q, which is %v", a, name, h.addrs[name])
			}
		}
	})
}
