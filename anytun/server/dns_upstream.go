package server

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/anytun-go/anytun/netstack/splice"
)

// A client's own resolver waits five seconds as a rule; it should hear of a
// failure before that.
const (
	dnsDeadline   = 4500 * time.Millisecond // of one question, all attempts together
	dnsTryTimeout = 1500 * time.Millisecond // of one attempt
	dnsRounds     = 3                       // attempts per upstream
)

var errDNSFailed = errors.New("no upstream resolver has answered")

// ask puts a question to the upstream resolvers, one after another, beginning
// with the one that answered last. What a resolver says about its own troubles
// is passed on only if no other knows better.
func (s *dnsService) ask(ctx context.Context, q *dnsQuery) (*dnsAnswer, error) {
	ups := s.upstreams()
	if len(ups) == 0 {
		return s.askSystem(ctx, q)
	}
	ctx, cancel := context.WithTimeout(ctx, dnsDeadline)
	defer cancel()
	first := int(s.preferred.Load())
	var poor *dnsAnswer
	for i := range dnsRounds * len(ups) {
		if ctx.Err() != nil {
			break
		}
		n := (first + i) % len(ups)
		a, err := s.try(ctx, ups[n], q)
		if err != nil {
			s.count.upstreamFailed.Add(1)
			continue
		}
		switch a.rcode() {
		case dnsRcodeServFail, dnsRcodeRefused, dnsRcodeNotImp, dnsRcodeFormErr:
			poor = a
			if i >= len(ups)-1 {
				return poor, nil // asked everybody
			}
			continue
		}
		s.preferred.Store(uint32(n))
		return a, nil
	}
	if poor != nil {
		return poor, nil
	}
	return nil, errDNSFailed
}

// try asks one upstream, over UDP and, when the answer does not fit, over TCP.
func (s *dnsService) try(ctx context.Context, up netip.AddrPort, q *dnsQuery) (*dnsAnswer, error) {
	a, err := s.exchange(ctx, "udp", up, q, true)
	if err == nil && (a.rcode() == dnsRcodeFormErr || a.rcode() == dnsRcodeNotImp) {
		// Perhaps a server from before EDNS (RFC 6891 section 6.2.2).
		a, err = s.exchange(ctx, "udp", up, q, false)
	}
	if err == nil && a.flags()&dnsFlagTC != 0 {
		s.count.upstreamTCP.Add(1)
		if full, tcpErr := s.exchange(ctx, "tcp", up, q, true); tcpErr == nil {
			return full, nil
		}
		// What fits is better than nothing; the client sees TC.
	}
	return a, err
}

// exchange sends one query and waits for its answer. Every query has a socket,
// and so a port, of its own and a random id: an off-path forger has to guess
// both (RFC 5452), and the socket is connected, so the kernel checks the source.
func (s *dnsService) exchange(ctx context.Context, network string, up netip.AddrPort, q *dnsQuery, edns bool) (*dnsAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsTryTimeout)
	defer cancel()
	s.count.upstreamQueries.Add(1)
	var d net.Dialer
	c, err := d.DialContext(ctx, network, up.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(t); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	var idBytes [2]byte
	rand.Read(idBytes[:]) // never fails
	id := binary.BigEndian.Uint16(idBytes[:])
	buf := splice.Get()
	defer splice.Put(buf)
	stream := network == "tcp"
	msg := buf[:0]
	if stream {
		msg = append(msg, 0, 0)
	}
	msg = appendQuestion(msg, id, &q.key, q.question, edns)
	if stream {
		binary.BigEndian.PutUint16(msg, uint16(len(msg)-2))
	}
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	for {
		got, err := readDNS(c, buf, stream)
		if err != nil {
			return nil, err
		}
		a, ok := dnsParseAnswer(append([]byte(nil), got...), id, &q.key, s.now())
		if ok {
			return a, nil
		}
		s.count.upstreamInvalid.Add(1)
		if stream {
			return nil, errors.New("invalid answer")
		}
		// Over UDP somebody else's forgery must not spoil the real answer.
	}
}

// readDNS reads one message into buf.
func readDNS(c net.Conn, buf *splice.Buffer, stream bool) ([]byte, error) {
	if !stream {
		n, err := c.Read(buf[:])
		return buf[:n], err
	}
	if _, err := io.ReadFull(c, buf[:2]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(buf[:]))
	_, err := io.ReadFull(c, buf[:n])
	return buf[:n], err
}

// upstreams returns the resolvers to ask: the configured ones, or the host's.
func (s *dnsService) upstreams() []netip.AddrPort {
	if len(s.cfg.Upstreams) > 0 {
		return s.cfg.Upstreams
	}
	return *s.resolvConf.get(s.now())
}

// askSystem answers from the system's resolver functions, where the resolvers'
// addresses are not to be had (Windows): addresses and names of addresses.
func (s *dnsService) askSystem(ctx context.Context, q *dnsQuery) (*dnsAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsDeadline)
	defer cancel()
	b := dnsBuilder{q: q, now: s.now(), ttl: dnsSystemTTL}
	if q.key.kind == dnsTypePTR {
		addr, ok := dnsReverse(q.key.name)
		if !ok {
			return b.answer(dnsRcodeNXDomain), nil
		}
		names, err := s.system.LookupAddr(ctx, addr.String())
		for _, name := range names {
			if wire, ok := dnsWireName(name); ok {
				b.ptr(wire)
			}
		}
		return b.found(err)
	}
	network := ""
	switch q.key.kind {
	case dnsTypeA:
		network = "ip4"
	case dnsTypeAAAA:
		network = "ip6"
	default:
		return b.answer(dnsRcodeNotImp), nil
	}
	name, ok := dnsTextName(q.key.name)
	if !ok {
		return b.answer(dnsRcodeNXDomain), nil
	}
	addrs, err := s.system.LookupNetIP(ctx, network, name+".")
	for _, a := range addrs {
		b.addr(a.Unmap().WithZone(""))
	}
	return b.found(err)
}
