package server

import (
	"encoding/binary"
	"errors"
	"net"

	"github.com/anytun-go/anytun/anytun/wire"
)

// The road out, all of it inline in the caller's goroutine (the egress's
// netstack, or receiveLoop for packets between clients):
//
//	output      whose packet: by the inner destination, a run at a time
//	seal        in place, between the headroom and the tailroom
//	WriteBatch  to where the client was last heard, from the address it asked

// output sends inner packets to the clients they are for. Every element of bufs
// is wire.DataHeaderLen + packet + wire.TagLen bytes long and is overwritten.
// Safe for concurrent use.
func (s *Server) output(bufs [][]byte) {
	for len(bufs) > 0 {
		client, ok := s.clientOf(bufs[0])
		n := 1
		for n < len(bufs) {
			if !sameDestination(inside(bufs[n-1]), inside(bufs[n])) {
				if c, o := s.clientOf(bufs[n]); c != client || o != ok {
					break
				}
			}
			n++
		}
		if !ok {
			s.counters.drops[DropNoRoute].Add(uint64(n))
		} else if w := s.pathTo(client); w == nil {
			s.counters.drops[DropOffline].Add(uint64(n))
		} else {
			s.send(w, bufs[:n])
		}
		bufs = bufs[n:]
	}
}

// sameDestination says whether q, too, goes where p does. Whatever is wrong with p
// must be wrong with q.
func sameDestination(p, q []byte) bool {
	if len(p) < 20 || len(q) < 20 || p[0] != q[0] {
		return false
	}
	switch p[0] >> 4 {
	case 4:
		return int(binary.BigEndian.Uint16(p[2:])) == len(p) && int(binary.BigEndian.Uint16(q[2:])) == len(q) &&
			int(p[0]&15)*4 <= min(len(p), len(q)) && [4]byte(p[16:]) == [4]byte(q[16:])
	case 6:
		return len(p) >= 40 && len(q) >= 40 && int(binary.BigEndian.Uint16(p[4:]))+40 == len(p) &&
			int(binary.BigEndian.Uint16(q[4:]))+40 == len(q) && [16]byte(p[24:]) == [16]byte(q[24:])
	}
	return false
}

func (s *Server) clientOf(buf []byte) (client uint32, ok bool) {
	_, dst, ok := addresses(inside(buf))
	if !ok {
		return 0, false
	}
	return s.inner.Client(dst)
}

func (s *Server) send(w *path, bufs [][]byte) {
	var n uint64
	for _, b := range bufs {
		n += uint64(len(b) - wire.Overhead)
	}
	w.Seal(bufs)
	if err := w.conn.WriteBatch(bufs, w.to); err != nil {
		if !errors.Is(err, net.ErrClosed) {
			s.log.Debug("send failed", "error", err)
		}
		s.counters.drops[DropSend].Add(uint64(len(bufs)))
		return
	}
	s.counters.sentPackets.Add(uint64(len(bufs)))
	s.counters.sentBytes.Add(n)
}

// sendControl seals and sends one control message.
func (s *Server) sendControl(w *path, msg []byte) {
	b := make([]byte, wire.DataHeaderLen, wire.Overhead+len(msg))
	b = append(b, msg...)
	s.send(w, [][]byte{b[:cap(b)]})
}
