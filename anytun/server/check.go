package server

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/udp"
)

// Self-check: a server whose receive loops are stuck must lose its routes, or
// it swallows what clients send. Check sends a probe to each of its own sockets,
// by the host's network like everybody's packets, and waits until the loop
// behind it has seen it.

// A probe is probeType, a token that only this process knows, and the number of
// the socket and of the attempt. Its type is that of no message.
const (
	probeType  = 0xff
	probeToken = 16
	probeLen   = 1 + probeToken + 8
)

// prober is the state of Check.
type prober struct {
	token [probeToken]byte
	count atomic.Uint64
	seen  chan uint64 // numbers of probes that came; one place: Check is alone
}

func newProber() (*prober, error) {
	p := &prober{seen: make(chan uint64, 1)}
	if _, err := rand.Read(p.token[:]); err != nil {
		return nil, fmt.Errorf("make a token: %w", err)
	}
	return p, nil
}

// probe takes a datagram of probeType.
func (p *prober) probe(b []byte) bool {
	if len(b) != probeLen || b[0] != probeType || subtle.ConstantTimeCompare(b[1:1+probeToken], p.token[:]) != 1 {
		return false
	}
	select {
	case p.seen <- binary.BigEndian.Uint64(b[1+probeToken:]):
	default: // a late one is still there; Check sends again next time
	}
	return true
}

// Check says whether every outer socket is served. It is to be called by one
// goroutine, and ends with ctx.
func (s *Server) Check(ctx context.Context) error {
	for _, c := range s.cfg.Conns {
		if err := s.checkSocket(ctx, c); err != nil {
			return fmt.Errorf("outer socket %v: %w", c.LocalAddr(), err)
		}
	}
	return nil
}

func (s *Server) checkSocket(ctx context.Context, c udp.Conn) error {
	to := c.LocalAddr()
	if to.Addr().IsUnspecified() {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if to.Addr().Is6() && !to.Addr().Is4In6() {
			loopback = netip.IPv6Loopback()
		}
		to = netip.AddrPortFrom(loopback, to.Port())
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	n := s.prober.count.Add(1)
	b := make([]byte, 0, probeLen)
	b = append(b, probeType)
	b = append(b, s.prober.token[:]...)
	b = binary.BigEndian.AppendUint64(b, n)
	select {
	case <-s.prober.seen: // of an attempt that came too late
	default:
	}
	again := time.NewTicker(200 * time.Millisecond) // a full socket buffer loses probes, too
	defer again.Stop()
	for {
		if _, err := conn.Write(b); err != nil {
			return err
		}
		select {
		case seen := <-s.prober.seen:
			if seen == n {
				return nil
			}
		case <-again.C:
		case <-ctx.Done():
			return errors.New("nobody reads it")
		}
	}
}
