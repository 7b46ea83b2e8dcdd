//go:build !linux

package server

import (
	"errors"
	"net"
	"net/netip"
	"syscall"

	"github.com/anytun-go/anytun/netstack/splice"
)

// egressUDPControl prepares a mapping's socket before it is bound.
func egressUDPControl(string, string, syscall.RawConn) error { return nil }

// egressUDPSocket is a mapping's socket. Outside Linux a mapping holds a buffer
// while it waits, a send may wait for the host, and ICMP errors are not passed
// on.
type egressUDPSocket struct{ c *net.UDPConn }

func openEgressUDP(v6 bool) (*egressUDPSocket, error) {
	c, err := listenEgressUDP(v6)
	if err != nil {
		return nil, err
	}
	return &egressUDPSocket{c}, nil
}

func (s *egressUDPSocket) close() { s.c.Close() }

// send sends one datagram.
func (s *egressUDPSocket) send(payload []byte, to netip.AddrPort) error {
	_, err := s.c.WriteToUDPAddrPort(payload, to)
	return err
}

// egressUDPReader reads a socket.
type egressUDPReader struct {
	c   *net.UDPConn
	buf *splice.Buffer
	got egressRead
}

func (s *egressUDPSocket) reader() *egressUDPReader { return &egressUDPReader{c: s.c} }

// read waits for the next datagram, or returns nil.
func (r *egressUDPReader) read(wait bool) (*egressRead, error) {
	if !wait {
		return nil, nil
	}
	r.buf = splice.Get()
	// Windows reports an ICMP error as a failed read; the next one may succeed.
	for failed := 0; ; failed++ {
		n, peer, err := r.c.ReadFromUDPAddrPort(r.buf[:])
		if err == nil {
			r.got = egressRead{peer: netip.AddrPortFrom(peer.Addr().Unmap().WithZone(""), peer.Port()), data: r.buf[:n], size: max(n, 1)}
			return &r.got, nil
		}
		if errors.Is(err, net.ErrClosed) || failed == 1000 {
			r.release()
			return nil, err
		}
	}
}

// release gives the buffer of the last read back.
func (r *egressUDPReader) release() {
	splice.Put(r.buf)
	r.buf = nil
}
