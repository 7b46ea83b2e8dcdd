package server

import (
	"sync"
	"time"

	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/wire"
)

// rejectRate and rejectBurst bound the ICMP errors a server sends, as RFC 4443
// section 2.4 (f) asks: per second, and at once.
const rejectRate, rejectBurst = 1000, 1000

// rejecter tells clients at once what would else be a timeout: that an inner
// address can't be reached.
type rejecter struct {
	mu     sync.Mutex // guards bucket
	bucket session.Bucket
}

func (r *rejecter) allow(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bucket.Take(now, rejectRate, rejectBurst)
}

// reject answers an inner packet of a client with an ICMP error from the
// servers' own address. It is called without locks; p is only read.
func (s *Server) reject(to *path, p []byte, kind packet.ErrorKind, now time.Time) {
	var v packet.View
	if v.Parse(p) != packet.OK || !s.rejecter.allow(now) {
		return
	}
	from := s.inner.IPv4(session.Gateway)
	if v.Version == 6 {
		from = s.inner.IPv6(session.Gateway)
	}
	b, ok := v.AppendError(make([]byte, wire.DataHeaderLen, wire.MinMTU+wire.Overhead), from, kind, 0)
	if !ok {
		return
	}
	s.counters.rejected.Add(1)
	s.send(to, [][]byte{append(b, make([]byte, wire.TagLen)...)})
}
