package server

import (
	"net/netip"
	"syscall"
)

// egressVerdict is what the policy says about a destination.
type egressVerdict uint8

const (
	// egressAllow lets the flow out.
	egressAllow egressVerdict = iota
	// egressForbid is a destination no client may reach from this host.
	egressForbid
	// egressOwn is an inner address of the servers: what listens there is found
	// by the netstack before the policy is asked, so nobody listens.
	egressOwn
)

// err is what a refused TCP connection is rejected with.
func (v egressVerdict) err() error {
	switch v {
	case egressForbid:
		return syscall.EACCES
	case egressOwn:
		return syscall.ECONNREFUSED
	default:
		return nil
	}
}

var (
	egressInner4    = netip.MustParsePrefix("100.64.0.0/10") // DESIGN section 3: client addresses
	egressThisHost  = netip.MustParsePrefix("0.0.0.0/8")     // RFC 1122 section 3.2.1.3: a connect to it ends at the host itself
	egressReserved4 = netip.MustParsePrefix("240.0.0.0/4")   // class E and the limited broadcast
	egressMapped    = netip.MustParsePrefix("::ffff:0:0/96") // RFC 4291 section 2.5.5.2: never on the wire, but sockets take it for IPv4
	egressCompat    = netip.MustParsePrefix("::/96")         // RFC 4291 section 2.5.5.1: deprecated, holds :: and ::1
)

// innerPrefix6Bits is the length of the part that all inner IPv6 addresses of
// a cluster share: fd, then 34 bits from the cluster key.
const innerPrefix6Bits = 42

// egressPolicy says where clients may go through the host's own sockets. A
// socket of the host reaches things that a packet from outside never would:
// services bound to loopback, a cloud's metadata service at 169.254.169.254,
// and, by their inner addresses, whatever the host's own routes make of them.
// What else the host can reach, private networks included, is allowed; who
// wants less filters the host's own traffic.
type egressPolicy struct {
	gateway    []netip.Addr
	inner6     []netip.Prefix
	allowLocal bool // loopback and link-local unicast may be reached
}

func newEgressPolicy(gateway []netip.Addr, allowLocal bool) egressPolicy {
	p := egressPolicy{gateway: gateway, allowLocal: allowLocal}
	for _, a := range gateway {
		if a.Is6() {
			p.inner6 = append(p.inner6, netip.PrefixFrom(a, innerPrefix6Bits).Masked())
		}
	}
	return p
}

// verdict is a pure function of the policy and the destination.
func (p *egressPolicy) verdict(dst netip.Addr) egressVerdict {
	for _, g := range p.gateway {
		if dst == g {
			return egressOwn
		}
	}
	switch {
	case !dst.IsValid(), dst.Is4In6(), dst.IsMulticast():
		return egressForbid
	case dst.IsLoopback(), dst.IsLinkLocalUnicast():
		if p.allowLocal {
			return egressAllow
		}
		return egressForbid
	case dst.Is4():
		if egressThisHost.Contains(dst) || egressReserved4.Contains(dst) || egressInner4.Contains(dst) {
			return egressForbid
		}
	default:
		if egressMapped.Contains(dst) || egressCompat.Contains(dst) {
			return egressForbid
		}
		for _, in := range p.inner6 {
			if in.Contains(dst) {
				return egressForbid
			}
		}
	}
	return egressAllow
}
