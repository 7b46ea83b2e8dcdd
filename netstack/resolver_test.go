package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip/faketime"
)

// dnsRecord is a record whose data says its type: an address, or with "=" an
// alias, or with "<" a pointer.
type dnsRecord struct {
	name, data string
	ttl        uint32
}

func cname(name, target string) dnsRecord { return dnsRecord{name, "=" + target, 300} }

// dnsReply makes messages of the test's server.
type dnsReply struct {
	question  dnsmessage.Question
	id        uint16
	rcode     dnsmessage.RCode
	records   []dnsRecord
	soa       uint32 // the TTL of the negative answer
	truncated bool
}

func (r dnsReply) bytes(t testing.TB) []byte {
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	name := func(s string) dnsmessage.Name {
		n, err := dnsmessage.NewName(s + ".")
		must(err)
		return n
	}
	m := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: r.id, Response: true, RCode: r.rcode, Truncated: r.truncated})
	m.EnableCompression()
	must(m.StartQuestions())
	must(m.Question(r.question))
	must(m.StartAnswers())
	for _, x := range r.records {
		h := dnsmessage.ResourceHeader{Name: name(x.name), Class: dnsmessage.ClassINET, TTL: x.ttl}
		if s, ok := strings.CutPrefix(x.data, "="); ok {
			must(m.CNAMEResource(h, dnsmessage.CNAMEResource{CNAME: name(s)}))
		} else if s, ok := strings.CutPrefix(x.data, "<"); ok {
			must(m.PTRResource(h, dnsmessage.PTRResource{PTR: name(s)}))
		} else if a := netip.MustParseAddr(x.data); a.Is4() {
			must(m.AResource(h, dnsmessage.AResource{A: a.As4()}))
		} else {
			must(m.AAAAResource(h, dnsmessage.AAAAResource{AAAA: a.As16()}))
		}
	}
	if r.soa > 0 {
		must(m.StartAuthorities())
		must(m.SOAResource(dnsmessage.ResourceHeader{Name: name("example.com"), Class: dnsmessage.ClassINET, TTL: 9999},
			dnsmessage.SOAResource{NS: name("ns"), MBox: name("m"), MinTTL: r.soa}))
	}
	b, err := m.Finish()
	must(err)
	return b
}

// dnsServer answers on UDP and TCP with what answer returns; nil is silence.
type dnsServer struct {
	t         testing.TB
	questions atomic.Int32
	answer    func(q dnsmessage.Question, tcp, edns bool) *dnsReply
	at        netip.AddrPort
	wg        sync.WaitGroup
}

func (d *dnsServer) reply(b []byte, tcp bool) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil {
		d.t.Errorf("question: %v", err)
		return nil
	}
	q, err := p.Question()
	if err != nil || !h.RecursionDesired {
		d.t.Errorf("question: %v %+v", err, h)
		return nil
	}
	_ = p.SkipAllQuestions()
	_ = p.SkipAllAnswers()
	_ = p.SkipAllAuthorities()
	x, err := p.AdditionalHeader()
	d.questions.Add(1)
	r := d.answer(q, tcp, err == nil && x.Type == dnsmessage.TypeOPT)
	if r == nil {
		return nil
	}
	r.id = h.ID
	if r.question == (dnsmessage.Question{}) {
		r.question = q
	}
	return r.bytes(d.t)
}

func (d *dnsServer) udpLoop(u *PacketConn) {
	defer d.wg.Done()
	b := make([]byte, 4096)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if m := d.reply(b[:n], false); m != nil {
			_, _ = u.WriteToUDPAddrPort(m, from)
		}
	}
}

func (d *dnsServer) tcpLoop(l *Listener) {
	defer d.wg.Done()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		var size [2]byte
		_, _ = io.ReadFull(c, size[:])
		b := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, b); err == nil {
			if m := d.reply(b, true); m != nil {
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
			}
		}
		c.Close()
	}
}

func (p *pair) serveDNS(t testing.TB, port uint16, answer func(q dnsmessage.Question, tcp, edns bool) *dnsReply) *dnsServer {
	d := &dnsServer{t: t, answer: answer, at: netip.AddrPortFrom(server4, port)}
	u, err := p.server.ListenUDP(d.at)
	if err != nil {
		t.Fatal(err)
	}
	l, err := p.server.ListenTCP(d.at)
	if err != nil {
		t.Fatal(err)
	}
	d.wg.Add(2)
	go d.udpLoop(u)
	go d.tcpLoop(l)
	t.Cleanup(func() {
		u.Close()
		l.Close()
		d.wg.Wait()
	})
	return d
}

// zone answers from a list of records, aliases followed.
func zone(records ...dnsRecord) func(dnsmessage.Question, bool, bool) *dnsReply {
	return func(q dnsmessage.Question, _, _ bool) *dnsReply {
		name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
		r := &dnsReply{rcode: dnsmessage.RCodeNameError, soa: 60}
		for again := true; again; {
			again = false
		records:
			for _, x := range records {
				if x.name != name {
					continue
				}
				r.rcode = dnsmessage.RCodeSuccess
				switch {
				case x.data[0] == '=':
					r.records = append(r.records, x)
					name, again = x.data[1:], true
					break records
				case x.data[0] == '<' && q.Type == dnsmessage.TypePTR,
					x.data[0] != '<' && strings.Contains(x.data, ":") == (q.Type == dnsmessage.TypeAAAA) && q.Type != dnsmessage.TypePTR:
					r.records = append(r.records, x)
				}
			}
		}
		return r
	}
}

func addrs(s ...string) (out []netip.Addr) {
	for _, x := range s {
		out = append(out, netip.MustParseAddr(x))
	}
	return out
}

func sorted(a []netip.Addr) []netip.Addr {
	a = slices.Clone(a)
	slices.SortFunc(a, netip.Addr.Compare)
	return a
}

func TestLookup(t *testing.T) {
	p := newPair(t)
	d := p.serveDNS(t, 53, zone(
		dnsRecord{"both.example", "192.0.2.1", 60}, dnsRecord{"both.example", "192.0.2.2", 60}, dnsRecord{"both.example", "2001:db8::1", 60},
		dnsRecord{"four.example", "192.0.2.4", 60},
		cname("www.example", "cdn.example"), cname("cdn.example", "edge.example"), dnsRecord{"edge.example", "192.0.2.9", 60},
		cname("loop.example", "pool.example"),
		dnsRecord{"9.2.0.192.in-addr.arpa", "<edge.example", 60},
		dnsRecord{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa", "<six.example", 60},
	))
	r := p.client.Resolver([]netip.AddrPort{d.at})
	for _, tt := range []struct {
		network, name string
		want          []netip.Addr // nil: not found
	}{
		{"ip", "both.example", addrs("192.0.2.1", "192.0.2.2", "2001:db8::1")},
		{"ip4", "both.example", addrs("192.0.2.1", "192.0.2.2")},
		{"ip6", "both.example", addrs("2001:db8::1")},
		{"ip4", "BOTH.Example.", addrs("192.0.2.1", "192.0.2.2")},
		{"ip", "four.example", addrs("192.0.2.4")},
		{"ip6", "four.example", nil},
		{"ip4", "www.example", addrs("192.0.2.9")},
		{"ip", "loop.example", nil},
		{"ip", "nowhere.example", nil},
		{"ip", "192.0.2.77", addrs("192.0.2.77")},
		{"ip6", "2001:db8::77", addrs("2001:db8::77")},
		{"ip4", "2001:db8::77", nil},
		{"ip6", "192.0.2.77", nil},
		{"ip", "::ffff:192.0.2.77", addrs("192.0.2.77")},
		{"ip", "localhost", addrs("127.0.0.1", "::1")},
		{"ip4", "app.LOCALHOST.", addrs("127.0.0.1")},
		{"ip6", "localhost", addrs("::1")},
		{"ip", "", nil},
		{"ip", ".", nil},
		{"ip", "a..b", nil},
		{"ip", strings.Repeat("x", 64) + ".example", nil},
		{"ip", strings.Repeat("xxxxxxx.", 40) + "example", nil},
	} {
		for range 2 { // fresh and from the cache
			got, err := r.LookupNetIP(testContext(t), tt.network, tt.name)
			if tt.want == nil {
				var e *net.DNSError
				if !errors.As(err, &e) || !e.IsNotFound {
					t.Errorf("%s %q: %v, %v, want not found", tt.network, tt.name, got, err)
				}
			} else if err != nil || !slices.Equal(sorted(got), sorted(tt.want)) {
				t.Errorf("%s %q: %v, %v, want %v", tt.network, tt.name, got, err, tt.want)
			}
		}
	}
	if _, err := r.LookupNetIP(testContext(t), "tcp", "x"); err == nil {
		t.Error("network tcp accepted")
	}
	for a, want := range map[string]string{"192.0.2.9": "edge.example", "2001:db8::1": "six.example", "192.0.2.10": ""} {
		got, err := r.LookupAddr(testContext(t), netip.MustParseAddr(a))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("name of %v: %q, %v, want %q", a, got, err, want)
		}
	}
}

func TestLookupCache(t *testing.T) {
	clock := faketime.NewManualClock()
	p := newPair(t, func(c, _ *Config) { c.Clock = clock })
	d := p.serveDNS(t, 53, zone(dnsRecord{"a.example", "192.0.2.1", 60}, cname("b.example", "a.example"), dnsRecord{"zero.example", "192.0.2.1", 0},
		dnsRecord{"long.example", "192.0.2.1", 1 << 30}))
	r := p.client.Resolver([]netip.AddrPort{d.at})
	ask := func(name string, asked int32) {
		t.Helper()
		before := d.questions.Load()
		_, _ = r.LookupNetIP(testContext(t), "ip4", name)
		if n := d.questions.Load() - before; n != asked {
			t.Errorf("%s: %d questions, want %d", name, n, asked)
		}
	}
	for _, name := range []string{"a.example", "b.example", "none.example", "zero.example", "long.example"} {
		ask(name, 1)
		ask(name, 0)
	}
	clock.Advance(dnsMinTTL)
	ask("zero.example", 1)
	ask("a.example", 0)
	clock.Advance(dnsMaxNegTTL - dnsMinTTL)
	ask("none.example", 1)
	clock.Advance(30 * time.Second)
	ask("a.example", 1)
	ask("b.example", 1)
	ask("long.example", 0)
	clock.Advance(dnsMaxTTL)
	ask("long.example", 1)
	for i := range dnsCacheSize + 100 {
		r.mu.Lock()
		r.keepLocked(dnsKey{name: string(rune(i))}, answer{name: "x", ttl: time.Hour})
		r.mu.Unlock()
	}
	if n := len(r.cache); n != dnsCacheSize {
		t.Errorf("%d entries", n)
	}
	if p.client.Stats().DNSCacheHits == 0 || p.client.Stats().DNSQueries == 0 {
		t.Error("nothing counted")
	}
}

// Questions asked at the same time are asked once; one who gives up doesn't
// take the others with him.
func TestLookupShared(t *testing.T) {
	p := newPair(t)
	release := make(chan struct{})
	first := make(chan struct{}, 10)
	d := p.serveDNS(t, 53, func(q dnsmessage.Question, _, _ bool) *dnsReply {
		first <- struct{}{}
		<-release
		return &dnsReply{records: []dnsRecord{{"a.example", "192.0.2.1", 60}}}
	})
	r := p.client.Resolver([]netip.AddrPort{d.at})
	ctx, cancel := context.WithCancel(testContext(t))
	canceled := make(chan error, 1)
	go func() { _, err := r.LookupNetIP(ctx, "ip4", "a.example"); canceled <- err }()
	<-first
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			a, err := r.LookupNetIP(testContext(t), "ip4", "a.example")
			if err != nil || len(a) != 1 {
				t.Errorf("%v, %v", a, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	cancel()
	if err := <-canceled; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(release)
	wg.Wait()
	if n := d.questions.Load(); n != 2 {
		t.Errorf("%d questions, want 2", n)
	}
}

func TestLookupServers(t *testing.T) {
	p := newPair(t)
	good := p.serveDNS(t, 53, zone(dnsRecord{"a.example", "192.0.2.1", 60}))
	broken := p.serveDNS(t, 54, func(dnsmessage.Question, bool, bool) *dnsReply {
		return &dnsReply{rcode: dnsmessage.RCodeServerFailure}
	})
	silent := p.serveDNS(t, 55, func(dnsmessage.Question, bool, bool) *dnsReply { return nil })
	closed := netip.AddrPortFrom(server4, 56)

	r := p.client.Resolver([]netip.AddrPort{broken.at, good.at})
	if _, err := r.LookupNetIP(testContext(t), "ip4", "a.example"); err != nil {
		t.Error(err)
	}
	r = p.client.Resolver([]netip.AddrPort{broken.at})
	_, err := r.LookupNetIP(testContext(t), "ip4", "a.example")
	var e *net.DNSError
	if !errors.As(err, &e) || e.IsNotFound || !e.IsTemporary {
		t.Errorf("%v", err)
	}
	for _, at := range []netip.AddrPort{silent.at, closed} {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		_, err = p.client.Resolver([]netip.AddrPort{at}).LookupNetIP(ctx, "ip", "a.example")
		cancel()
		if !errors.As(err, &e) || !e.IsTimeout || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
	if _, err := p.client.Resolver(nil).LookupNetIP(testContext(t), "ip", "a.example"); !errors.As(err, &e) || e.IsNotFound {
		t.Errorf("%v", err)
	}
}

func TestLookupTruncatedAndEDNS(t *testing.T) {
	p := newPair(t)
	var many []dnsRecord
	for i := range 200 {
		many = append(many, dnsRecord{"many.example", netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}).String(), 60})
	}
	d := p.serveDNS(t, 53, func(q dnsmessage.Question, tcp, edns bool) *dnsReply {
		switch {
		case strings.HasPrefix(q.Name.String(), "old"):
			if edns {
				return &dnsReply{rcode: dnsmessage.RCodeFormatError}
			}
			return &dnsReply{records: []dnsRecord{{"old.example", "192.0.2.1", 60}}}
		case !tcp:
			return &dnsReply{truncated: true}
		}
		return &dnsReply{records: many}
	})
	r := p.client.Resolver([]netip.AddrPort{d.at})
	if a, err := r.LookupNetIP(testContext(t), "ip4", "many.example"); err != nil || len(a) != 200 {
		t.Errorf("%d addresses, %v", len(a), err)
	}
	if a, err := r.LookupNetIP(testContext(t), "ip4", "old.example"); err != nil || len(a) != 1 {
		t.Errorf("%d addresses, %v", len(a), err)
	}
}

// Messages that don't answer the question are as if they had not come.
func TestParseAnswerIgnores(t *testing.T) {
	n, _ := dnsName("a.example")
	other, _ := dnsName("b.example")
	q := dnsmessage.Question{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	good := dnsReply{question: q, id: 7, records: []dnsRecord{{"a.example", "192.0.2.1", 60}, {"b.example", "192.0.2.66", 60}}}
	a, ok, err := parseAnswer(good.bytes(t), 7, q)
	if !ok || err != nil || !slices.Equal(a.addrs, addrs("192.0.2.1")) || a.ttl != time.Minute {
		t.Fatalf("%+v, %v, %v", a, ok, err)
	}
	for name, spoil := range map[string]func(*dnsReply){
		"id":    func(r *dnsReply) { r.id++ },
		"name":  func(r *dnsReply) { r.question.Name = other },
		"type":  func(r *dnsReply) { r.question.Type = dnsmessage.TypeAAAA },
		"class": func(r *dnsReply) { r.question.Class = dnsmessage.ClassCHAOS },
	} {
		r := good
		spoil(&r)
		if a, ok, _ := parseAnswer(r.bytes(t), 7, q); ok {
			t.Errorf("wrong %s: taken as %+v", name, a)
		}
	}
	b := good.bytes(t)
	b[2] &^= 0x80 // a question, not an answer
	if _, ok, _ := parseAnswer(b, 7, q); ok {
		t.Error("a question was taken for an answer")
	}
	b = good.bytes(t)
	for n := range b {
		if a, ok, err := parseAnswer(b[:n], 7, q); ok && err == nil {
			t.Errorf("the first %d bytes of %d taken as %+v", n, len(b), a)
		}
	}
}

func TestDialer(t *testing.T) {
	p := newPair(t, withForward())
	dead4, dead6 := "192.0.2.99", "2001:db8::99" // silent
	d := p.serveDNS(t, 53, zone(
		dnsRecord{"both.example", world4.String(), 60}, dnsRecord{"both.example", world6.String(), 60},
		dnsRecord{"broken6.example", world4.String(), 60}, dnsRecord{"broken6.example", dead6, 60},
		dnsRecord{"dead.example", dead4, 60}, dnsRecord{"dead.example", dead6, 60},
		dnsRecord{"mixed.example", "192.0.2.98", 60}, dnsRecord{"mixed.example", "192.0.2.97", 60},
		dnsRecord{"mixed2.example", "192.0.2.97", 60}, dnsRecord{"mixed2.example", "192.0.2.98", 60},
	))
	p.server.ForwardTCP(100, func(r *TCPRequest) {
		switch a := r.Destination().Addr(); a {
		case world4, world6:
			c, err := r.Accept()
			if err != nil {
				return // the loser of a race
			}
			c.Close()
		case netip.MustParseAddr("192.0.2.98"):
			r.Reject(syscall.EHOSTUNREACH)
		case netip.MustParseAddr("192.0.2.97"):
			r.Reject(syscall.ECONNREFUSED)
		}
	})
	dialer := &Dialer{Stack: p.client, Resolver: p.client.Resolver([]netip.AddrPort{d.at})}
	dial := func(network, address string) (netip.Addr, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return netip.Addr{}, err
		}
		defer c.Close()
		return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(), nil
	}
	for _, tt := range []struct {
		network, address string
		want             netip.Addr
	}{
		{"tcp", "both.example:80", world6},
		{"tcp4", "both.example:80", world4},
		{"tcp", "broken6.example:80", world4},
		{"tcp", net.JoinHostPort(world6.String(), "80"), world6},
		{"tcp", net.JoinHostPort(world4.String(), "80"), world4},
	} {
		if got, err := dial(tt.network, tt.address); err != nil || got != tt.want {
			t.Errorf("%s %s: %v, %v, want %v", tt.network, tt.address, got, err, tt.want)
		}
	}
	if _, err := dial("tcp", "dead.example:80"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dead: %v", err)
	}
	for _, address := range []string{"mixed.example:80", "mixed2.example:80"} {
		_, err := dial("tcp", address)
		wantErrno(t, err, syscall.ECONNREFUSED)
	}
	var dns *net.DNSError
	if _, err := dial("tcp", "none.example:80"); !errors.As(err, &dns) || !dns.IsNotFound {
		t.Errorf("none: %v", err)
	}
	for _, bad := range []string{"both.example", "both.example:http", "both.example:65536", "both.example:-1"} {
		if _, err := dial("tcp", bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	if _, err := dial("udp", "both.example:80"); err == nil {
		t.Error("network udp accepted")
	}
	// Without an address of its own the stack doesn't ask for IPv6.
	if err := p.client.SetAddresses([]netip.Addr{client4}); err != nil {
		t.Fatal(err)
	}
	before := d.questions.Load()
	dialer.Resolver = p.client.Resolver([]netip.AddrPort{d.at})
	if got, err := dial("tcp", "both.example:80"); err != nil || got != world4 || d.questions.Load() != before+1 {
		t.Errorf("%v, %v, %d questions", got, err, d.questions.Load()-before)
	}
}

func TestInterleave(t *testing.T) {
	got := interleave(addrs("192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2"))
	if want := addrs("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "192.0.2.3"); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if n := len(interleave(slices.Repeat(addrs("192.0.2.1"), 100))); n != maxAttempts {
		t.Errorf("%d addresses", n)
	}
}

// A long answer comes over UDP, in fragments: TCP isn't tried.
func TestLookupLongAnswer(t *testing.T) {
	p := newPair(t)
	var records []dnsRecord
	for i := range 200 {
		records = append(records, dnsRecord{"long.example", netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}).String(), 60})
	}
	answer := zone(records...)
	d := p.serveDNS(t, 53, func(q dnsmessage.Question, tcp, edns bool) *dnsReply {
		if tcp {
			t.Error("asked over TCP")
		}
		return answer(q, tcp, edns)
	})
	got, err := p.client.Resolver([]netip.AddrPort{d.at}).LookupNetIP(testContext(t), "ip4", "long.example")
	if err != nil || len(got) != 200 {
		t.Errorf("%d addresses, %v", len(got), err)
	}
}
