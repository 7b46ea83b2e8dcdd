package netstack

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The bytes of DNS: questions out, answers in. No I/O and no clock.

const (
	// dnsUDPSize is what we take in one datagram, in bytes, told to servers by
	// EDNS(0). RFC 9715 section 3.1 wants less, so that nothing is fragmented on
	// the Internet. But an answer comes from the tunnel's server, and inner
	// fragments cost nothing, while a question repeated over TCP breaks when its
	// packets reach different servers.
	dnsUDPSize = 4096

	maxCNAMEs     = 16
	maxDNSRecords = 256
)

var errBadAnswer = errors.New("malformed answer")

// answer is what a server says to one question.
type answer struct {
	rcode     dnsmessage.RCode
	truncated bool
	addrs     []netip.Addr // of A and AAAA
	name      string       // of PTR, without the final dot
	ttl       time.Duration
}

// found reports whether there is a record of the type asked for.
func (a *answer) found() bool { return len(a.addrs) > 0 || a.name != "" }

// dnsName makes a name of what a user gave, taking it as fully qualified.
func dnsName(s string) (dnsmessage.Name, bool) {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return dnsmessage.Name{}, false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return dnsmessage.Name{}, false
		}
	}
	n, err := dnsmessage.NewName(s + ".")
	return n, err == nil
}

// reverseName is the name whose PTR record names addr (RFC 1035 section 3.5,
// RFC 3596 section 2.5).
func reverseName(addr netip.Addr) string {
	const hex = "0123456789abcdef"
	var b strings.Builder
	if addr.Is4() {
		a := addr.As4()
		for _, x := range []byte{a[3], a[2], a[1], a[0]} {
			b.WriteString(strconv.Itoa(int(x)))
			b.WriteByte('.')
		}
		return b.String() + "in-addr.arpa."
	}
	a := addr.As16()
	for i := 15; i >= 0; i-- {
		b.Write([]byte{hex[a[i]&15], '.', hex[a[i]>>4], '.'})
	}
	return b.String() + "ip6.arpa."
}

// appendQuestion appends a query, with EDNS(0) if wanted.
func appendQuestion(b []byte, id uint16, q dnsmessage.Question, edns bool) ([]byte, error) {
	m := dnsmessage.NewBuilder(b, dnsmessage.Header{ID: id, RecursionDesired: true})
	m.EnableCompression()
	if err := m.StartQuestions(); err != nil {
		return nil, err
	}
	if err := m.Question(q); err != nil {
		return nil, err
	}
	if edns {
		if err := m.StartAdditionals(); err != nil {
			return nil, err
		}
		var h dnsmessage.ResourceHeader
		if err := h.SetEDNS0(dnsUDPSize, dnsmessage.RCodeSuccess, false); err != nil {
			return nil, err
		}
		if err := m.OPTResource(h, dnsmessage.OPTResource{}); err != nil {
			return nil, err
		}
	}
	return m.Finish()
}

// parseAnswer reads the message b as the answer to the query with this id and
// question. ok is false when it isn't one, and somebody else's message or a
// forgery is to be ignored; err tells of an answer that makes no sense.
func parseAnswer(b []byte, id uint16, q dnsmessage.Question) (a answer, ok bool, err error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.ID != id || !h.Response {
		return a, false, nil
	}
	// RFC 5452 section 9.1: the question must come back.
	got, err := p.Question()
	if err != nil || got.Type != q.Type || got.Class != q.Class || !sameName(got.Name, q.Name) {
		return a, false, nil
	}
	if _, err := p.Question(); !errors.Is(err, dnsmessage.ErrSectionDone) {
		return a, false, nil
	}
	a.rcode, a.truncated = h.RCode, h.Truncated
	if h.Truncated {
		return a, true, nil
	}
	records, err := readRecords(&p)
	if err != nil {
		return a, true, errBadAnswer
	}
	follow(&a, records, q)
	if !a.found() {
		a.ttl = negativeTTL(&p)
	}
	return a, true, nil
}

// record is a resource record of a kind that we use.
type record struct {
	name   dnsmessage.Name
	typ    dnsmessage.Type
	ttl    uint32
	addr   netip.Addr
	target dnsmessage.Name
}

// readRecords reads the answer section.
func readRecords(p *dnsmessage.Parser) ([]record, error) {
	var out []record
	for range maxDNSRecords {
		h, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		r := record{name: h.Name, typ: h.Type, ttl: h.TTL}
		switch {
		case h.Class != dnsmessage.ClassINET:
			err = p.SkipAnswer()
			r.typ = 0
		case h.Type == dnsmessage.TypeA:
			var x dnsmessage.AResource
			x, err = p.AResource()
			r.addr = netip.AddrFrom4(x.A)
		case h.Type == dnsmessage.TypeAAAA:
			var x dnsmessage.AAAAResource
			x, err = p.AAAAResource()
			r.addr = netip.AddrFrom16(x.AAAA)
		case h.Type == dnsmessage.TypeCNAME:
			var x dnsmessage.CNAMEResource
			x, err = p.CNAMEResource()
			r.target = x.CNAME
		case h.Type == dnsmessage.TypePTR:
			var x dnsmessage.PTRResource
			x, err = p.PTRResource()
			r.target = x.PTR
		default:
			err = p.SkipAnswer()
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, p.SkipAllAnswers()
}

// follow walks from the question's name along the aliases and takes the
// records found at the end. Records of other names are none of our business.
func follow(a *answer, records []record, q dnsmessage.Question) {
	name, ttl := q.Name, ^uint32(0)
	for range maxCNAMEs {
		for _, r := range records {
			if r.typ != q.Type || !sameName(r.name, name) {
				continue
			}
			ttl = min(ttl, r.ttl)
			if r.addr.IsValid() {
				a.addrs = append(a.addrs, r.addr)
			} else if a.name == "" {
				a.name = strings.TrimSuffix(r.target.String(), ".")
			}
		}
		if a.found() {
			break
		}
		next := false
		for _, r := range records {
			if r.typ == dnsmessage.TypeCNAME && sameName(r.name, name) {
				name, ttl, next = r.target, min(ttl, r.ttl), true
				break
			}
		}
		if !next {
			return
		}
	}
	a.ttl = time.Duration(ttl) * time.Second
}

// negativeTTL is how long the absence of an answer holds: RFC 2308 section 5.
// Without the zone's SOA record it is not to be kept.
func negativeTTL(p *dnsmessage.Parser) time.Duration {
	if p.SkipAllAnswers() != nil {
		return 0
	}
	for range maxDNSRecords {
		h, err := p.AuthorityHeader()
		if err != nil {
			return 0
		}
		if h.Type != dnsmessage.TypeSOA {
			if p.SkipAuthority() != nil {
				return 0
			}
			continue
		}
		soa, err := p.SOAResource()
		if err != nil {
			return 0
		}
		return time.Duration(min(h.TTL, soa.MinTTL)) * time.Second
	}
	return 0
}

// sameName compares without regard to the case of ASCII letters (RFC 4343).
func sameName(a, b dnsmessage.Name) bool {
	if a.Length != b.Length {
		return false
	}
	for i := range a.Length {
		if lower(a.Data[i]) != lower(b.Data[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}
