package server

import (
	"encoding/binary"
	"time"
)

// The DNS service hands messages on as bytes and looks only at what it needs:
// the header, the question, and where the records begin and end. Offsets and
// numbers are of RFC 1035 section 4 unless another RFC is named.
const (
	dnsHeaderLen = 12
	dnsMaxName   = 255
	dnsMaxLabel  = 63
	dnsOPTLen    = 11 // root name, type, class, TTL, length; without options

	dnsUDPMin     = 512  // section 4.2.1
	dnsUDPMax     = 4096 // largest answer over UDP whatever the client offers
	dnsUDPOffered = 1232 // what the service offers upstream: no fragments on any usual path

	dnsFlagQR = 1 << 15
	dnsFlagAA = 1 << 10
	dnsFlagTC = 1 << 9
	dnsFlagRD = 1 << 8
	dnsFlagRA = 1 << 7
	dnsFlagAD = 1 << 5
	dnsFlagCD = 1 << 4

	dnsRcodeOK       = 0
	dnsRcodeFormErr  = 1
	dnsRcodeServFail = 2
	dnsRcodeNXDomain = 3
	dnsRcodeNotImp   = 4
	dnsRcodeRefused  = 5
	dnsRcodeBadVers  = 16 // RFC 6891 section 9; its upper bits are in the OPT record

	dnsTypeA    = 1
	dnsTypeSOA  = 6
	dnsTypePTR  = 12
	dnsTypeAAAA = 28
	dnsTypeOPT  = 41
	dnsTypeIXFR = 251
	dnsTypeAXFR = 252
	dnsTypeANY  = 255

	dnsClassIN = 1
)

// dnsKey is what an answer depends on.
type dnsKey struct {
	name        string // wire form, lower case
	kind, class uint16
	rd, do, cd  bool
}

// dnsQuery is a client's message as far as the service understands it.
type dnsQuery struct {
	key      dnsKey
	id       uint16
	opcode   uint16
	ad       bool
	edns     bool
	size     int    // what the client takes over UDP
	question []byte // as the client wrote it; copied from the message
}

// dnsParseQuery takes a message apart. It returns false for what must not be
// answered: a response, or too little to hold a header. Otherwise rcode says
// whether q can be asked for; if not, q holds what an error answer needs.
func dnsParseQuery(msg []byte) (q dnsQuery, rcode int, ok bool) {
	if len(msg) < dnsHeaderLen {
		return q, 0, false
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&dnsFlagQR != 0 {
		return q, 0, false
	}
	q.id = binary.BigEndian.Uint16(msg)
	q.opcode = flags >> 11 & 15
	q.key.rd = flags&dnsFlagRD != 0
	q.key.cd = flags&dnsFlagCD != 0
	q.ad = flags&dnsFlagAD != 0
	q.size = dnsUDPMin
	if q.opcode != 0 {
		return q, dnsRcodeNotImp, true
	}
	if binary.BigEndian.Uint16(msg[4:]) != 1 {
		return q, dnsRcodeFormErr, true
	}
	name, at, ok := dnsPlainName(msg, dnsHeaderLen)
	if !ok || at+4 > len(msg) {
		return q, dnsRcodeFormErr, true
	}
	q.key.name = name
	q.key.kind = binary.BigEndian.Uint16(msg[at:])
	q.key.class = binary.BigEndian.Uint16(msg[at+2:])
	q.question = append([]byte(nil), msg[dnsHeaderLen:at+4]...)
	rcode = dnsRcodeOK
	opts := 0
	whole := dnsWalk(msg, func(r *dnsRecord) {
		if r.kind != dnsTypeOPT {
			return
		}
		opts++
		q.edns = true
		q.key.do = r.ttl>>15&1 != 0 // RFC 3225
		q.size = min(max(int(r.class), dnsUDPMin), dnsUDPMax)
		if r.section != 2 || msg[r.at] != 0 {
			opts = 2
		} else if r.ttl>>16&0xff != 0 {
			rcode = dnsRcodeBadVers
		}
	})
	switch {
	case !whole || opts > 1 || binary.BigEndian.Uint16(msg[6:]) != 0:
		return q, dnsRcodeFormErr, true
	case rcode != dnsRcodeOK:
	case q.key.kind == dnsTypeAXFR || q.key.kind == dnsTypeIXFR || q.key.class != dnsClassIN:
		rcode = dnsRcodeRefused
	case q.key.kind == dnsTypeOPT || q.key.kind > dnsTypeIXFR && q.key.kind <= dnsTypeANY || q.key.kind == 0:
		// ANY among them: an amplifier, and nobody needs it (RFC 8482).
		rcode = dnsRcodeNotImp
	}
	return q, rcode, true
}

// dnsPlainName reads a name without compression and returns it in lower case
// and in wire form, with the offset behind it.
func dnsPlainName(msg []byte, at int) (string, int, bool) {
	var buf [dnsMaxName]byte
	n := 0
	for {
		if at >= len(msg) {
			return "", 0, false
		}
		l := int(msg[at])
		if l > dnsMaxLabel || n+1+l > dnsMaxName || at+1+l > len(msg) {
			return "", 0, false
		}
		buf[n] = byte(l)
		for i, c := range msg[at+1 : at+1+l] {
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			buf[n+1+i] = c
		}
		n += 1 + l
		at += 1 + l
		if l == 0 {
			return string(buf[:n]), at, true
		}
	}
}

// dnsSkipName returns the offset behind a name, which may be compressed.
func dnsSkipName(msg []byte, at int) (int, bool) {
	for n := 0; n <= dnsMaxName; n++ {
		if at >= len(msg) {
			return 0, false
		}
		switch l := int(msg[at]); {
		case l == 0:
			return at + 1, true
		case l&0xc0 == 0xc0:
			return at + 2, at+2 <= len(msg)
		case l > dnsMaxLabel:
			return 0, false
		default:
			at += 1 + l
		}
	}
	return 0, false
}

// dnsRecord is where a resource record lies.
type dnsRecord struct {
	section     int // 0 answer, 1 authority, 2 additional
	index       int // within the section
	at          int // offset of its name
	kind, class uint16
	ttl         uint32
	ttlAt       int
	data        []byte
}

// dnsWalk visits the records behind the questions and reports whether the
// message is whole: every record complete and nothing behind the last.
func dnsWalk(msg []byte, visit func(*dnsRecord)) bool {
	if len(msg) < dnsHeaderLen {
		return false
	}
	at := dnsHeaderLen
	var ok bool
	for range binary.BigEndian.Uint16(msg[4:]) {
		if at, ok = dnsSkipName(msg, at); !ok || at+4 > len(msg) {
			return false
		}
		at += 4
	}
	var r dnsRecord
	for r.section = range 3 {
		for r.index = range int(binary.BigEndian.Uint16(msg[6+2*r.section:])) {
			r.at = at
			if at, ok = dnsSkipName(msg, at); !ok || at+10 > len(msg) {
				return false
			}
			r.kind = binary.BigEndian.Uint16(msg[at:])
			r.class = binary.BigEndian.Uint16(msg[at+2:])
			r.ttl = binary.BigEndian.Uint32(msg[at+4:])
			r.ttlAt = at + 4
			n := int(binary.BigEndian.Uint16(msg[at+8:]))
			at += 10
			if at+n > len(msg) {
				return false
			}
			r.data = msg[at : at+n]
			at += n
			visit(&r)
		}
	}
	return at == len(msg)
}

// dnsAnswer is a response without the parts that belong to one query: the id
// is zero and there is no OPT record.
type dnsAnswer struct {
	msg   []byte
	ttls  []uint16 // offsets of the TTL fields
	since time.Time
	ttl   time.Duration // how long it may be kept; zero: not at all
}

func (a *dnsAnswer) flags() uint16 { return binary.BigEndian.Uint16(a.msg[2:]) }
func (a *dnsAnswer) rcode() int    { return int(a.flags() & 15) }

// dnsParseAnswer checks a response to a query that was sent with id, and takes
// it apart. msg is kept, and changed.
func dnsParseAnswer(msg []byte, id uint16, key *dnsKey, now time.Time) (a *dnsAnswer, ok bool) {
	if len(msg) < dnsHeaderLen || len(msg) > 65535 {
		return nil, false
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if binary.BigEndian.Uint16(msg) != id || flags&dnsFlagQR == 0 || flags>>11&15 != 0 {
		return nil, false
	}
	switch binary.BigEndian.Uint16(msg[4:]) {
	case 1:
		name, at, ok := dnsPlainName(msg, dnsHeaderLen)
		if !ok || at+4 > len(msg) || name != key.name ||
			binary.BigEndian.Uint16(msg[at:]) != key.kind || binary.BigEndian.Uint16(msg[at+2:]) != key.class {
			return nil, false
		}
	case 0:
		// Servers that don't understand a query may leave the question out.
		if rcode := flags & 15; rcode != dnsRcodeFormErr && rcode != dnsRcodeNotImp && rcode != dnsRcodeRefused && rcode != dnsRcodeServFail {
			return nil, false
		}
	default:
		return nil, false
	}
	a = &dnsAnswer{msg: msg, since: now}
	cut, extended := -1, false
	cutCount := 0
	answered := false
	var positive, negative ttlMin
	whole := dnsWalk(msg, func(r *dnsRecord) {
		if cut >= 0 {
			return
		}
		if r.kind == dnsTypeOPT && r.section == 2 {
			// Records behind it could only be reached by names that nothing
			// before it points to, so the message ends here.
			cut, cutCount = r.at, r.index
			extended = r.ttl>>24 != 0
			return
		}
		a.ttls = append(a.ttls, uint16(r.ttlAt))
		ttl := r.ttl
		if ttl>>31 != 0 {
			ttl = 0 // RFC 2181 section 8
		}
		switch {
		case r.section == 0:
			positive.add(ttl)
			answered = answered || r.kind == key.kind
		case r.section == 1 && r.kind == dnsTypeSOA && len(r.data) >= 20:
			// RFC 2308 section 5: the lesser of the record's TTL and MINIMUM.
			negative.add(ttl)
			negative.add(binary.BigEndian.Uint32(r.data[len(r.data)-4:]))
		}
	})
	if !whole || extended {
		return nil, false
	}
	if cut >= 0 {
		a.msg = msg[:cut:cut]
		binary.BigEndian.PutUint16(a.msg[10:], uint16(cutCount))
	}
	binary.BigEndian.PutUint16(a.msg, 0)
	a.ttl = dnsLifetime(int(flags&15), flags&dnsFlagTC != 0, answered, positive, negative)
	return a, true
}

// ttlMin is the least of some TTLs.
type ttlMin struct {
	any bool
	ttl uint32
}

func (m *ttlMin) add(ttl uint32) {
	if !m.any || ttl < m.ttl {
		m.any, m.ttl = true, ttl
	}
}

// Bounds of what is kept. A name that changes every second is asked for every
// five; nothing is believed longer than an hour, a denial a quarter of it.
const (
	dnsMinTTL      = 5 * time.Second
	dnsMaxTTL      = time.Hour
	dnsMaxNegative = 15 * time.Minute
)

// dnsLifetime says how long an answer may be kept. Only answers and denials
// are; a denial must show its SOA record (RFC 2308 section 5).
func dnsLifetime(rcode int, truncated, answered bool, positive, negative ttlMin) time.Duration {
	if truncated || rcode != dnsRcodeOK && rcode != dnsRcodeNXDomain {
		return 0
	}
	limit := dnsMaxTTL
	if !answered || rcode == dnsRcodeNXDomain {
		if !negative.any {
			return 0
		}
		positive.add(negative.ttl) // a chain of aliases to nothing has both
		limit = dnsMaxNegative
	}
	if !positive.any || positive.ttl == 0 {
		return 0
	}
	return min(max(time.Duration(positive.ttl)*time.Second, dnsMinTTL), limit)
}

// appendAnswer appends the response to q: what a says, with TTLs as of now, the
// question as the client wrote it, an OPT record if it sent one, and nothing
// but the header and the question when that exceeds limit bytes.
func appendAnswer(b []byte, q *dnsQuery, a *dnsAnswer, now time.Time, limit int) []byte {
	start := len(b)
	b = append(b, a.msg...)
	m := b[start:]
	flags := a.flags()&^(dnsFlagRD|dnsFlagCD) | dnsFlagQR
	if !q.ad && !q.key.do {
		flags &^= dnsFlagAD // RFC 6840 section 5.8
	}
	binary.BigEndian.PutUint16(m[2:], flags|q.flags())
	binary.BigEndian.PutUint16(m, q.id)
	if binary.BigEndian.Uint16(m[4:]) == 1 {
		copy(m[dnsHeaderLen:], q.question) // the same name, so the same length
	}
	age := uint32(max(now.Sub(a.since), 0) / time.Second)
	for _, at := range a.ttls {
		ttl := binary.BigEndian.Uint32(m[at:])
		binary.BigEndian.PutUint32(m[at:], ttl-min(ttl, age))
	}
	opt := 0
	if q.edns {
		opt = dnsOPTLen
	}
	if len(m)+opt > limit {
		return appendError(b[:start], q, a.rcode(), flags&(dnsFlagRA|dnsFlagAA|dnsFlagAD)|dnsFlagTC)
	}
	if q.edns {
		binary.BigEndian.PutUint16(m[10:], binary.BigEndian.Uint16(m[10:])+1)
		b = appendOPT(b, q, 0)
	}
	return b
}

// flags are the header bits that a response repeats from its query.
func (q *dnsQuery) flags() uint16 {
	var f uint16
	if q.key.rd {
		f |= dnsFlagRD
	}
	if q.key.cd {
		f |= dnsFlagCD
	}
	return f
}

// appendError appends a response to q without records.
func appendError(b []byte, q *dnsQuery, rcode int, flags uint16) []byte {
	flags |= dnsFlagQR | q.flags() | q.opcode<<11 | uint16(rcode&15)
	b = binary.BigEndian.AppendUint16(b, q.id)
	b = binary.BigEndian.AppendUint16(b, flags)
	var questions, additional uint16
	if len(q.question) > 0 {
		questions = 1
	}
	if q.edns {
		additional = 1
	}
	for _, n := range [...]uint16{questions, 0, 0, additional} {
		b = binary.BigEndian.AppendUint16(b, n)
	}
	b = append(b, q.question...)
	if q.edns {
		b = appendOPT(b, q, rcode)
	}
	return b
}

// appendOPT appends the service's OPT record (RFC 6891 section 6.1).
func appendOPT(b []byte, q *dnsQuery, rcode int) []byte {
	b = append(b, 0)
	b = binary.BigEndian.AppendUint16(b, dnsTypeOPT)
	b = binary.BigEndian.AppendUint16(b, dnsUDPMax)
	ttl := uint32(rcode>>4) << 24
	if q.key.do {
		ttl |= 1 << 15
	}
	b = binary.BigEndian.AppendUint32(b, ttl)
	return binary.BigEndian.AppendUint16(b, 0)
}

// appendQuestion appends the message that asks an upstream for key. It is made
// anew, not the client's: options meant for this service stay here.
func appendQuestion(b []byte, id uint16, key *dnsKey, question []byte, edns bool) []byte {
	q := dnsQuery{key: *key, id: id, edns: edns, question: question}
	start := len(b)
	b = appendError(b, &q, 0, dnsFlagAD)
	b[start+2] &^= dnsFlagQR >> 8
	if edns {
		binary.BigEndian.PutUint16(b[len(b)-dnsOPTLen+3:], dnsUDPOffered)
	}
	return b
}
