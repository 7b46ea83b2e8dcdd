package socks5

// The road of datagrams, one association being one socket towards the application (a.app) and one in the network
// (a.net), which makes the mapping endpoint-independent:
//
//	application → clientLoop: who sent them? → parseHeader → an address, or a name that is known: a.net.WriteBatch
//	                                                       → a name: names.go, then a.net.WriteBatch
//	network     → networkLoop: reads behind room for a header → appendHeader → a.app.WriteBatch
//
// Each loop is one goroutine; the handler's own one waits for the end of the TCP connection. A loop takes what there is
// at once and holds a buffer only while datagrams keep coming; for sockets that know no batches see singly.go. Drops
// happen in the loops and are counted where they happen; nothing is queued but what waits for a name.

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/anytun-go/anytun/proxy"
)

const (
	// datagramBytes is the largest UDP payload there is, over IPv6 without jumbograms; datagramBytes4 over IPv4.
	datagramBytes, datagramBytes4 = 65527, 65507
)

type association struct {
	h     *Handler
	count *proxy.Counters
	app   AppConn         // towards the application
	net   proxy.BatchConn // in the network
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
	app, err := h.cfg.ListenUDP(netip.AddrPortFrom(c.LocalIP(), 0))
	if err != nil {
		return nil, err
	}
	pc, err := s.Network().ListenPacket(ctx)
	if err != nil {
		app.Close()
		return nil, err
	}
	many, ok := pc.(proxy.BatchConn)
	if !ok {
		many = &singly{conn: pc}
	}
	a := &association{h: h, count: s.Counters(), app: app, net: many, owner: c.RemoteIP()}
	if declared.Port() != 0 {
		// A zone, which the reply to a link-local address needs, comes with the first datagram.
		from := netip.AddrPortFrom(a.owner, declared.Port())
		a.from.Store(&from)
	}
	a.names = newNames(s, a.send)
	return a, nil
}

// outgoing are payloads on their way to the network.
type outgoing struct {
	payloads [][]byte
	to       []netip.AddrPort
}

func (o *outgoing) add(payload []byte, to netip.AddrPort) {
	o.payloads, o.to = append(o.payloads, payload), append(o.to, to)
}

// clientLoop carries datagrams from the application to the network.
func (a *association) clientLoop(c *proxy.Conn) {
	defer c.Close() // the association is of no use without it
	for {
		datagrams, from, err := a.app.ReadBatch()
		if err != nil {
			return
		}
		if !a.allowed(from) {
			a.count.Drop(proxy.DropStranger, len(datagrams))
			continue
		}
		a.moved.Add(uint64(len(datagrams)))
		out := a.h.outgoing.Get().(*outgoing)
		for _, b := range datagrams {
			a.sort(out, b)
		}
		a.sendAll(out)
		clear(out.payloads)
		out.payloads, out.to = out.payloads[:0], out.to[:0]
		a.h.outgoing.Put(out)
	}
}

// sort appends what a datagram of the application holds to out, unless it has to wait or can't be sent.
func (a *association) sort(out *outgoing, b []byte) {
	h, payload, why, ok := parseHeader(b)
	if ok && !h.addr.IsValid() {
		h.addr, why, ok = a.names.find(h.name, h.port, payload)
	}
	switch {
	case !ok:
		a.count.Drop(why, 1)
	case h.addr.IsValid():
		out.add(payload, netip.AddrPortFrom(h.addr, h.port))
	}
}

// networkLoop carries datagrams from the network to the application, whoever sent them.
func (a *association) networkLoop(c *proxy.Conn) {
	defer c.Close()
	for {
		datagrams, from, err := a.net.ReadBatch(maxHeaderBytes)
		if err != nil {
			return
		}
		to := a.from.Load()
		if to == nil {
			a.count.Drop(proxy.DropNoClient, len(datagrams))
			continue
		}
		a.moved.Add(uint64(len(datagrams)))
		limit := datagramBytes
		if to.Addr().Unmap().Is4() {
			limit = datagramBytes4
		}
		fit := datagrams[:0]
		for i, b := range datagrams {
			from := netip.AddrPortFrom(from[i].Addr().Unmap().WithZone(""), from[i].Port())
			// The header goes right before the payload, so the payload needn't move.
			b = b[maxHeaderBytes-headerBytes(from.Addr()):]
			if len(b) <= limit {
				appendHeader(b[:0], from)
				fit = append(fit, b)
			}
		}
		if n := len(datagrams) - len(fit); n > 0 {
			a.count.Drop(proxy.DropTooBig, n)
		}
		sent, err := a.app.WriteBatch(fit, *to)
		a.count.DatagramsIn(sent)
		if lost := len(fit) - sent; lost > 0 {
			a.count.Drop(dropOf(err), lost)
		}
	}
}

// send gives a payload to the network. Safe for concurrent use.
func (a *association) send(payload []byte, to netip.AddrPort) {
	a.sendAll(&outgoing{[][]byte{payload}, []netip.AddrPort{to}})
}

// sendAll gives payloads to the network. Safe for concurrent use.
func (a *association) sendAll(out *outgoing) {
	for done := 0; done < len(out.payloads); {
		n, err := a.net.WriteBatch(out.payloads[done:], out.to[done:])
		a.count.DatagramsOut(n)
		if done += n; err != nil {
			a.count.Drop(dropOf(err), 1)
			done++
		}
	}
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
