package socks5

// The road of datagrams, one association being one socket towards the application (a.app) and one in the network
// (a.net), which makes the mapping endpoint-independent:
//
//	application → clientLoop: who sent it? → parseHeader → an address: a.net.WriteTo
//	                                                     → a name: names.go, then a.net.WriteTo
//	network     → networkLoop: reads behind room for a header → appendHeader → a.app.WriteTo
//
// Each loop is one goroutine; the handler's own one waits for the end of the TCP connection. A loop holds a buffer
// only while datagrams keep coming. Drops happen in the loops and are counted where they happen; nothing is queued but
// what waits for a name.

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

const (
	// datagramBytes is the largest UDP payload there is (65,507 over IPv4, 65,527 over IPv6 without jumbograms).
	datagramBytes = 65527
	// busyTime is how long a loop keeps its buffer after the last datagram.
	busyTime = time.Second
	// maxReadErrors in a row end a loop: a socket that only fails would spin.
	maxReadErrors = 100
	// appSocketBytes is asked for as the buffers of the socket towards the application; the kernel gives what it allows.
	appSocketBytes = 1 << 20
)

// datagram is a buffer of a loop: room for our header in front of the largest payload.
type datagram [maxHeaderBytes + datagramBytes]byte

type association struct {
	h     *Handler
	count *proxy.Counters
	app   *net.UDPConn     // towards the application
	net   proxy.PacketConn // in the network
	names *names

	owner netip.Addr                     // who may use it
	from  atomic.Pointer[netip.AddrPort] // the owner's port, once known
	moved atomic.Uint64                  // datagrams either way, for the idle timer
}

// associate is UDP ASSOCIATE, RFC 1928 section 7. It ends with the TCP connection, and after UDPIdleTimeout ends that.
// Only the address that opened the TCP connection may use the association: from the port that the request declared, or
// else from the first port it uses. (A declared address is ignored; behind a NAT it isn't the one we see.)
func (h *Handler) associate(ctx context.Context, s *proxy.Server, c *proxy.Conn, declared netip.AddrPort) {
	select {
	case h.associations <- struct{}{}:
		defer func() { <-h.associations }()
	default:
		s.Counters().Failure(proxy.ReasonLimit)
		c.CloseWith(reply(proxy.ReasonLimit, netip.AddrPort{}))
		return
	}
	a, err := h.open(ctx, s, c, declared)
	if err != nil {
		reason := proxy.ReasonOf(err)
		s.Counters().Failure(reason)
		s.Logger().Debug("udp associate failed", "error", err)
		c.CloseWith(reply(reason, netip.AddrPort{}))
		return
	}
	s.Counters().OpenAssociations().Add(1)
	defer s.Counters().OpenAssociations().Add(-1)

	ctx, cancel := context.WithCancel(ctx)
	a.names.start(ctx)
	var loops sync.WaitGroup
	loops.Go(func() { a.clientLoop(c) })
	loops.Go(func() { a.networkLoop(c) })
	idle := proxy.NewIdleTimer(h.cfg.UDPIdleTimeout, a.moved.Load, func() {
		s.Counters().AssociationIdle()
		c.Close()
	})
	if c.Reply(reply(proxy.ReasonNone, proxy.AddrPortOf(a.app.LocalAddr()))) == nil {
		_ = c.WaitHangUp() // however it ended, it has ended
	}
	idle.Stop()
	cancel()
	a.app.Close()
	a.net.Close()
	loops.Wait()
	a.names.wait()
}

func (h *Handler) open(
	ctx context.Context, s *proxy.Server, c *proxy.Conn, declared netip.AddrPort,
) (*association, error) {
	// The application reached us at this address, so its datagrams will too.
	app, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(c.LocalIP(), 0)))
	if err != nil {
		return nil, err
	}
	// More room for bursts, where the kernel gives it; without it there are more drops.
	_ = app.SetReadBuffer(appSocketBytes)
	_ = app.SetWriteBuffer(appSocketBytes)
	pc, err := s.Network().ListenPacket(ctx)
	if err != nil {
		app.Close()
		return nil, err
	}
	a := &association{h: h, count: s.Counters(), app: app, net: pc, owner: c.RemoteIP()}
	if declared.Port() != 0 {
		// A zone, which the reply to a link-local address needs, comes with the first datagram.
		from := netip.AddrPortFrom(a.owner, declared.Port())
		a.from.Store(&from)
	}
	a.names = newNames(s, a.send)
	return a, nil
}

// clientLoop carries datagrams from the application to the network.
func (a *association) clientLoop(c *proxy.Conn) {
	defer c.Close() // the association is of no use without it
	readLoop(a.h, a.app, 0, func(b []byte, from netip.AddrPort) {
		if !a.allowed(from) {
			a.count.Drop(proxy.DropStranger)
			return
		}
		a.moved.Add(1)
		h, payload, why, ok := parseHeader(b)
		switch {
		case !ok:
			a.count.Drop(why)
		case h.addr.IsValid():
			a.send(payload, netip.AddrPortFrom(h.addr, h.port))
		default:
			a.names.sendTo(h.name, h.port, payload)
		}
	})
}

// networkLoop carries datagrams from the network to the application, whoever sent them.
func (a *association) networkLoop(c *proxy.Conn) {
	defer c.Close()
	readLoop(a.h, a.net, maxHeaderBytes, func(b []byte, from netip.AddrPort) {
		to := a.from.Load()
		if to == nil {
			a.count.Drop(proxy.DropNoClient)
			return
		}
		a.moved.Add(1)
		from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
		// The header goes right before the payload, so the payload needn't move.
		b = b[maxHeaderBytes-headerBytes(from.Addr()):]
		appendHeader(b[:0], from)
		if _, err := a.app.WriteToUDPAddrPort(b, *to); err != nil {
			a.count.Drop(dropOf(err))
			return
		}
		a.count.DatagramIn()
	})
}

// send gives a payload to the network. Safe for concurrent use.
func (a *association) send(payload []byte, to netip.AddrPort) {
	if _, err := a.net.WriteToUDPAddrPort(payload, to); err != nil {
		a.count.Drop(dropOf(err))
		return
	}
	a.count.DatagramOut()
}

func dropOf(err error) proxy.Drop {
	if errors.Is(err, syscall.EMSGSIZE) {
		return proxy.DropTooBig
	}
	return proxy.DropSend
}

// allowed says whether a datagram's sender may use the association, and remembers its port when it is the first. It is
// called by clientLoop only.
func (a *association) allowed(from netip.AddrPort) bool {
	known := a.from.Load()
	if known != nil && *known == from {
		return true // nearly always
	}
	addr := from.Addr().Unmap()
	if addr.WithZone("") != a.owner || known != nil && known.Port() != from.Port() {
		return false
	}
	// The address as the socket reports it (IPv4-mapped, with a zone) is the one to answer.
	a.from.Store(&from)
	return true
}

// reader is what readLoop needs of both sockets.
type reader interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	SetReadDeadline(t time.Time) error
}

// readLoop gives handle every datagram until conn is closed: a slice whose first room bytes are free. The buffer goes
// back to the pool when nothing has come for a while.
func readLoop(h *Handler, conn reader, room int, handle func(b []byte, from netip.AddrPort)) {
	for {
		if conn.SetReadDeadline(time.Time{}) != nil || proxy.WaitReadable(conn) != nil {
			return
		}
		buf := h.datagrams.Get().(*datagram)
		again := readBusy(conn, buf[:], room, handle)
		h.datagrams.Put(buf)
		if !again {
			return
		}
	}
}

// readBusy reads until nothing has come for busyTime (true), or no more can be read (false). The deadline is moved once
// per busyTime, not per datagram.
func readBusy(conn reader, buf []byte, room int, handle func(b []byte, from netip.AddrPort)) bool {
	if conn.SetReadDeadline(time.Now().Add(busyTime)) != nil {
		return false
	}
	for some, failures := false, 0; ; {
		n, from, err := conn.ReadFromUDPAddrPort(buf[room:])
		switch {
		case err == nil:
			some, failures = true, 0
			handle(buf[:room+n], from)
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !some {
				return true
			}
			some = false
			if conn.SetReadDeadline(time.Now().Add(busyTime)) != nil {
				return false
			}
		default:
			// An earlier datagram's ICMP error may turn up here; it is not the socket's end.
			if failures++; errors.Is(err, net.ErrClosed) || failures > maxReadErrors {
				return false
			}
		}
	}
}
