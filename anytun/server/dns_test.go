package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/anytun-go/anytun/netstack/splice"
)

// dnsServer is a real DNS server on loopback, over UDP and TCP at one port,
// whose answers a test decides.
type dnsServer struct {
	t      testing.TB
	at     netip.AddrPort
	answer func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte // nil: silence
	udp    *net.UDPConn
	last   netip.AddrPort // where the question being answered came from
	asked  atomic.Int64
	wg     sync.WaitGroup
}

func newDNSServer(t testing.TB, answer func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte) *dnsServer {
	t.Helper()
	s := &dnsServer{t: t, answer: answer}
	var ln net.Listener
	for range 20 {
		u, at := egressListenUDP(t, "127.0.0.1:0")
		if err := u.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			continue
		}
		s.udp, s.at, ln = u, at, l
		break
	}
	if ln == nil {
		t.Fatal("no port is free in both protocols")
	}
	s.wg.Add(2)
	go s.udpLoop()
	go s.tcpLoop(ln)
	t.Cleanup(func() { s.udp.Close(); ln.Close(); s.wg.Wait() })
	return s
}

func (s *dnsServer) handle(b []byte, tcp bool) []byte {
	var q dnsmessage.Message
	if err := q.Unpack(b); err != nil {
		s.t.Errorf("upstream got a broken question: %v", err)
		return nil
	}
	s.asked.Add(1)
	return s.answer(s, q, tcp)
}

func (s *dnsServer) udpLoop() {
	defer s.wg.Done()
	b := make([]byte, 65536)
	for {
		n, from, err := s.udp.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		s.last = from
		if out := s.handle(b[:n], false); out != nil {
			_, _ = s.udp.WriteToUDPAddrPort(out, from)
		}
	}
}

func (s *dnsServer) tcpLoop(ln net.Listener) {
	defer s.wg.Done()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		var length [2]byte
		if _, err := io.ReadFull(c, length[:]); err == nil {
			b := make([]byte, binary.BigEndian.Uint16(length[:]))
			if _, err := io.ReadFull(c, b); err == nil {
				if out := s.handle(b, true); out != nil {
					_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
				}
			}
		}
		c.Close()
	}
}

// reply is the usual answer to q, changed by f.
func (s *dnsServer) reply(q dnsmessage.Message, f func(m *dnsmessage.Message)) []byte {
	m := dnsmessage.Message{Header: q.Header, Questions: slices.Clone(q.Questions)}
	m.Response, m.RecursionAvailable = true, true
	if len(q.Additionals) > 0 {
		m.Additionals = q.Additionals
	}
	f(&m)
	b, err := m.Pack()
	if err != nil {
		s.t.Errorf("pack: %v", err)
		return nil
	}
	return b
}

func dnsA(q dnsmessage.Message, ttl uint32, a ...byte) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: ttl},
		Body:   &dnsmessage.AResource{A: [4]byte(a)},
	}
}

func dnsSOA(zone string, ttl, minimum uint32) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(zone), Type: dnsmessage.TypeSOA, Class: dnsmessage.ClassINET, TTL: ttl},
		Body:   &dnsmessage.SOAResource{NS: dnsmessage.MustNewName("ns." + zone), MBox: dnsmessage.MustNewName("root." + zone), MinTTL: minimum},
	}
}

// answerA answers everything with 192.0.2.1.
func answerA(s *dnsServer, q dnsmessage.Message, _ bool) []byte {
	return s.reply(q, func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{dnsA(q, 300, 192, 0, 2, 1)} })
}

// question packs a client's question.
func question(t testing.TB, name string, kind dnsmessage.Type, f ...func(m *dnsmessage.Message)) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 0x1234, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	for _, f := range f {
		f(&m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// withEDNS adds an OPT record that offers size bytes.
func withEDNS(size int, do bool) func(m *dnsmessage.Message) {
	return func(m *dnsmessage.Message) {
		h := dnsmessage.ResourceHeader{}
		if err := h.SetEDNS0(size, dnsmessage.RCodeSuccess, do); err != nil {
			panic(err)
		}
		m.Additionals = append(m.Additionals, dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{}})
	}
}

func dnsGate() netip.AddrPort { return netip.AddrPortFrom(egressGate4, dnsPort) }

// askRaw sends one datagram to the gateway and returns the answer.
func (r *egressRig) askRaw(msg []byte) []byte {
	r.t.Helper()
	c := r.socket()
	defer c.Close()
	sendUDP(r.t, c, dnsGate(), msg)
	got, from := receiveUDP(r.t, c)
	if from != dnsGate() {
		r.t.Fatalf("answer from %s", from)
	}
	return []byte(got)
}

// ask sends one question over UDP and unpacks the answer.
func (r *egressRig) ask(msg []byte) dnsmessage.Message {
	r.t.Helper()
	return r.unpack(r.askRaw(msg))
}

func (r *egressRig) unpack(b []byte) dnsmessage.Message {
	r.t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		r.t.Fatalf("answer % x: %v", b, err)
	}
	return m
}

// addrsOf lists the A and AAAA records of an answer.
func addrsOf(m dnsmessage.Message) string {
	var out []string
	for _, a := range m.Answers {
		switch b := a.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			out = append(out, netip.AddrFrom16(b.AAAA).String())
		case *dnsmessage.PTRResource:
			out = append(out, b.PTR.String())
		}
	}
	return strings.Join(out, " ")
}

func withDNS(up ...netip.AddrPort) func(*socketsConfig) {
	return func(c *socketsConfig) { c.DNS = up }
}

func TestDNSForward(t *testing.T) {
	questions := make(chan dnsmessage.Message, 10)
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		questions <- q
		return answerA(s, q, tcp)
	})
	r := newEgressRig(t, withDNS(up.at))
	m := r.ask(question(t, "WwW.Example.ORG.", dnsmessage.TypeA, withEDNS(1400, true)))
	if m.ID != 0x1234 || !m.Response || m.RCode != 0 || !m.RecursionDesired || !m.RecursionAvailable || addrsOf(m) != "192.0.2.1" {
		t.Errorf("answer %s", m.GoString())
	}
	if got := m.Questions[0].Name.String(); got != "WwW.Example.ORG." {
		t.Errorf("the question came back as %s", got)
	}
	if len(m.Additionals) != 1 || m.Additionals[0].Header.Type != dnsmessage.TypeOPT || !m.Additionals[0].Header.DNSSECAllowed() {
		t.Errorf("additional records %v, want one OPT", m.Additionals)
	}
	if seen := <-questions; len(seen.Additionals) != 1 || !seen.Additionals[0].Header.DNSSECAllowed() || seen.Additionals[0].Header.Class != dnsUDPOffered || !seen.AuthenticData {
		t.Errorf("upstream saw %s", seen.GoString())
	}

	// From the cache, with another id, another spelling, a TTL that has aged.
	r.ahead.Store(int64(100 * time.Second))
	m = r.ask(question(t, "www.example.org.", dnsmessage.TypeA, withEDNS(1400, true), func(m *dnsmessage.Message) { m.ID = 7 }))
	if m.ID != 7 || addrsOf(m) != "192.0.2.1" || m.Questions[0].Name.String() != "www.example.org." {
		t.Errorf("answer %s", m.GoString())
	}
	if ttl := m.Answers[0].Header.TTL; ttl < 190 || ttl > 200 {
		t.Errorf("TTL %d, want about 200", ttl)
	}
	// Without EDNS it is another question, and has no OPT in the answer.
	m = r.ask(question(t, "www.example.org.", dnsmessage.TypeA))
	if len(m.Additionals) != 0 || addrsOf(m) != "192.0.2.1" {
		t.Errorf("answer %s", m.GoString())
	}
	if n := up.asked.Load(); n != 2 {
		t.Errorf("upstream was asked %d times, want 2", n)
	}
	// Over.
	r.ahead.Store(int64(401 * time.Second))
	r.ask(question(t, "www.example.org.", dnsmessage.TypeA))
	if n := up.asked.Load(); n != 3 {
		t.Errorf("upstream was asked %d times, want 3", n)
	}
	if st := r.e.Stats().DNS; st.Queries != 4 || st.CacheHits != 1 || st.CacheMisses != 3 || st.UpstreamQueries != 3 || st.CacheEntries != 2 {
		t.Errorf("stats: %+v", st)
	}
}

// TestDNSResolver uses the client netstack's own resolver, over IPv6 as well.
func TestDNSResolver(t *testing.T) {
	up := newDNSServer(t, answerA)
	r := newEgressRig(t, withDNS(up.at))
	for _, gate := range []netip.Addr{egressGate4, egressGate6} {
		res := r.client.Resolver([]netip.AddrPort{netip.AddrPortFrom(gate, dnsPort)})
		got, err := res.LookupNetIP(r.ctx(), "ip4", "example.org")
		if err != nil || !slices.Equal(got, []netip.Addr{netip.MustParseAddr("192.0.2.1")}) {
			t.Errorf("through %s: %v, %v", gate, got, err)
		}
	}
}

func TestDNSNegative(t *testing.T) {
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, _ bool) []byte {
		return s.reply(q, func(m *dnsmessage.Message) {
			switch name := q.Questions[0].Name.String(); name {
			case "nx.example.":
				m.RCode = dnsmessage.RCodeNameError
				m.Authorities = []dnsmessage.Resource{dnsSOA("example.", 900, 60)}
			case "nodata.example.":
				m.Authorities = []dnsmessage.Resource{dnsSOA("example.", 60, 900)}
			case "nosoa.example.":
				m.RCode = dnsmessage.RCodeNameError
			}
		})
	})
	r := newEgressRig(t, withDNS(up.at))
	for _, c := range []struct {
		name  string
		rcode dnsmessage.RCode
		keeps bool
	}{
		{"nx.example.", dnsmessage.RCodeNameError, true},
		{"nodata.example.", dnsmessage.RCodeSuccess, true},
		{"nosoa.example.", dnsmessage.RCodeNameError, false},
	} {
		r.ahead.Store(0)
		up.asked.Store(0)
		for _, at := range []time.Duration{0, 50 * time.Second, 61 * time.Second} {
			r.ahead.Store(int64(at))
			if m := r.ask(question(t, c.name, dnsmessage.TypeA)); m.RCode != c.rcode {
				t.Errorf("%s: %v", c.name, m.RCode)
			}
		}
		want := int64(2) // at first, and when the lesser of the two TTLs has passed
		if !c.keeps {
			want = 3
		}
		if n := up.asked.Load(); n != want {
			t.Errorf("%s: asked %d times, want %d", c.name, n, want)
		}
	}
}

// TestDNSLarge has an answer that fits neither the upstream's datagram nor the
// client's.
func TestDNSLarge(t *testing.T) {
	const records = 100
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		return s.reply(q, func(m *dnsmessage.Message) {
			if !tcp {
				m.Truncated = true
				return
			}
			for i := range records {
				m.Answers = append(m.Answers, dnsA(q, 300, 192, 0, 2, byte(i)))
			}
		})
	})
	r := newEgressRig(t, withDNS(up.at))
	for _, c := range []struct {
		edns    int
		records int
	}{{0, 0}, {512, 0}, {1232, 0}, {4096, records}, {65000, records}} {
		msg := question(t, "large.example.", dnsmessage.TypeA)
		limit := 512
		if c.edns > 0 {
			msg = question(t, "large.example.", dnsmessage.TypeA, withEDNS(c.edns, false))
			limit = c.edns
		}
		b := r.askRaw(msg)
		m := r.unpack(b)
		if len(b) > limit || m.Truncated != (c.records == 0) || len(m.Answers) != c.records || m.RCode != 0 {
			t.Errorf("EDNS %d: %d bytes, %d records, truncated %v", c.edns, len(b), len(m.Answers), m.Truncated)
		}
	}
	// Over TCP it is whole, for a client without EDNS too.
	c := r.dial(dnsGate())
	defer c.Close()
	writeDNS(t, c, question(t, "large.example.", dnsmessage.TypeA))
	if m := r.unpack(readStream(t, c)); len(m.Answers) != records || m.Truncated {
		t.Errorf("TCP: %d records, truncated %v", len(m.Answers), m.Truncated)
	}
	if st := r.e.Stats().DNS; st.Truncated != 3 || st.UpstreamTCP == 0 || st.Conns != 1 {
		t.Errorf("stats: %+v", st)
	}
}

func writeDNS(t testing.TB, c net.Conn, msg []byte) {
	t.Helper()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)); err != nil {
		t.Fatal(err)
	}
}

func readStream(t testing.TB, c net.Conn) []byte {
	t.Helper()
	var buf splice.Buffer
	b, err := readDNS(c, &buf, true)
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte(nil), b...)
}

// TestDNSPipeline sends questions over one connection without waiting; a slow
// one doesn't hold up the others.
func TestDNSPipeline(t *testing.T) {
	release := make(chan struct{})
	slow := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		if q.Questions[0].Name.String() == "slow.example." {
			<-release
		}
		return answerA(s, q, tcp)
	})
	r := newEgressRig(t, withDNS(slow.at))
	r.ask(question(t, "fast.example.", dnsmessage.TypeA)) // into the cache
	c := r.dial(dnsGate())
	defer c.Close()
	id := func(n uint16) func(*dnsmessage.Message) { return func(m *dnsmessage.Message) { m.ID = n } }
	writeDNS(t, c, question(t, "slow.example.", dnsmessage.TypeA, id(1)))
	writeDNS(t, c, question(t, "fast.example.", dnsmessage.TypeA, id(2)))
	if m := r.unpack(readStream(t, c)); m.ID != 2 {
		t.Errorf("first answer is number %d", m.ID)
	}
	// The client has sent all it had; what is under way is still answered.
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if m := r.unpack(readStream(t, c)); m.ID != 1 || addrsOf(m) != "192.0.2.1" {
		t.Errorf("second answer %s", m.GoString())
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
}

func TestDNSConnLimit(t *testing.T) {
	r := newEgressRig(t, withDNS(netip.MustParseAddrPort("127.0.0.1:1")))
	for range dnsConnsPerClient {
		c := r.dial(dnsGate())
		writeDNS(t, c, question(t, "localhost.", dnsmessage.TypeA))
		readStream(t, c)
	}
	c := r.dial(dnsGate())
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("one connection too many is served")
	}
	if st := r.e.Stats().DNS; st.Conns != dnsConnsPerClient || st.ConnsFull != 1 {
		t.Errorf("stats: %+v", st)
	}
}

func TestDNSBadQuestions(t *testing.T) {
	r := newEgressRig(t, withDNS(netip.MustParseAddrPort("127.0.0.1:1")))
	good := question(t, "a.example.", dnsmessage.TypeA)
	change := func(at int, v ...byte) []byte {
		b := slices.Clone(good)
		copy(b[at:], v)
		return b
	}
	for name, c := range map[string]struct {
		msg   []byte
		rcode dnsmessage.RCode
	}{
		"no question":         {good[:12:12], dnsmessage.RCodeFormatError},
		"empty":               {change(4, 0, 0)[:12], dnsmessage.RCodeFormatError},
		"two questions":       {question(t, "a.", 1, func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions...) }), dnsmessage.RCodeFormatError},
		"cut short":           {good[:len(good)-1], dnsmessage.RCodeFormatError},
		"trailing bytes":      {append(slices.Clone(good), 1), dnsmessage.RCodeFormatError},
		"compressed question": {change(12, 0xc0, 12), dnsmessage.RCodeFormatError},
		"label type":          {change(12, 0x41), dnsmessage.RCodeFormatError},
		"with an answer":      {question(t, "a.", 1, func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{dnsA(*m, 1, 1, 2, 3, 4)} }), dnsmessage.RCodeFormatError},
		"two OPT":             {question(t, "a.", 1, withEDNS(512, false), withEDNS(512, false)), dnsmessage.RCodeFormatError},
		"opcode notify":       {change(2, 0x20), dnsmessage.RCodeNotImplemented},
		"opcode update":       {change(2, 0x28), dnsmessage.RCodeNotImplemented},
		"ANY":                 {question(t, "a.", dnsmessage.TypeALL), dnsmessage.RCodeNotImplemented},
		"AXFR":                {question(t, "a.", dnsmessage.TypeAXFR), dnsmessage.RCodeRefused},
		"IXFR":                {question(t, "a.", 251), dnsmessage.RCodeRefused},
		"MAILB":               {question(t, "a.", 253), dnsmessage.RCodeNotImplemented},
		"type 0":              {question(t, "a.", 0), dnsmessage.RCodeNotImplemented},
		"chaos":               {question(t, "version.bind.", dnsmessage.TypeTXT, func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS }), dnsmessage.RCodeRefused},
	} {
		m := r.ask(c.msg)
		if m.ID != 0x1234 || !m.Response || m.RCode != c.rcode || len(m.Answers) != 0 {
			t.Errorf("%s: answer %s", name, m.GoString())
		}
	}
	// EDNS version 1 (RFC 6891 section 6.1.3).
	b := question(t, "a.", dnsmessage.TypeA, withEDNS(1232, false))
	b[len(b)-5] = 1
	m := r.ask(b)
	if len(m.Additionals) != 1 || m.Additionals[0].Header.ExtendedRCode(m.RCode) != 16 {
		t.Errorf("EDNS version 1: answer %s", m.GoString())
	}
	// These get nothing, else two servers could talk for ever.
	c := r.socket()
	before := r.e.Stats().DNS.DropIgnored
	response := slices.Clone(good)
	response[2] |= 0x80
	for _, b := range [][]byte{response, good[:11], {}, make([]byte, dnsQueryMax+1)} {
		sendUDP(t, c, dnsGate(), b)
	}
	egressUntil(t, "four messages to be ignored", func() bool { return r.e.Stats().DNS.DropIgnored == before+4 })
	st := r.e.Stats().DNS
	if st.FormErr != 9 || st.NotImp != 5 || st.Refused != 3 || st.BadVers != 1 || st.UpstreamQueries != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestDNSLocal(t *testing.T) {
	up := newDNSServer(t, answerA)
	var hosts string
	r := newEgressRig(t, withDNS(up.at), func(c *socketsConfig) {
		hosts = c.host.Hosts
		egressWriteFile(t, hosts, "192.0.2.7\tPrinter.lan printer # upstairs\n2001:db8::7 printer\n192.0.2.8 printer\n127.0.0.1 localhost evil.example\n")
	})
	for _, c := range []struct {
		name  string
		kind  dnsmessage.Type
		rcode dnsmessage.RCode
		want  string
	}{
		{"localhost.", dnsmessage.TypeA, 0, "127.0.0.1"},
		{"LOCALHOST.", dnsmessage.TypeAAAA, 0, "::1"},
		{"a.b.localhost.", dnsmessage.TypeA, 0, "127.0.0.1"},
		{"localhost.", dnsmessage.TypeMX, 0, ""},
		{"notlocalhost.", dnsmessage.TypeA, 0, "192.0.2.1"}, // upstream's
		{"x.invalid.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
		{"x.onion.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
		{"printer.", dnsmessage.TypeA, 0, "192.0.2.7 192.0.2.8"},
		{"PRINTER.", dnsmessage.TypeAAAA, 0, "2001:db8::7"},
		{"printer.", dnsmessage.TypeTXT, 0, ""},
		{"printer.lan.", dnsmessage.TypeA, 0, "192.0.2.7"},
		{"7.2.0.192.in-addr.arpa.", dnsmessage.TypePTR, 0, "printer.lan."},
		{"7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", dnsmessage.TypePTR, 0, "printer."},
		{"1.0.0.127.in-addr.arpa.", dnsmessage.TypePTR, 0, "localhost."},
		{"2.0.0.127.in-addr.arpa.", dnsmessage.TypePTR, 0, "localhost."},
		{"7.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, dnsmessage.RCodeNameError, ""},
		{"evil.example.", dnsmessage.TypeA, 0, "127.0.0.1"},
	} {
		m := r.ask(question(t, c.name, c.kind))
		if m.RCode != c.rcode || addrsOf(m) != c.want || !m.RecursionAvailable {
			t.Errorf("%s %v: %s", c.name, c.kind, m.GoString())
		}
	}
	if n := up.asked.Load(); n != 1 {
		t.Errorf("upstream was asked %d times, want once", n)
	}
	// The file changes.
	egressWriteFile(t, hosts, "192.0.2.99 printer\n")
	r.ahead.Store(int64(2 * dnsFileCheck))
	if m := r.ask(question(t, "printer.", dnsmessage.TypeA)); addrsOf(m) != "192.0.2.99" {
		t.Errorf("after the file has changed: %s", addrsOf(m))
	}
}

// TestDNSHostResolvers takes the upstreams from resolv.conf and follows it.
func TestDNSHostResolvers(t *testing.T) {
	var path string
	r := newEgressRig(t, func(c *socketsConfig) {
		path = c.host.ResolvConf
		egressWriteFile(t, path, "nameserver 127.0.0.1\n")
	})
	if got := fmt.Sprint(r.e.dns.upstreams()); got != "[127.0.0.1:53]" {
		t.Errorf("upstreams %s", got)
	}
	egressWriteFile(t, path, "nameserver 192.0.2.1\nnameserver 2001:db8::53\n")
	r.ahead.Store(int64(2 * dnsFileCheck))
	if got := fmt.Sprint(r.e.dns.upstreams()); got != "[192.0.2.1:53 [2001:db8::53]:53]" {
		t.Errorf("upstreams after a change %s", got)
	}
}

// TestDNSInFlight bounds what one client has asked upstream, and asks what many
// want once.
func TestDNSInFlight(t *testing.T) {
	release := make(chan struct{})
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		<-release
		return answerA(s, q, tcp)
	})
	r := newEgressRig(t, withDNS(up.at))
	c := r.socket()
	for range dnsInFlightPerClient + 3 {
		sendUDP(t, c, dnsGate(), question(t, "busy.example.", dnsmessage.TypeA))
	}
	egressUntil(t, "the bound", func() bool { return r.e.Stats().DNS.DropFull == 3 })
	// Another client is served meanwhile.
	if !r.e.dns.enter(8) {
		t.Error("one client's questions fill the room of another")
	} else {
		r.e.dns.exit(8)
	}
	close(release)
	for range dnsInFlightPerClient {
		if got, _ := receiveUDP(t, c); addrsOf(r.unpack([]byte(got))) != "192.0.2.1" {
			t.Fatal("wrong answer")
		}
	}
	st := r.e.Stats().DNS
	if n := up.asked.Load(); n != 1 || st.Shared != dnsInFlightPerClient-1 {
		t.Errorf("upstream was asked %d times, %d shared", n, st.Shared)
	}
	egressUntil(t, "the questions to end", func() bool { return r.e.Stats().DNS.InFlight == 0 })
}

// TestDNSShutdown ends Run while a question is under way and a connection open;
// the rig checks what is left.
func TestDNSShutdown(t *testing.T) {
	up := newDNSServer(t, func(*dnsServer, dnsmessage.Message, bool) []byte { return nil })
	r := newEgressRig(t, withDNS(up.at))
	c := r.dial(dnsGate())
	writeDNS(t, c, question(t, "a.example.", dnsmessage.TypeA))
	egressUntil(t, "a question upstream", func() bool { return up.asked.Load() == 1 })
	r.cancel()
	if b, err := io.ReadAll(c); err == nil && len(b) > 0 && dnsmessage.RCode(b[5]&15) != dnsmessage.RCodeServerFailure {
		t.Errorf("the question was answered: % x", b)
	}
}
