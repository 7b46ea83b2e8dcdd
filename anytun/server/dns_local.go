package server

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"
)

// TTLs in seconds of answers made here, rather than upstream.
const (
	dnsHostsTTL  = 10 // the file may change
	dnsSystemTTL = 30
	dnsFixedTTL  = 3600
)

// Names with a meaning of their own, in wire form (RFC 6761, RFC 7686).
const (
	dnsNameLocalhost = "\x09localhost\x00"
	dnsNameInvalid   = "\x07invalid\x00"
	dnsNameOnion     = "\x05onion\x00"
	dnsNameInAddr    = "\x07in-addr\x04arpa\x00"
	dnsNameIP6       = "\x03ip6\x04arpa\x00"
)

// dnsUnder reports whether name is zone or below it.
func dnsUnder(name, zone string) bool {
	if !strings.HasSuffix(name, zone) {
		return false
	}
	// The match must begin where a label does.
	for len(name) > len(zone) {
		name = name[1+int(name[0]):]
	}
	return len(name) == len(zone)
}

// local answers what no upstream is to be asked: special names, the host's
// hosts file, and the addresses inside the tunnel. nil means none of these.
func (s *dnsService) local(q *dnsQuery) *dnsAnswer {
	now := s.now()
	b := dnsBuilder{q: q, now: now, ttl: dnsFixedTTL}
	name := q.key.name
	switch {
	case dnsUnder(name, dnsNameLocalhost):
		// RFC 6761 section 6.3: loopback, and nothing else.
		b.addr(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
		b.addr(netip.IPv6Loopback())
		return b.answer(dnsRcodeOK)
	case dnsUnder(name, dnsNameInvalid), dnsUnder(name, dnsNameOnion):
		return b.answer(dnsRcodeNXDomain)
	}
	hosts := s.hosts.get(now)
	if addrs := hosts.addrs[name]; len(addrs) > 0 {
		b.ttl = dnsHostsTTL
		for _, a := range addrs {
			b.addr(a)
		}
		return b.answer(dnsRcodeOK)
	}
	if !dnsUnder(name, dnsNameInAddr) && !dnsUnder(name, dnsNameIP6) {
		return nil
	}
	addr, ok := dnsReverse(name)
	if !ok {
		return nil
	}
	if host, ok := hosts.names[addr]; ok {
		b.ttl = dnsHostsTTL
		b.ptr(host)
		return b.answer(dnsRcodeOK)
	}
	switch {
	case addr.IsLoopback():
		b.ptr(dnsNameLocalhost)
		return b.answer(dnsRcodeOK)
	case s.inner(addr):
		// RFC 7793: nobody outside knows about 100.64.0.0/10, or should hear
		// that it was asked for.
		return b.answer(dnsRcodeNXDomain)
	}
	return nil
}

// inner reports whether a is an address inside the tunnel.
func (s *dnsService) inner(a netip.Addr) bool {
	if egressInner4.Contains(a) {
		return true
	}
	for _, in := range s.inner6 {
		if in.Contains(a) {
			return true
		}
	}
	return false
}

// dnsReverse returns the address that a whole name below in-addr.arpa or
// ip6.arpa stands for (RFC 1035 section 3.5, RFC 3596 section 2.5).
func dnsReverse(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, dnsNameInAddr); ok {
		var a [4]byte
		for i := 3; i >= 0; i-- {
			if rest == "" || int(rest[0]) > 3 || rest[0] == 0 || len(rest) < 1+int(rest[0]) {
				return netip.Addr{}, false
			}
			n := 0
			for _, c := range []byte(rest[1 : 1+int(rest[0])]) {
				if c < '0' || c > '9' {
					return netip.Addr{}, false
				}
				n = n*10 + int(c-'0')
			}
			if n > 255 || rest[0] > 1 && rest[1] == '0' {
				return netip.Addr{}, false
			}
			a[i] = byte(n)
			rest = rest[1+int(rest[0]):]
		}
		return netip.AddrFrom4(a), rest == ""
	}
	rest, ok := strings.CutSuffix(name, dnsNameIP6)
	if !ok || len(rest) != 64 {
		return netip.Addr{}, false
	}
	var a [16]byte
	for i := range 32 {
		n := strings.IndexByte("0123456789abcdef", rest[2*i+1])
		if rest[2*i] != 1 || n < 0 {
			return netip.Addr{}, false
		}
		a[15-i/2] |= byte(n << (4 * (i % 2)))
	}
	return netip.AddrFrom16(a), true
}

// dnsBuilder makes an answer of its own. Records that don't have the type that
// was asked for are left out.
type dnsBuilder struct {
	q       *dnsQuery
	now     time.Time
	ttl     uint32
	records []byte
	ttls    []uint16
	count   uint16
}

func (b *dnsBuilder) addr(a netip.Addr) {
	if a.Is4() {
		b.record(dnsTypeA, a.AsSlice())
	} else {
		b.record(dnsTypeAAAA, a.AsSlice())
	}
}

func (b *dnsBuilder) ptr(name string) { b.record(dnsTypePTR, []byte(name)) }

func (b *dnsBuilder) record(kind uint16, data []byte) {
	at := dnsHeaderLen + len(b.q.question) + len(b.records)
	if kind != b.q.key.kind || at > 60000 {
		return
	}
	b.count++
	b.ttls = append(b.ttls, uint16(at+6))
	b.records = append(b.records, 0xc0, dnsHeaderLen) // the question's name
	b.records = binary.BigEndian.AppendUint16(b.records, kind)
	b.records = binary.BigEndian.AppendUint16(b.records, dnsClassIN)
	b.records = binary.BigEndian.AppendUint32(b.records, b.ttl)
	b.records = binary.BigEndian.AppendUint16(b.records, uint16(len(data)))
	b.records = append(b.records, data...)
}

// answer returns the records under a header.
func (b *dnsBuilder) answer(rcode int) *dnsAnswer {
	bare := dnsQuery{question: b.q.question}
	msg := appendError(nil, &bare, rcode, dnsFlagRA)
	msg = append(msg, b.records...)
	binary.BigEndian.PutUint16(msg[6:], b.count)
	return &dnsAnswer{msg: msg, ttls: b.ttls, since: b.now}
}

// found returns the records, or what the error of a lookup means.
func (b *dnsBuilder) found(err error) (*dnsAnswer, error) {
	var de *net.DNSError
	switch {
	case err == nil || b.count > 0:
		return b.answer(dnsRcodeOK), nil
	case errors.As(err, &de) && de.IsNotFound:
		// The system doesn't tell an unknown name from one without such an
		// address; the milder of the two does no harm.
		return b.answer(dnsRcodeOK), nil
	}
	return nil, err
}
