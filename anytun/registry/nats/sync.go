package nats

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/anytun-go/anytun/anytun/registry"
)

// A snapshot:
//
//	asker                                             answerer
//	ask.ID, reply to INBOX: Ask or AskOwn  ───────→
//	                                       ←───────   INBOX: Locations   each sealed, with INBOX as context,
//	(nothing)                              ───────→                      and each waits for the one before
//	                                       ←───────   INBOX: Mappings    to be acknowledged
//	                                       ←───────   INBOX: Done
//
// The ask is sealed with its subject and INBOX as context, so a recorded one
// sends nothing elsewhere.

// chunkRecords bounds a message of a snapshot: 240 KB, within the 1 MB that NATS
// servers take.
const chunkRecords = 4000

var errNoAnswer = errors.New("no answer")

// syncLoop fetches what this server missed, one thing after the other.
func (b *Bus) syncLoop(ctx context.Context, h registry.Handler) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.wanted.wake:
		}
		if !wait(ctx, syncDelay) { // more of them appear together
			return
		}
		all, own := b.wanted.take(b.peers.count())
		if all {
			if done, id := b.fetchAll(ctx, h); done {
				delete(own, id)
			} else if b.peers.count() > 0 {
				b.wanted.everything()
			} // else whoever appears is a majority
		}
		for id := range own {
			if err := b.fetch(ctx, h, id, registry.TypeAskOwn); err != nil && b.peers.has(id) && ctx.Err() == nil {
				b.wanted.from(id, false)
			}
		}
	}
}

// fetchAll asks servers for everything until one answers.
func (b *Bus) fetchAll(ctx context.Context, h registry.Handler) (done bool, from uint64) {
	tried := make(map[uint64]bool)
	for len(tried) < 5 && ctx.Err() == nil {
		id, ok := b.peers.best(tried, time.Now())
		if !ok || tried[id] {
			return false, 0
		}
		tried[id] = true
		if err := b.fetch(ctx, h, id, registry.TypeAsk); err == nil {
			return true, id
		}
	}
	return false, 0
}

// fetch asks one server and hands its answer to h.
func (b *Bus) fetch(ctx context.Context, h registry.Handler, id uint64, what registry.Type) error {
	records, err := b.fetchFrom(ctx, h, id, what)
	if err != nil {
		b.logger.Debug("no registry snapshot", "server", fmt.Sprintf("%016x", id), "error", err)
		return err
	}
	b.counters.Snapshot()
	b.logger.Debug("registry snapshot", "server", fmt.Sprintf("%016x", id), "kind", what.String(), "records", records)
	return nil
}

func (b *Bus) fetchFrom(ctx context.Context, h registry.Handler, id uint64, what registry.Type) (records int, err error) {
	inbox := b.conn.NewInbox()
	subs, err := b.subscribe(inbox)
	if err != nil {
		return 0, err
	}
	sub := subs[0]
	defer func() { _ = sub.Unsubscribe() }()
	subject := b.peerSubject("ask", id)
	ask := registry.Message{Type: what}
	sealed := b.sealer.Seal(nil, ask.Append(nil), askContext(subject, inbox), time.Now())
	if err := b.conn.PublishRequest(subject, inbox, sealed); err != nil {
		return 0, err
	}
	b.counters.Sent(what, 0, len(sealed))

	var plain []byte
	var m registry.Message
	for {
		msg, err := b.nextStep(ctx, sub)
		if err != nil {
			return records, err
		}
		plain, err = b.sealer.OpenFresh(plain[:0], msg.Data, inbox, time.Now())
		if err != nil {
			if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" { // nobody has that subject
				return records, errNoAnswer
			}
			b.counters.Drop(dropReason(err), 1)
			continue
		}
		if m.Parse(plain) != nil {
			b.counters.Drop(registry.DropMalformed, 1)
			continue
		}
		b.counters.Received(registry.TypeDone, m.Records(), len(msg.Data))
		if m.Type == registry.TypeDone {
			return records, nil
		}
		records += m.Records()
		m.Deliver(h)
		if err := b.conn.Publish(msg.Reply, nil); err != nil {
			return records, err
		}
	}
}

func askContext(subject, inbox string) string { return subject + " " + inbox }

func (b *Bus) nextStep(ctx context.Context, sub *nats.Subscription) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, b.stepTimeout)
	defer cancel()
	return sub.NextMsgWithContext(ctx)
}

// answerLoop gives snapshots, one after the other.
func (b *Bus) answerLoop(ctx context.Context, sub *nats.Subscription, h registry.Handler) {
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		switch {
		case err == nil:
			b.answer(ctx, msg, h)
		case ctx.Err() != nil:
			return
		default:
			wait(ctx, time.Second)
		}
	}
}

func (b *Bus) answer(ctx context.Context, msg *nats.Msg, h registry.Handler) {
	plain, asked, err := b.sealer.Open(nil, msg.Data, askContext(msg.Subject, msg.Reply))
	if err != nil {
		b.counters.Drop(registry.DropForged, 1)
		return
	}
	if time.Since(asked).Abs() > registry.Fresh {
		b.counters.Drop(registry.DropStale, 1)
		return
	}
	var m registry.Message
	if m.Parse(plain) != nil || m.Type != registry.TypeAsk && m.Type != registry.TypeAskOwn {
		b.counters.Drop(registry.DropMalformed, 1)
		return
	}
	b.counters.Received(m.Type, 0, len(msg.Data))
	if !strings.HasPrefix(msg.Reply, "_INBOX.") {
		b.counters.Drop(registry.DropMalformed, 1)
		return
	}
	for _, c := range b.snapshot(h, m.Type == registry.TypeAskOwn) {
		sealed := b.sealer.Seal(nil, c.plain, msg.Reply, time.Now())
		if c.last {
			if b.conn.Publish(msg.Reply, sealed) == nil {
				b.counters.Sent(registry.TypeDone, 0, len(sealed))
			}
			return
		}
		step, cancel := context.WithTimeout(ctx, b.stepTimeout)
		_, err := b.conn.RequestWithContext(step, msg.Reply, sealed)
		cancel()
		if err != nil {
			b.logger.Debug("registry snapshot not taken", "error", err)
			return
		}
		b.counters.Sent(registry.TypeDone, c.records, len(sealed))
	}
}

type chunk struct {
	plain   []byte
	records int
	last    bool
}

// snapshot encodes what this server knows, or what it heard itself. All at once,
// 60 bytes a client, so that the handler's locks don't wait for the network.
func (b *Bus) snapshot(h registry.Handler, own bool) (chunks []chunk) {
	server := uint16(b.server.Load())
	add := func(m *registry.Message) {
		if n := m.Records(); n > 0 {
			chunks = append(chunks, chunk{plain: m.Append(nil), records: n})
		}
		m.Locations, m.Mappings = m.Locations[:0], m.Mappings[:0]
	}
	m := registry.Message{Type: registry.TypeLocation}
	if !own || server != 0 {
		h.Snapshot(func(l registry.Location) bool {
			if own && l.Server != server {
				return true
			}
			if m.Locations = append(m.Locations, l); len(m.Locations) == chunkRecords {
				add(&m)
			}
			return true
		})
	}
	add(&m)
	m.Type = registry.TypeMapping
	mapping := func(p registry.Mapping) bool {
		if m.Mappings = append(m.Mappings, p); len(m.Mappings) == chunkRecords {
			add(&m)
		}
		return true
	}
	if own {
		b.recent.each(mapping)
	} else {
		h.Mappings(mapping)
	}
	add(&m)
	done := registry.Message{Type: registry.TypeDone}
	return append(chunks, chunk{plain: done.Append(nil), last: true})
}
