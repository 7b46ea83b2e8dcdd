package simnet

import (
	"net"
	"net/netip"

	"github.com/anytun-go/anytun/anytun/udp"
)

// maxBatch is how many datagrams a ReadBatch returns at most.
const maxBatch = 128

// Conn is a socket of a host.
type Conn struct {
	host  *Host
	local netip.AddrPort
	queue chan received // bounded: queueLen, the newest is dropped
	done  chan struct{} // closed by Close, under Network.mu

	// Owned by the reader.
	buf     []byte
	packets [][]byte
	groups  []udp.Group
}

var _ udp.Conn = (*Conn)(nil)

type received struct {
	from    netip.AddrPort
	local   netip.Addr
	payload []byte
}

// ReadBatch implements udp.Conn.
func (c *Conn) ReadBatch() ([]udp.Group, error) {
	// Whoever kept a packet of the last batch shall notice.
	for _, p := range c.packets {
		for i := range p {
			p[i] = 0xdb
		}
	}
	clear(c.groups)
	c.buf, c.packets, c.groups = c.buf[:0], c.packets[:0], c.groups[:0]
	select {
	case <-c.done: // not what is left in the queue
		return nil, net.ErrClosed
	default:
	}
	select {
	case <-c.done:
		return nil, net.ErrClosed
	case r := <-c.queue:
		c.add(r)
	}
	for len(c.packets) < maxBatch {
		select {
		case r := <-c.queue:
			c.add(r)
			continue
		default:
		}
		break
	}
	return c.groups, nil
}

// add copies a datagram behind the others, as if the kernel had joined them. If buf
// grows, earlier packets stay in the old memory.
func (c *Conn) add(r received) {
	start := len(c.buf)
	c.buf = append(c.buf, r.payload...)
	c.packets = append(c.packets, c.buf[start:len(c.buf):len(c.buf)])
	from := udp.Endpoint{Addr: r.from, Local: r.local}
	if k := len(c.groups) - 1; k >= 0 && c.groups[k].From == from {
		first := len(c.packets) - len(c.groups[k].Packets) - 1
		c.groups[k].Packets = c.packets[first:len(c.packets):len(c.packets)]
		return
	}
	c.groups = append(c.groups, udp.Group{From: from, Packets: c.packets[len(c.packets)-1 : len(c.packets) : len(c.packets)]})
}

// WriteBatch implements udp.Conn. It never blocks.
func (c *Conn) WriteBatch(pkts [][]byte, to udp.Endpoint) error {
	n := c.host.net
	n.mu.Lock()
	select {
	case <-c.done:
		n.mu.Unlock()
		return net.ErrClosed
	default:
	}
	at := netip.AddrPortFrom(to.Addr.Addr().Unmap(), to.Addr.Port())
	source, ok := c.host.sourceLocked(c.local.Addr(), to.Local.Unmap(), at.Addr())
	from := netip.AddrPortFrom(source, c.local.Port())
	for _, p := range pkts {
		if !ok {
			n.stats.Sent++
			n.dropLocked(&datagram{from: from, to: at, sender: c.host, payload: p}, DropSource)
			continue
		}
		n.sendLocked(c.host, from, at, p)
	}
	n.unlockAndTell()
	return nil
}

// LocalAddr implements udp.Conn.
func (c *Conn) LocalAddr() netip.AddrPort { return c.local }

// Close implements udp.Conn.
func (c *Conn) Close() error {
	c.host.net.mu.Lock()
	defer c.host.net.mu.Unlock()
	c.closeLocked()
	return nil
}

func (c *Conn) closeLocked() {
	select {
	case <-c.done:
	default:
		close(c.done)
		delete(c.host.conns, c.local)
	}
}

// drainLocked throws away what is queued.
func (c *Conn) drainLocked() {
	for {
		select {
		case <-c.queue:
		default:
			return
		}
	}
}
