package udp

import (
	"net"
	"net/netip"
)

// Socket is a Conn for who knows nothing of this package: its methods have the
// types of package net only.
type Socket struct {
	conn   countedConn
	groups []Group // of the last ReadBatch, still to be handed out
}

// countedConn is a Conn that tells how many datagrams it has sent.
type countedConn interface {
	Conn
	write(pkts [][]byte, to Endpoint) (sent int, err error)
}

// ListenSocket is Listen for a Socket.
func ListenSocket(at netip.AddrPort, o Options) (*Socket, error) {
	c, err := Listen(at, o)
	if err != nil {
		return nil, err
	}
	return &Socket{conn: c.(countedConn)}, nil
}

// ReadBatch waits for datagrams and returns some of one sender, in order. They
// are the caller's, to be changed as well, until the next call. One goroutine at
// a time may call it. Any error is final.
func (s *Socket) ReadBatch() (datagrams [][]byte, from netip.AddrPort, err error) {
	if len(s.groups) == 0 {
		if s.groups, err = s.conn.ReadBatch(); err != nil {
			return nil, from, err
		}
	}
	g := &s.groups[0]
	s.groups = s.groups[1:]
	return g.Packets, g.From.Addr, nil
}

// WriteBatch sends datagrams to one receiver, in order, and returns how many the
// kernel took. It may be called from several goroutines at once. Any error is
// final.
func (s *Socket) WriteBatch(datagrams [][]byte, to netip.AddrPort) (sent int, err error) {
	return s.conn.write(datagrams, Endpoint{Addr: to})
}

// LocalAddr returns the *net.UDPAddr the socket is bound to.
func (s *Socket) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(s.conn.LocalAddr()) }

// Close unblocks ReadBatch and WriteBatch. It may be called repeatedly.
func (s *Socket) Close() error { return s.conn.Close() }
