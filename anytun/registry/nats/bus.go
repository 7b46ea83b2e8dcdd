package nats

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/anytun-go/anytun/anytun/registry"
)

// What goes over a bus subject is sealed with the subject as context:
//
//	number(8) | message
//
// Numbers of one server begin at 1 and grow by one per message.

// maxRecords bounds a message: 60 KB of Locations.
const maxRecords = 1000

// sender is sendLoop's.
type sender struct {
	bus           *Bus
	subject       string
	number        uint64
	plain, sealed []byte
	locations     []registry.Location
	seen          []registry.Seen
	mappings      []registry.Mapping
}

// sendLoop publishes what the Outbox holds, and says hello. While disconnected it
// lets the Outbox gather.
func (b *Bus) sendLoop(ctx context.Context) {
	s := sender{bus: b, subject: b.subject("bus")}
	hello := time.NewTimer(0)
	defer hello.Stop()
	for {
		select {
		case <-ctx.Done():
			s.flush() // a goodbye that was put just now still goes out, if it can
			_ = b.conn.FlushTimeout(time.Second)
			return
		case <-hello.C:
			s.hello()
			hello.Reset(b.helloInterval - time.Duration(rand.Int64N(int64(b.helloInterval/4))))
		case <-b.helloNow:
			s.hello()
		case <-b.reconnected:
			s.flush()
			s.hello()
		case <-b.outbox.Wake():
			s.flush()
		}
	}
}

func (s *sender) hello() {
	b := s.bus
	b.peers.expire(time.Now().Add(-helloFall * b.helloInterval))
	if b.conn.IsConnected() {
		age := min(time.Since(b.started)/time.Second, 1<<32-1)
		_ = s.send(&registry.Message{Type: registry.TypeHello, Hello: registry.Hello{Peer: b.id, Age: uint32(age)}})
	}
}

// flush empties the Outbox if it can.
func (s *sender) flush() {
	if s.bus.conn.IsConnected() {
		s.publish()
	}
}

// publish empties the Outbox. What the connection refuses goes back, where the
// newest wins, until the connection comes back (reconnected).
func (s *sender) publish() {
	b := s.bus
	s.locations, s.seen, s.mappings = b.outbox.Take(s.locations[:0], s.seen[:0], s.mappings[:0])
	ok := true
	eachChunk(s.locations, func(part []registry.Location) {
		if ok = ok && s.send(&registry.Message{Type: registry.TypeLocation, Locations: part}); !ok {
			for _, l := range part {
				b.outbox.Location(l)
			}
		}
	})
	eachChunk(s.seen, func(part []registry.Seen) {
		if ok = ok && s.send(&registry.Message{Type: registry.TypeSeen, Seen: part}); !ok {
			b.outbox.Seen(part)
		}
	})
	eachChunk(s.mappings, func(part []registry.Mapping) {
		if ok = ok && s.send(&registry.Message{Type: registry.TypeMapping, Mappings: part}); !ok {
			for _, m := range part {
				b.outbox.Mapping(m)
			}
		}
	})
}

func eachChunk[T any](all []T, f func([]T)) {
	for len(all) > 0 {
		n := min(len(all), maxRecords)
		f(all[:n])
		all = all[n:]
	}
}

func (s *sender) send(m *registry.Message) bool {
	s.plain = binary.BigEndian.AppendUint64(s.plain[:0], s.number+1)
	s.plain = m.Append(s.plain)
	s.sealed = s.bus.sealer.Seal(s.sealed[:0], s.plain, s.subject, time.Now())
	if err := s.bus.conn.Publish(s.subject, s.sealed); err != nil {
		if s.bus.conn.IsConnected() { // and else it comes again
			s.bus.counters.Drop(registry.DropSend, m.Records())
			return true
		}
		return false
	}
	s.number++
	s.bus.counters.Sent(m.Type, m.Records(), len(s.sealed))
	return true
}

// busLoop receives what the other servers publish.
func (b *Bus) busLoop(ctx context.Context, sub *nats.Subscription, h registry.Handler) {
	r := receiver{bus: b, handler: h}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		switch {
		case err == nil:
			r.receive(msg.Subject, msg.Data)
		case ctx.Err() != nil:
			return
		case errors.Is(err, nats.ErrSlowConsumer):
			// How many were lost shows in the next one's number.
			b.counters.Drop(registry.DropInbox, 1)
		default:
			wait(ctx, time.Second)
		}
	}
}

// receiver is busLoop's.
type receiver struct {
	bus     *Bus
	handler registry.Handler
	plain   []byte
	message registry.Message
}

func (r *receiver) receive(subject string, data []byte) {
	b := r.bus
	from, err := strconv.ParseUint(subject[strings.LastIndexByte(subject, '.')+1:], 16, 64)
	if err != nil {
		b.counters.Drop(registry.DropForged, 1)
		return
	}
	if from == b.id {
		return // our own, by a bridge that doesn't know NoEcho
	}
	plain, err := b.sealer.OpenFresh(r.plain[:0], data, subject, time.Now())
	if err != nil {
		b.counters.Drop(dropReason(err), 1)
		return
	}
	r.plain = plain
	if len(plain) < 8 || r.message.Parse(plain[8:]) != nil {
		b.counters.Drop(registry.DropMalformed, 1)
		return
	}
	m := &r.message
	switch b.peers.heard(from, binary.BigEndian.Uint64(plain), m, time.Now()) {
	case peerNew:
		b.wanted.from(from, true)
		poke(b.helloNow)
	case peerGap:
		b.wanted.from(from, false)
	case peerReplay:
		b.counters.Drop(registry.DropStale, 1)
		return
	case peerTooMany:
		b.counters.Drop(registry.DropInbox, m.Records())
		return
	case peerKnown:
	}
	b.counters.Received(m.Type, m.Records(), len(data))
	m.Deliver(r.handler)
}

func dropReason(err error) registry.Drop {
	if errors.Is(err, registry.ErrStale) {
		return registry.DropStale
	}
	return registry.DropForged
}

// wait returns false if ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
