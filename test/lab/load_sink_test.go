//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
)

// A sink is the load's far end: it checks what comes up, writes what goes down
// and sends the rest back, over TCP and UDP.
type sink struct {
	listener *net.TCPListener
	packets  *net.UDPConn
	wg       sync.WaitGroup

	mu      sync.Mutex
	streams map[streamKey]*sinkStream
	order   []*sinkStream
	strange int // connections that didn't begin with a header
}

type streamKey struct {
	seed uint64
	id   uint32
}

type sinkStream struct {
	header
	from  netip.AddrPort
	conn  *net.TCPConn
	meter meter
	mu    sync.Mutex
	err   error
}

// newSink listens on one address, port for port.
func newSink(at netip.AddrPort) (*sink, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	p, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at.Addr(), l.Addr().(*net.TCPAddr).AddrPort().Port())))
	if err != nil {
		l.Close()
		return nil, err
	}
	s := &sink{listener: l, packets: p, streams: make(map[streamKey]*sinkStream)}
	s.wg.Go(s.acceptLoop)
	s.wg.Go(s.packetLoop)
	return s, nil
}

func (s *sink) address() netip.AddrPort { return s.listener.Addr().(*net.TCPAddr).AddrPort() }

// close ends all connections and waits.
func (s *sink) close() {
	s.listener.Close()
	s.packets.Close()
	s.mu.Lock()
	for _, st := range s.order {
		st.conn.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// packetLoop sends datagrams back to where they come from.
func (s *sink) packetLoop() {
	b := make([]byte, 1<<16)
	for {
		n, from, err := s.packets.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = s.packets.WriteToUDPAddrPort(b[:n], from) // a lost answer is a lost datagram
		}
	}
}

func (s *sink) acceptLoop() {
	for {
		c, err := s.listener.AcceptTCP()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.serve(c) })
	}
}

func (s *sink) serve(c *net.TCPConn) {
	defer c.Close()
	h, err := readHeader(c)
	if err != nil {
		s.mu.Lock()
		s.strange++
		s.mu.Unlock()
		return
	}
	st := &sinkStream{header: h, conn: c, from: c.RemoteAddr().(*net.TCPAddr).AddrPort()}
	key := streamKey{h.seed, h.id}
	s.mu.Lock()
	if s.streams[key] != nil {
		s.strange++
		s.mu.Unlock()
		return
	}
	s.streams[key] = st
	s.order = append(s.order, st)
	s.mu.Unlock()
	err = st.serve()
	st.mu.Lock()
	st.err = err
	st.mu.Unlock()
	if err != nil {
		_ = c.SetLinger(0) // reset: the load must see it at once
	}
}

func (s *sinkStream) serve() error {
	switch s.kind {
	case kindUp:
		n, err := take(s.conn, s.tape(), &s.meter, true)
		if err != nil {
			return err
		}
		_, err = s.conn.Write(trailer(n))
		return err
	case kindDown:
		return s.serveDown()
	}
	return s.sendBack()
}

// serveDown writes until the load has finished its side.
func (s *sinkStream) serveDown() error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		n, err := s.conn.Read(make([]byte, 1))
		if n > 0 {
			err = wrong("a byte came up a stream that only goes down")
		} else if errors.Is(err, io.EOF) {
			err = nil
		}
		if err != nil {
			s.conn.Close() // its writer may be blocked
		}
		cancel(err)
	})
	sent, err := pace(countingWriter{s.conn, &s.meter}, s.header, ctx.Done())
	if err == nil && errors.Is(context.Cause(ctx), context.Canceled) { // the load has finished, no error
		_, err = s.conn.Write(trailer(sent))
	}
	if err != nil {
		s.conn.Close() // ends the reader
	}
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// sendBack returns what it gets after checking it.
func (s *sinkStream) sendBack() error {
	b, at := make([]byte, messageLen), uint64(0)
	for {
		n, err := s.conn.Read(b)
		if n > 0 {
			if i := s.tape().check(b[:n], at); i >= 0 {
				return wrong(fmt.Sprintf("another byte at position %d", at+uint64(i)))
			}
			at += uint64(n)
			s.meter.add(n, false)
			if _, err := s.conn.Write(b[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// mark begins a new measurement on every stream.
func (s *sink) mark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.order {
		st.meter.mark()
	}
}

// report says how every stream is doing.
func (s *sink) report() []streamReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]streamReport, 0, len(s.order)+s.strange)
	for _, st := range s.order {
		r := streamReport{ID: st.id, Kind: kindNames[st.kind], From: st.from.Addr().Unmap().String()}
		r.Bytes, r.Stall = st.meter.read()
		st.mu.Lock()
		if st.err != nil {
			r.Error = st.err.Error()
		}
		st.mu.Unlock()
		out = append(out, r)
	}
	for range s.strange {
		out = append(out, streamReport{Error: "corrupt: a connection that begins with no header, or another's"})
	}
	return out
}
