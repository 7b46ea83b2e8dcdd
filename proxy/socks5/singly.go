package socks5

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/anytun-go/anytun/netstack/splice"
	"github.com/anytun-go/anytun/proxy"
)

const (
	// busyTime is how long a socket keeps its buffer after the last datagram.
	busyTime = time.Second
	// maxReadErrors in a row end a socket: one that only fails would spin.
	maxReadErrors = 100
	// appSocketBytes is asked for as the buffers of the socket towards the application; the kernel gives what it allows.
	appSocketBytes = 1 << 20
)

// datagram is a buffer for one of them: room for our header in front of the largest payload.
type datagram [maxHeaderBytes + datagramBytes]byte

var idleDatagrams = sync.Pool{New: func() any { return new(datagram) }}

// singly makes batches of one of a socket that knows no others. It holds a buffer only while datagrams keep coming.
type singly struct {
	conn     proxy.PacketConn
	buf      *datagram // nil while nothing comes
	some     bool      // something has come since the deadline was set
	failures int       // in a row

	datagrams [1][]byte
	from      [1]netip.AddrPort
}

// ReadBatch implements proxy.BatchConn.
func (s *singly) ReadBatch(room int) (datagrams [][]byte, from []netip.AddrPort, err error) {
	for {
		if err := s.await(); err != nil {
			return nil, nil, err
		}
		n, sender, err := s.conn.ReadFromUDPAddrPort(s.buf[room:])
		switch {
		case err == nil:
			s.some, s.failures = true, 0
			s.datagrams[0], s.from[0] = s.buf[:room+n], sender
			return s.datagrams[:], s.from[:], nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !s.some {
				s.release()
				continue
			}
			if err := s.busy(); err != nil {
				return nil, nil, err
			}
		default:
			// An earlier datagram's ICMP error may turn up here; it is not the socket's end.
			if s.failures++; errors.Is(err, net.ErrClosed) || s.failures > maxReadErrors {
				s.release()
				return nil, nil, err
			}
		}
	}
}

// await returns when there is a buffer: at once, or when there is something to read into it.
func (s *singly) await() error {
	if s.buf != nil {
		return nil
	}
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	if err := splice.WaitReadable(s.conn); err != nil {
		return err
	}
	s.buf = idleDatagrams.Get().(*datagram)
	return s.busy()
}

// busy moves the deadline, once per busyTime rather than per datagram.
func (s *singly) busy() error {
	s.some = false
	err := s.conn.SetReadDeadline(time.Now().Add(busyTime))
	if err != nil {
		s.release()
	}
	return err
}

func (s *singly) release() {
	idleDatagrams.Put(s.buf)
	s.buf = nil
}

// WriteBatch implements proxy.BatchConn.
func (s *singly) WriteBatch(datagrams [][]byte, to []netip.AddrPort) (int, error) {
	for i, b := range datagrams {
		if _, err := s.conn.WriteToUDPAddrPort(b, to[i]); err != nil {
			return i, err
		}
	}
	return len(datagrams), nil
}

// LocalAddr implements proxy.BatchConn.
func (s *singly) LocalAddr() net.Addr { return s.conn.LocalAddr() }

// Close implements proxy.BatchConn.
func (s *singly) Close() error { return s.conn.Close() }

// appSingly is singly as an AppConn.
type appSingly struct{ singly }

// listenSingly is the default of Config.ListenUDP.
func listenSingly(at netip.AddrPort) (AppConn, error) {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	// More room for bursts, where the kernel gives it; without it there are more drops.
	_ = c.SetReadBuffer(appSocketBytes)
	_ = c.SetWriteBuffer(appSocketBytes)
	return &appSingly{singly{conn: c}}, nil
}

// ReadBatch implements AppConn.
func (s *appSingly) ReadBatch() (datagrams [][]byte, from netip.AddrPort, err error) {
	datagrams, senders, err := s.singly.ReadBatch(0)
	if err != nil {
		return nil, from, err
	}
	return datagrams, senders[0], nil
}

// WriteBatch implements AppConn.
func (s *appSingly) WriteBatch(datagrams [][]byte, to netip.AddrPort) (sent int, err error) {
	for _, b := range datagrams {
		if _, failed := s.conn.WriteToUDPAddrPort(b, to); failed != nil {
			err = failed
		} else {
			sent++
		}
	}
	return sent, err
}
