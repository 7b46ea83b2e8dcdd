package client

import (
	"errors"
	"net"

	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
)

// The road out, all of it inline in the caller's goroutine (the netstack's):
//
//	Output      no session yet: drop, counted
//	Seal        in place, between the headroom and the tailroom
//	WriteBatch  one system call a batch; what the kernel refuses is lost and
//	            counted there

// Output sends inner packets. Every element of bufs is wire.DataHeaderLen +
// packet + wire.TagLen bytes long and is overwritten. Safe for concurrent use.
func (c *Client) Output(bufs [][]byte) {
	a := c.current.Load()
	if a == nil {
		c.counters.drops[DropNoSession].Add(uint64(len(bufs)))
		return
	}
	c.send(a, bufs)
	if w := c.waiting.Load(); w == 0 || w < c.received.Load() {
		c.waiting.Store(c.moment())
		c.watch()
	}
}

// watch wakes controlLoop for the first packet after a quiet time.
func (c *Client) watch() {
	if !c.watched.Load() && c.watched.CompareAndSwap(false, true) {
		notify(c.wake)
	}
}

func (c *Client) send(a *active, bufs [][]byte) {
	var n uint64
	for _, b := range bufs {
		n += uint64(len(b) - wire.Overhead)
	}
	a.Seal(bufs)
	if err := c.cfg.Conn.WriteBatch(bufs, a.to); err != nil {
		if !errors.Is(err, net.ErrClosed) {
			c.log.Debug("send failed", "error", err)
		}
		c.counters.drops[DropSend].Add(uint64(len(bufs)))
		return
	}
	c.counters.sentPackets.Add(uint64(len(bufs)))
	c.counters.sentBytes.Add(n)
	c.sent.Store(c.moment())
}

// sendControl seals and sends one control message.
func (c *Client) sendControl(a *active, msg []byte) {
	b := make([]byte, wire.DataHeaderLen, wire.Overhead+len(msg))
	b = append(b, msg...)
	c.send(a, [][]byte{b[:cap(b)]})
}

// sendHandshake sends a message that isn't sealed by a session.
func (c *Client) sendHandshake(msg []byte, to udp.Endpoint) {
	if err := c.cfg.Conn.WriteBatch([][]byte{msg}, to); err != nil {
		c.counters.drops[DropSend].Add(1)
	}
}
