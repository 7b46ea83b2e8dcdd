package udp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
)

// portableConn is the Conn of systems without batches: one datagram per system
// call. It is compiled on Linux too, so that tests can hold it against the fast
// one.
type portableConn struct {
	uc         *net.UDPConn
	local      netip.AddrPort
	recvBuffer int
	sendBuffer int
	counters   counters
	closeOnce  sync.Once
	closeErr   error

	// Owned by the reader.
	buf    []byte
	packet [1][]byte
	group  [1]Group
}

var (
	_ countedConn = (*portableConn)(nil)
	_ StatsReader = (*portableConn)(nil)
)

func listenPortable(addr netip.AddrPort, o Options) (Conn, error) {
	o = o.withDefaults()
	uc, err := listenUDP(addr, o)
	if err != nil {
		return nil, err
	}
	return &portableConn{
		uc:         uc,
		local:      localAddr(uc),
		recvBuffer: raiseBuffer(uc.SetReadBuffer, o.RecvBuffer),
		sendBuffer: raiseBuffer(uc.SetWriteBuffer, o.SendBuffer),
		buf:        make([]byte, messageSize),
	}, nil
}

// raiseBuffer asks for size bytes, then for half as long as the system refuses
// (BSDs refuse what is above their limit, where Linux gives what it can).
func raiseBuffer(set func(int) error, size int) int {
	for ; size >= 64<<10; size /= 2 {
		if set(size) == nil {
			return size
		}
	}
	return 0
}

// ReadBatch implements Conn.
func (c *portableConn) ReadBatch() ([]Group, error) {
	for {
		n, from, err := c.uc.ReadFromUDPAddrPort(c.buf)
		if err != nil {
			reason, lost := dropReasonOf(err)
			if !lost || reason == DropBadAddress {
				return nil, fmt.Errorf("read udp: %w", err)
			}
			c.counters.drop(reason, 1)
			continue
		}
		c.counters.received.add(1, n, 1)
		c.packet[0] = c.buf[:n:n]
		c.group[0] = Group{From: Endpoint{Addr: unmap(from)}, Packets: c.packet[:]}
		if !c.local.Addr().IsUnspecified() {
			c.group[0].From.Local = c.local.Addr()
		}
		return c.group[:], nil
	}
}

// WriteBatch implements Conn.
func (c *portableConn) WriteBatch(pkts [][]byte, to Endpoint) error {
	_, err := c.write(pkts, to)
	return err
}

// write is WriteBatch and tells how many datagrams were sent.
func (c *portableConn) write(pkts [][]byte, to Endpoint) (sent int, err error) {
	if !to.Addr.IsValid() {
		c.counters.drop(DropBadAddress, len(pkts))
		return 0, nil
	}
	for _, p := range pkts {
		_, err := c.uc.WriteToUDPAddrPort(p, to.Addr)
		if err == nil {
			c.counters.sent.add(1, len(p), 1)
			sent++
			continue
		}
		var malformed *net.AddrError
		if errors.As(err, &malformed) {
			c.counters.drop(DropBadAddress, 1)
			continue
		}
		reason, lost := dropReasonOf(err)
		if !lost {
			return sent, fmt.Errorf("write udp: %w", err)
		}
		c.counters.drop(reason, 1)
	}
	return sent, nil
}

// LocalAddr implements Conn.
func (c *portableConn) LocalAddr() netip.AddrPort { return c.local }

// Stats implements StatsReader.
func (c *portableConn) Stats() Stats {
	s := c.counters.snapshot()
	s.RecvBuffer, s.SendBuffer = c.recvBuffer, c.sendBuffer
	return s
}

// Close implements Conn.
func (c *portableConn) Close() error {
	c.closeOnce.Do(func() { c.closeErr = c.uc.Close() })
	return c.closeErr
}
