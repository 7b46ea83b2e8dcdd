package netstack

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	dnsTry    = 2 * time.Second // for one question to one server
	dnsRounds = 3               // through all servers

	// Once one family has answered, the other has this long: RFC 8305
	// section 3 gives 50 ms, but there the late answer is still used.
	dnsOtherFamily = 250 * time.Millisecond

	// Bounds of the cache: a TTL of zero would ask again for each connection
	// of a page, a long one outlive a change of servers.
	dnsMinTTL    = 2 * time.Second
	dnsMaxTTL    = 10 * time.Minute
	dnsMaxNegTTL = 30 * time.Second
	dnsCacheSize = 1024 // names and types; beyond, expired and then any are dropped
)

var errNoHost = errors.New("no such host") // as package net words it

// Resolver asks DNS servers through the tunnel. It never consults the host's
// resolver, hosts file or search list: every name is taken as fully qualified,
// and localhost is the far end's. Answers are kept for their TTL in a small
// cache. A Resolver is safe for concurrent use.
type Resolver struct {
	s       *Stack
	servers []netip.AddrPort

	mu    sync.Mutex
	cache map[dnsKey]dnsEntry
	calls map[dnsKey]*dnsCall
}

type dnsKey struct {
	name string // lower case, without the final dot
	typ  dnsmessage.Type
}

type dnsEntry struct {
	answer  answer
	expires time.Time
}

// dnsCall is a question being asked; others with the same question wait.
type dnsCall struct {
	done   chan struct{}
	answer answer
	err    error
}

// Resolver returns a resolver that asks servers, in order.
func (s *Stack) Resolver(servers []netip.AddrPort) *Resolver {
	return &Resolver{
		s:       s,
		servers: slices.Clone(servers),
		cache:   make(map[dnsKey]dnsEntry),
		calls:   make(map[dnsKey]*dnsCall),
	}
}

// LookupNetIP returns the addresses of name; network is "ip" (IPv4 and IPv6,
// asked for in parallel), "ip4" or "ip6". A literal address is returned as it
// is. Errors are *net.DNSError values, IsNotFound set when the name does not
// exist or has no such address.
func (r *Resolver) LookupNetIP(ctx context.Context, network, name string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		if a = a.Unmap(); network == "ip" || (network == "ip4") == a.Is4() {
			return []netip.Addr{a}, nil
		}
		return nil, r.dnsError(name, errNoHost)
	}
	if a := localhost(network, name); a != nil {
		return a, nil
	}
	switch network {
	case "ip4":
		return r.addresses(ctx, name, dnsmessage.TypeA)
	case "ip6":
		return r.addresses(ctx, name, dnsmessage.TypeAAAA)
	case "ip":
		return r.both(ctx, name)
	default:
		return nil, &net.OpError{Op: "lookup", Net: network, Err: net.UnknownNetworkError(network)}
	}
}

// localhost answers for the names that RFC 6761 section 6.3 keeps from DNS;
// nil means that name is none of them.
func localhost(network, name string) []netip.Addr {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name != "localhost" && !strings.HasSuffix(name, ".localhost") {
		return nil
	}
	v4, v6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	switch network {
	case "ip4":
		return []netip.Addr{v4}
	case "ip6":
		return []netip.Addr{v6}
	default:
		return []netip.Addr{v4, v6}
	}
}

// both asks for A and AAAA at once.
func (r *Resolver) both(ctx context.Context, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		addrs []netip.Addr
		err   error
	}
	results := make(chan result, 2)
	ask := func(t dnsmessage.Type) {
		a, err := r.addresses(ctx, name, t)
		results <- result{a, err}
	}
	go ask(dnsmessage.TypeA)
	go ask(dnsmessage.TypeAAAA)
	first := <-results
	if first.err == nil {
		limit := time.AfterFunc(dnsOtherFamily, cancel)
		defer limit.Stop()
	}
	second := <-results
	switch {
	case first.err == nil || second.err == nil:
		return append(first.addrs, second.addrs...), nil
	case isNotFound(first.err):
		return nil, second.err
	default:
		return nil, first.err
	}
}

func isNotFound(err error) bool {
	var d *net.DNSError
	return errors.As(err, &d) && d.IsNotFound
}

func (r *Resolver) addresses(ctx context.Context, name string, t dnsmessage.Type) ([]netip.Addr, error) {
	a, err := r.lookup(ctx, name, t)
	if err == nil && len(a.addrs) == 0 {
		err = errNoHost
	}
	if err != nil {
		return nil, r.dnsError(name, err)
	}
	return slices.Clone(a.addrs), nil
}

// LookupAddr returns the name of an address, without the final dot. Errors are
// those of LookupNetIP.
func (r *Resolver) LookupAddr(ctx context.Context, addr netip.Addr) (string, error) {
	a, err := r.lookup(ctx, reverseName(addr.Unmap()), dnsmessage.TypePTR)
	if err == nil && a.name == "" {
		err = errNoHost
	}
	if err != nil {
		return "", r.dnsError(addr.String(), err)
	}
	return a.name, nil
}

// lookup answers from the cache, from a question that somebody else is just
// asking, or by asking.
func (r *Resolver) lookup(ctx context.Context, name string, t dnsmessage.Type) (answer, error) {
	n, ok := dnsName(name)
	if !ok {
		return answer{}, errNoHost
	}
	k := dnsKey{strings.ToLower(strings.TrimSuffix(name, ".")), t}
	for {
		r.mu.Lock()
		if e, ok := r.cache[k]; ok && r.s.clock.Now().Before(e.expires) {
			r.mu.Unlock()
			r.s.dnsHits.Add(1)
			return e.answer, nil
		}
		c, waiting := r.calls[k]
		if !waiting {
			c = &dnsCall{done: make(chan struct{})}
			r.calls[k] = c
		}
		r.mu.Unlock()
		if !waiting {
			c.answer, c.err = r.ask(ctx, dnsmessage.Question{Name: n, Type: t, Class: dnsmessage.ClassINET})
			r.mu.Lock()
			delete(r.calls, k)
			if c.err == nil {
				r.keepLocked(k, c.answer)
			}
			r.mu.Unlock()
			close(c.done)
			return c.answer, c.err
		}
		select {
		case <-c.done:
		case <-ctx.Done():
			return answer{}, ctx.Err()
		}
		// The other caller may have given up; that is no answer for this one.
		if errors.Is(c.err, context.Canceled) || errors.Is(c.err, context.DeadlineExceeded) {
			continue
		}
		return c.answer, c.err
	}
}

// keepLocked stores an answer. r.mu is held.
func (r *Resolver) keepLocked(k dnsKey, a answer) {
	ttl := min(max(a.ttl, dnsMinTTL), dnsMaxTTL)
	if !a.found() {
		if ttl = min(a.ttl, dnsMaxNegTTL); ttl <= 0 {
			return
		}
	}
	now := r.s.clock.Now()
	if len(r.cache) >= dnsCacheSize {
		for k, e := range r.cache {
			if !now.Before(e.expires) {
				delete(r.cache, k)
			}
		}
		for k := range r.cache {
			if len(r.cache) < dnsCacheSize {
				break
			}
			delete(r.cache, k)
		}
	}
	r.cache[k] = dnsEntry{a, now.Add(ttl)}
}

// ask goes through the servers until one gives an answer, be it that the name
// doesn't exist.
func (r *Resolver) ask(ctx context.Context, q dnsmessage.Question) (answer, error) {
	err := errors.New("no DNS server known")
	for range dnsRounds {
		for _, server := range r.servers {
			if ctx.Err() != nil {
				return answer{}, ctx.Err()
			}
			var a answer
			a, err = r.exchange(ctx, server, q)
			if err != nil {
				continue
			}
			switch a.rcode {
			case dnsmessage.RCodeSuccess, dnsmessage.RCodeNameError:
				return a, nil
			default:
				err = errors.New("server misbehaving: " + a.rcode.String())
			}
		}
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return answer{}, err
}

// exchange asks one server: over UDP, without EDNS(0) if the server doesn't
// know it, and over TCP if the answer doesn't fit.
func (r *Resolver) exchange(ctx context.Context, server netip.AddrPort, q dnsmessage.Question) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsTry)
	defer cancel()
	a, err := r.exchangeUDP(ctx, server, q, true)
	if err == nil && (a.rcode == dnsmessage.RCodeFormatError || a.rcode == dnsmessage.RCodeNotImplemented) {
		a, err = r.exchangeUDP(ctx, server, q, false)
	}
	if err == nil && a.truncated {
		a, err = r.exchangeTCP(ctx, server, q)
	}
	return a, err
}

func randomID() uint16 {
	var b [2]byte
	rand.Read(b[:]) // never fails
	return binary.BigEndian.Uint16(b[:])
}

// exchangeUDP uses a socket of its own, so that each question has a port of
// its own (RFC 5452 section 9.2).
func (r *Resolver) exchangeUDP(ctx context.Context, server netip.AddrPort, q dnsmessage.Question, edns bool) (answer, error) {
	id := randomID()
	msg, err := appendQuestion(nil, id, q, edns)
	if err != nil {
		return answer{}, err
	}
	c, err := r.s.ListenUDP(netip.AddrPort{})
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	r.s.dnsQueries.Add(1)
	if _, err := c.WriteToUDPAddrPort(msg, server); err != nil {
		return answer{}, err
	}
	buf := make([]byte, dnsUDPSize)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return answer{}, cause(ctx, err)
		}
		if from != unmap(server) {
			continue
		}
		if a, ok, err := parseAnswer(buf[:n], id, q); ok {
			return a, err
		}
	}
}

// exchangeTCP is RFC 7766 with one question per connection.
func (r *Resolver) exchangeTCP(ctx context.Context, server netip.AddrPort, q dnsmessage.Question) (answer, error) {
	id := randomID()
	msg, err := appendQuestion(make([]byte, 2, 512), id, q, true)
	if err != nil {
		return answer{}, err
	}
	binary.BigEndian.PutUint16(msg, uint16(len(msg)-2))
	c, err := r.s.DialTCP(ctx, server)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Abort() })()
	r.s.dnsQueries.Add(1)
	if _, err := c.Write(msg); err != nil {
		return answer{}, cause(ctx, err)
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return answer{}, cause(ctx, err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, buf); err != nil {
		return answer{}, cause(ctx, err)
	}
	a, ok, err := parseAnswer(buf, id, q)
	if err == nil && (!ok || a.truncated) {
		err = errBadAnswer
	}
	return a, err
}

// cause prefers the context's error, which has closed the socket, to the
// socket's.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (r *Resolver) dnsError(name string, err error) error {
	d := &net.DNSError{Err: err.Error(), Name: name, UnwrapErr: err}
	if len(r.servers) > 0 {
		d.Server = r.servers[0].String()
	}
	switch {
	case errors.Is(err, errNoHost):
		d.IsNotFound = true
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		d.IsTimeout, d.IsTemporary = true, true
	default:
		d.IsTemporary = true
	}
	return d
}
