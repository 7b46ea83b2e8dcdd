package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

// egressKeepAlive finds hosts that have vanished without a word: 75 s of
// silence, then five probes.
var egressKeepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     75 * time.Second,
	Interval: 15 * time.Second,
	Count:    5,
}

// egressTCPFlow is a connection from its dial to its end.
type egressTCPFlow struct {
	flow  *egressFlow
	relay *egressRelay
}

// endFlow resets both ends.
func (f *egressTCPFlow) endFlow() { f.relay.abort() }

// forwardTCP serves one connection on a goroutine of its own: it dials outside
// before it accepts inside, so that the client learns how the dial went.
func (e *sockets) forwardTCP(ctx context.Context, r *netstack.TCPRequest) {
	if !e.begin() {
		e.count.notRunning.Add(1)
		r.Reject(nil)
		return
	}
	defer e.wg.Done()
	to := r.Destination()
	if v := e.policy.verdict(to.Addr()); v != egressAllow {
		e.count.forbidden.Add(1)
		r.Reject(v.err())
		return
	}
	if e.draining.Load() {
		e.count.draining.Add(1)
		r.Reject(nil)
		return
	}
	f := e.admit(egressKindTCP, r.Source(), egressHeld, e.now())
	if f == nil {
		// The limit is a rule of this server, and is reported as one.
		r.Reject(syscall.EACCES)
		return
	}
	defer e.flows.drop(f)

	host, err := e.dialTCP(ctx, f, to)
	if err != nil {
		r.Reject(err)
		return
	}
	inner, err := r.Accept()
	if err != nil {
		e.count.tcpAcceptFailed.Add(1)
		egressReset(host)
		return
	}
	relay := newEgressRelay(inner, host)
	relay.used = func(up bool, n int) {
		f.last.Store(e.now().UnixNano())
		if up {
			e.count.tcpBytesUp.Add(uint64(n))
		} else {
			e.count.tcpBytesDown.Add(uint64(n))
		}
	}
	if e.flows.insert(f, &egressTCPFlow{flow: f, relay: relay}) == nil {
		relay.abort()
		return
	}
	if err := relay.run(); err != nil {
		e.count.tcpReset.Add(1)
	}
}

// dialTCP connects the host to a client's destination within the limits of
// half-open connections. The error it returns is what the client is told.
func (e *sockets) dialTCP(ctx context.Context, f *egressFlow, to netip.AddrPort) (*net.TCPConn, error) {
	if why := e.flows.startDial(f); why != egressAdmitted {
		e.deny(why)
		// Silence: a burst is carried over the limit by the client's
		// retransmissions, a second or three later.
		return nil, syscall.ETIMEDOUT
	}
	defer e.flows.endDial(f)
	d := net.Dialer{Timeout: e.cfg.DialTimeout, KeepAliveConfig: egressKeepAlive}
	c, err := d.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
	if err != nil {
		return nil, e.dialError(to.Addr(), err)
	}
	f.last.Store(e.now().UnixNano())
	return c, nil
}

// dialError counts why a dial to an address failed and returns what the client
// is told. A time-out is passed on as what it was outside, silence: TCP has no
// message for it, and an invented "host unreachable" would make a slow host look
// like one that the network disowns. The client's own timer ends its attempt; a
// retransmitted SYN after DialTimeout dials once more.
func (e *sockets) dialError(to netip.Addr, err error) error {
	is := func(list ...syscall.Errno) bool {
		for _, errno := range list {
			if errors.Is(err, errno) {
				return true
			}
		}
		return false
	}
	var ne net.Error
	switch {
	case errors.Is(err, context.Canceled):
		e.count.notRunning.Add(1)
		return syscall.ETIMEDOUT
	case is(syscall.ECONNREFUSED, syscall.ECONNRESET):
		e.count.tcpRefused.Add(1)
		return syscall.ECONNREFUSED
	case is(syscall.ENETUNREACH, syscall.EAFNOSUPPORT), to.Is6() && is(syscall.EADDRNOTAVAIL):
		// A host without IPv6 says that no address of its own fits.
		e.count.tcpUnreachable.Add(1)
		return syscall.ENETUNREACH
	case is(syscall.EHOSTUNREACH, syscall.EHOSTDOWN):
		e.count.tcpUnreachable.Add(1)
		return syscall.EHOSTUNREACH
	case is(syscall.EACCES, syscall.EPERM):
		e.count.tcpUnreachable.Add(1)
		return syscall.EACCES
	case is(syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL):
		e.count.tcpNoSocket.Add(1)
		return syscall.ETIMEDOUT // it may well go better a second later
	case errors.As(err, &ne) && ne.Timeout():
		e.count.tcpTimedOut.Add(1)
		return syscall.ETIMEDOUT
	default:
		e.count.tcpDialFailed.Add(1)
		return syscall.EHOSTUNREACH
	}
}
