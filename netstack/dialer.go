package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"
)

const (
	// attemptDelay is RFC 8305's Connection Attempt Delay.
	attemptDelay = 250 * time.Millisecond

	// maxAttempts bounds the addresses of a name that are tried.
	maxAttempts = 16
)

// Dialer dials names through a stack, after RFC 8305 (happy eyeballs): IPv6
// and IPv4 addresses take turns, each attempt gets a head start of 250 ms, and
// the first connection wins. It is safe for concurrent use.
type Dialer struct {
	Stack    *Stack
	Resolver *Resolver
}

// DialContext connects to address, "host:port" with a numeric port; network is
// "tcp", "tcp4" or "tcp6". Errors are those of DialTCP and LookupNetIP; when
// several addresses fail, the one that says most.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	ipNetwork, ok := map[string]string{"tcp": "ip", "tcp4": "ip4", "tcp6": "ip6"}[network]
	if !ok {
		return fail(net.UnknownNetworkError(network))
	}
	host, portString, err := net.SplitHostPort(address)
	if err != nil {
		return fail(err)
	}
	port, err := strconv.ParseUint(portString, 10, 16)
	if err != nil {
		return fail(&net.AddrError{Err: "invalid port", Addr: address})
	}
	if ipNetwork == "ip" && !d.Stack.hasFamily(netip.IPv6Loopback()) {
		if _, err := netip.ParseAddr(host); err != nil {
			ipNetwork = "ip4" // no use in asking for addresses out of reach
		}
	}
	addrs, err := d.Resolver.LookupNetIP(ctx, ipNetwork, host)
	if err != nil {
		return fail(err)
	}
	var c *Conn
	if len(addrs) == 1 { // nobody to race against
		c, err = d.Stack.DialTCP(ctx, netip.AddrPortFrom(addrs[0], uint16(port)))
	} else {
		c, err = d.race(ctx, interleave(addrs), uint16(port))
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// interleave orders addresses so that the families take turns, IPv6 first, and
// each family keeps its order (RFC 8305 section 4).
func interleave(addrs []netip.Addr) []netip.Addr {
	var v4, v6 []netip.Addr
	for _, a := range addrs {
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	out := make([]netip.Addr, 0, len(addrs))
	for i := range max(len(v4), len(v6)) {
		if i < len(v6) {
			out = append(out, v6[i])
		}
		if i < len(v4) {
			out = append(out, v4[i])
		}
	}
	return out[:min(len(out), maxAttempts)]
}

type attempt struct {
	c   *Conn
	err error
}

// race tries addrs one after the other, without waiting for a failure longer
// than attemptDelay. It returns after all attempts have ended, which is at once
// when the first has won: the others are canceled.
func (d *Dialer) race(ctx context.Context, addrs []netip.Addr, port uint16) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan attempt)
	try := func(a netip.Addr) {
		c, err := d.Stack.DialTCP(ctx, netip.AddrPortFrom(a, port))
		results <- attempt{c, err}
	}
	var winner *Conn
	var worst error
	timer := time.NewTimer(0) // the first attempt starts now
	defer timer.Stop()
	for next, running := 0, 0; running > 0 || winner == nil && next < len(addrs); {
		select {
		case <-timer.C:
			if winner == nil && next < len(addrs) {
				go try(addrs[next])
				next++
				running++
				timer.Reset(attemptDelay)
			}
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				worst = moreTelling(worst, r.err)
				timer.Reset(0)
			case winner != nil:
				_ = r.c.Abort()
			default:
				winner = r.c
				cancel()
			}
		}
	}
	if winner != nil {
		return winner, nil
	}
	return nil, worst
}

// moreTelling returns the error that says more about why a name can't be
// reached: an answer of the host says more than one of the path, and that more
// than silence or our own lack of a route.
func moreTelling(a, b error) error {
	if a == nil || telling(b) > telling(a) {
		return b
	}
	return a
}

func telling(err error) int {
	switch errno(err) {
	case syscall.ECONNREFUSED:
		return 8
	case syscall.ECONNRESET:
		return 7
	case syscall.EACCES:
		return 6
	case syscall.EHOSTUNREACH:
		return 5
	case syscall.ETIMEDOUT:
		return 4
	case syscall.EADDRNOTAVAIL:
		return 3
	case syscall.ENETUNREACH:
		return 2
	default:
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return 4
	}
	return 1
}
