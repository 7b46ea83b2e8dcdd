package client

import (
	"errors"
	"net"
	"net/netip"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// The road in, all of it in receiveLoop:
//
//	ReadBatch  what the kernel has, datagrams of one endpoint together
//	open       by session id: the current or the previous session; a datagram
//	           that is foreign, forged, replayed or malformed is dropped, counted
//	sort       packets to the batch; control messages are handled in place;
//	           handshake messages are copied to controlLoop
//	Input      the whole batch at once

// receiveLoop runs until the socket is closed, then returns nil, or until it
// fails.
func (c *Client) receiveLoop() error {
	var batch [][]byte
	for {
		groups, err := c.cfg.Conn.ReadBatch()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		batch = batch[:0]
		for i := range groups {
			batch = c.receive(batch, &groups[i])
		}
		if len(batch) > 0 {
			c.cfg.Input(batch)
		}
	}
}

// receive opens a group's datagrams and appends the packets in them to batch.
func (c *Client) receive(batch [][]byte, g *udp.Group) [][]byte {
	var first uint16 // sender of the first authentic message; 0: there was none
	var packets, bytes uint64
	for _, b := range g.Packets {
		if wire.TypeOf(b) != wire.TypeData {
			c.receiveHandshake(b)
			continue
		}
		h, err := wire.ParseData(b)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			continue
		}
		a := c.session(h)
		if a == nil {
			c.counters.drops[DropUnknownSession].Add(1)
			continue
		}
		p, err := a.Open(b, h)
		if err != nil {
			c.counters.drops[dropOf(err)].Add(1)
			continue
		}
		if first == 0 {
			first = h.Sender
		}
		c.changed(uint32(h.Sender))
		if wire.IsControl(p) {
			c.receiveControl(a, p)
			continue
		}
		packets++
		bytes += uint64(len(p))
		batch = append(batch, p)
	}
	if packets > 0 {
		c.counters.receivedPackets.Add(packets)
		c.counters.receivedBytes.Add(bytes)
	}
	if first != 0 {
		c.heard(first, packets > 0)
	}
	return batch
}

// heard notes when messages have come. What controlLoop reads together with the
// moment is stored before it.
func (c *Client) heard(from uint16, packets bool) {
	now := c.moment()
	if packets {
		c.packet.Store(now)
	}
	resumed := c.suspect.Load() && c.suspect.CompareAndSwap(true, false)
	if resumed {
		c.resumed.Store(uint32(from))
	}
	c.received.Store(now)
	if c.waiting.Load() != 0 {
		c.waiting.Store(0)
	}
	if resumed {
		notify(c.wake)
	}
	if packets {
		c.watch()
	}
}

// session finds the session a header names.
func (c *Client) session(h wire.DataHeader) *active {
	if a := c.current.Load(); a != nil && a.SessionID == h.SessionID && a.Header.Epoch == h.Epoch {
		return a
	}
	if a := c.previous.Load(); a != nil && a.SessionID == h.SessionID && a.Header.Epoch == h.Epoch {
		return a
	}
	return nil
}

func (c *Client) receiveHandshake(b []byte) {
	switch wire.TypeOf(b) {
	case wire.TypeResponse, wire.TypeCookie:
		if len(b) > wire.MaxResponseLen {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		select {
		case c.control <- append([]byte(nil), b...):
		default:
			c.counters.drops[DropControlQueue].Add(1)
		}
	default:
		c.counters.drops[DropMalformed].Add(1)
	}
}

// receiveControl takes a control message.
func (c *Client) receiveControl(a *active, p []byte) {
	switch wire.Control(p[0]) {
	case wire.ControlKeepAlive:
		m, err := wire.ParseKeepAlive(p)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		c.sendControl(a, wire.AppendAlive(nil, wire.Alive{Token: m.Token}))
	case wire.ControlAlive:
		m, err := wire.ParseAlive(p)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		c.alive(m)
	case wire.ControlClose:
		r, err := wire.ParseClose(p)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		if r == wire.CloseUnknown && a == c.current.Load() {
			notify(c.refused)
		}
	case wire.ControlPorts:
		m, err := wire.ParsePorts(p, nil)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		select {
		case c.answers <- m:
		default:
			c.counters.drops[DropControlQueue].Add(1)
		}
	default: // a later version's; unknown control messages are ignored by rule
		c.counters.drops[DropUnknownControl].Add(1)
	}
}

// alive takes the answer to a keep-alive. It may be a late one: while nothing
// comes they go out faster than answers may need.
func (c *Client) alive(m wire.Alive) {
	moved := false
	fresh := m.Token > c.tokened && m.Token <= c.token.Load()
	if fresh {
		moved = c.reached(m.Server)
		c.tokened = m.Token
		c.sample(c.moment() - int64(m.Token))
	}
	if m.Observed.Addr() != netip.IPv6Unspecified() {
		if old := c.observed.Load(); old == nil || *old != m.Observed {
			c.observed.Store(&m.Observed)
			moved = moved || old != nil
		}
	}
	if fresh && moved {
		c.moved.Store(true)
	}
}

func dropOf(err error) Drop {
	if errors.Is(err, session.ErrReplay) {
		return DropReplay
	}
	return DropForged
}
