package client

import (
	"errors"
	"net"
	"net/netip"
	"time"

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
	authentic := false
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
		authentic = true
		if n := uint32(h.Sender); c.answering.Load() != n {
			c.changed(n)
		}
		if wire.IsControl(p) {
			c.receiveControl(a, p)
			continue
		}
		packets++
		bytes += uint64(len(p))
		batch = append(batch, p)
	}
	if authentic {
		now := time.Now().UnixNano()
		c.received.Store(now)
		if packets > 0 {
			c.packet.Store(now)
			if !c.watched.Load() && c.watched.CompareAndSwap(false, true) {
				notify(c.wake)
			}
		}
	}
	if packets > 0 {
		c.counters.receivedPackets.Add(packets)
		c.counters.receivedBytes.Add(bytes)
	}
	return batch
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

// changed notes that another server answers now. Where routes flip for every
// packet that is often, so it is counted and not told.
func (c *Client) changed(server uint32) {
	if old := c.answering.Swap(server); old != 0 && old != server {
		c.changes.Add(1)
	}
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
		if t := c.token.Load(); t != 0 && t == m.Token {
			c.rtt.Store(time.Now().UnixNano() - int64(t))
			c.token.Store(0)
		}
		if old := c.observed.Load(); m.Observed.Addr() != netip.IPv6Unspecified() && (old == nil || *old != m.Observed) {
			c.observed.Store(&m.Observed)
		}
	case wire.ControlClose:
		r, err := wire.ParseClose(p)
		if err != nil {
			c.counters.drops[DropMalformed].Add(1)
			return
		}
		if r == wire.CloseUnknown && a == c.current.Load() {
			notify(c.refused)
		}
	default: // a later version's; unknown control messages are ignored by rule
		c.counters.drops[DropUnknownControl].Add(1)
	}
}

func dropOf(err error) Drop {
	if errors.Is(err, session.ErrReplay) {
		return DropReplay
	}
	return DropForged
}
