package server

import (
	"context"
	"encoding/binary"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// TestDNSFailover has one upstream that is dead, one in trouble, and one that
// works; then none.
func TestDNSFailover(t *testing.T) {
	var code atomic.Int32
	code.Store(int32(dnsmessage.RCodeServerFailure))
	troubled := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, _ bool) []byte {
		return s.reply(q, func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCode(code.Load()) })
	})
	good := newDNSServer(t, answerA)
	h, dead := egressListenUDP(t, "127.0.0.1:0")
	h.Close()
	t.Run("one works", func(t *testing.T) {
		r := newEgressRig(t, withDNS(dead, troubled.at, good.at))
		if m := r.ask(question(t, "one.example.", dnsmessage.TypeA)); addrsOf(m) != "192.0.2.1" {
			t.Errorf("answer %s", m.GoString())
		}
		before := troubled.asked.Load()
		if m := r.ask(question(t, "two.example.", dnsmessage.TypeA)); addrsOf(m) != "192.0.2.1" {
			t.Errorf("answer %s", m.GoString())
		}
		if n := troubled.asked.Load(); n != before {
			t.Error("the upstream that answered last is not the first to be asked")
		}
	})
	t.Run("none answers", func(t *testing.T) {
		r := newEgressRig(t, withDNS(dead))
		if m := r.ask(question(t, "one.example.", dnsmessage.TypeA)); m.RCode != dnsmessage.RCodeServerFailure || !m.RecursionAvailable {
			t.Errorf("answer %s", m.GoString())
		}
		if st := r.e.Stats().DNS; st.ServFail != 1 || st.UpstreamFailed != dnsRounds {
			t.Errorf("stats: %+v", st)
		}
	})
	t.Run("all refuse", func(t *testing.T) {
		code.Store(int32(dnsmessage.RCodeRefused))
		r := newEgressRig(t, withDNS(troubled.at))
		if m := r.ask(question(t, "one.example.", dnsmessage.TypeA)); m.RCode != dnsmessage.RCodeRefused {
			t.Errorf("answer %s", m.GoString())
		}
	})
}

// TestDNSForgery has the upstream's socket send what is not the answer before
// it sends the answer.
func TestDNSForgery(t *testing.T) {
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, _ bool) []byte {
		evil := func(f func(m *dnsmessage.Message)) {
			b := s.reply(q, func(m *dnsmessage.Message) {
				m.Answers = []dnsmessage.Resource{dnsA(q, 300, 6, 6, 6, 6)}
				f(m)
			})
			if _, err := s.udp.WriteToUDPAddrPort(b, s.last); err != nil {
				s.t.Error(err)
			}
		}
		evil(func(m *dnsmessage.Message) { m.ID++ })
		evil(func(m *dnsmessage.Message) { m.Response = false })
		evil(func(m *dnsmessage.Message) { m.OpCode = 5 })
		evil(func(m *dnsmessage.Message) { m.Questions = nil })
		evil(func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions...) })
		evil(func(m *dnsmessage.Message) { m.Questions[0].Name = dnsmessage.MustNewName("other.example.") })
		evil(func(m *dnsmessage.Message) { m.Questions[0].Type = dnsmessage.TypeAAAA })
		b := s.reply(q, func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{dnsA(q, 300, 6, 6, 6, 6)} })
		for _, bad := range [][]byte{b[:len(b)-1], b[:5], {}, append(slices.Clone(b), 0)} {
			if _, err := s.udp.WriteToUDPAddrPort(bad, s.last); err != nil {
				s.t.Error(err)
			}
		}
		return answerA(s, q, false)
	})
	r := newEgressRig(t, withDNS(up.at))
	if m := r.ask(question(t, "bank.example.", dnsmessage.TypeA)); addrsOf(m) != "192.0.2.1" {
		t.Errorf("answer %s", m.GoString())
	}
	if n := r.e.Stats().DNS.UpstreamInvalid; n != 11 {
		t.Errorf("%d answers seen through, want 11", n)
	}
}

// TestDNSWithoutEDNS has an upstream that doesn't know EDNS (RFC 6891 section
// 6.2.2).
func TestDNSWithoutEDNS(t *testing.T) {
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		if len(q.Additionals) > 0 {
			b := make([]byte, 12)
			binary.BigEndian.PutUint16(b, q.ID)
			b[2], b[3] = 0x80, byte(dnsmessage.RCodeFormatError)
			return b
		}
		return answerA(s, q, tcp)
	})
	r := newEgressRig(t, withDNS(up.at))
	if m := r.ask(question(t, "a.example.", dnsmessage.TypeA, withEDNS(1232, false))); addrsOf(m) != "192.0.2.1" || len(m.Additionals) != 1 {
		t.Errorf("answer %s", m.GoString())
	}
}

// TestDNSSystem asks by the system's resolver functions, here Go's own.
func TestDNSSystem(t *testing.T) {
	up := newDNSServer(t, func(s *dnsServer, q dnsmessage.Message, tcp bool) []byte {
		switch q.Questions[0].Type {
		case dnsmessage.TypePTR:
			return s.reply(q, func(m *dnsmessage.Message) {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET, TTL: 1},
					Body:   &dnsmessage.PTRResource{PTR: dnsmessage.MustNewName("Host.example.")},
				}}
			})
		case dnsmessage.TypeA:
			if q.Questions[0].Name.String() == "a.example." {
				return answerA(s, q, tcp)
			}
		}
		return s.reply(q, func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError })
	})
	r := newEgressRig(t)
	r.e.dns.system = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, up.at.String())
	}}
	for _, c := range []struct {
		name  string
		kind  dnsmessage.Type
		rcode dnsmessage.RCode
		want  string
	}{
		{"a.example.", dnsmessage.TypeA, 0, "192.0.2.1"},
		{"a.example.", dnsmessage.TypeAAAA, 0, ""},
		{"b.example.", dnsmessage.TypeA, 0, ""},
		{"5.2.0.192.in-addr.arpa.", dnsmessage.TypePTR, 0, "host.example."},
		{"a.example.", dnsmessage.TypePTR, dnsmessage.RCodeNameError, ""},
		{"a.example.", dnsmessage.TypeMX, dnsmessage.RCodeNotImplemented, ""},
		{".", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
	} {
		m := r.ask(question(t, c.name, c.kind))
		if m.RCode != c.rcode || addrsOf(m) != c.want {
			t.Errorf("%s %v: %s", c.name, c.kind, m.GoString())
		}
	}
}
