package nats

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/anytun-go/anytun/anytun/registry"
)

// A claim is a key of the bucket, block.INDEX or server.INDEX, whose value is the
// sealed Claim with the key as context. Revisions decide between two that write
// at once. A claim ends by the clock (Until), not by deletion, so the clocks of
// servers that claim should agree to within a few seconds; callers renew well
// before the end.

const (
	claimReplicas = 3
	// claimMemory is how long the bucket keeps what nobody touches.
	claimMemory  = 2 * registry.MaxClaim
	claimRetries = 8
)

func claimKey(c registry.Claim) string {
	return c.Kind.String() + "." + strconv.FormatUint(uint64(c.Index), 10)
}

// Claim implements registry.Registry.
func (b *Bus) Claim(ctx context.Context, c registry.Claim) (got registry.Claim, err error) {
	if err := c.Check(time.Now()); err != nil {
		return got, err
	}
	c.Until = c.Until.Round(0)
	err = b.decide(ctx, func(ctx context.Context, kv jetstream.KeyValue) error {
		key := claimKey(c)
		old, revision, err := b.read(ctx, kv, key)
		if err != nil {
			return err
		}
		if old != nil && old.Owner != c.Owner && old.Until.After(time.Now()) {
			got = *old
			return registry.ErrTaken
		}
		if err := c.Check(time.Now()); err != nil { // it took us too long
			return err
		}
		message := registry.Message{Type: registry.TypeClaim, Claims: []registry.Claim{c}}
		value := b.sealer.Seal(nil, message.Append(nil), key, time.Now())
		if revision == 0 {
			_, err = kv.Create(ctx, key, value)
		} else {
			_, err = kv.Update(ctx, key, value, revision)
		}
		if err == nil {
			got = c
			b.counters.Sent(registry.TypeClaim, 1, len(value))
		}
		return err
	})
	return got, err
}

// Release implements registry.Registry.
func (b *Bus) Release(ctx context.Context, c registry.Claim) error {
	return b.decide(ctx, func(ctx context.Context, kv jetstream.KeyValue) error {
		key := claimKey(c)
		old, revision, err := b.read(ctx, kv, key)
		switch {
		case err != nil || old == nil || !old.Until.After(time.Now()):
			return err
		case old.Owner != c.Owner:
			return registry.ErrTaken
		}
		if err := kv.Delete(ctx, key, jetstream.LastRevision(revision)); err != nil {
			return err
		}
		b.counters.Sent(registry.TypeRelease, 1, 0)
		return nil
	})
}

// decide runs try, again if somebody else wrote at the same moment, and turns
// what isn't a decision into ErrUnavailable.
func (b *Bus) decide(ctx context.Context, try func(context.Context, jetstream.KeyValue) error) error {
	b.mu.Lock()
	closed := b.closed
	b.mu.Unlock()
	if closed {
		return registry.ErrClosed
	}
	if !b.conn.IsConnected() {
		return registry.ErrUnavailable
	}
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	kv, err := b.openBucket(ctx)
	for range claimRetries {
		if err != nil {
			break
		}
		err = try(ctx, kv)
		if err == nil || errors.Is(err, registry.ErrTaken) {
			return err
		}
		var api *jetstream.APIError
		if errors.Is(err, jetstream.ErrKeyExists) || errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
			err = nil
			continue
		}
	}
	if err == nil {
		err = errors.New("others keep writing")
	}
	b.forgetBucket(ctx, err)
	return fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
}

// read returns the claim of a key and its revision; nil and the revision if what
// stands there isn't one of ours, nil and 0 if nothing does.
func (b *Bus) read(ctx context.Context, kv jetstream.KeyValue, key string) (*registry.Claim, uint64, error) {
	entry, err := kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) { // or deleted: Create looks after that
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	return b.parseClaim(key, entry.Value()), entry.Revision(), nil
}

func (b *Bus) parseClaim(key string, value []byte) *registry.Claim {
	plain, _, err := b.sealer.Open(nil, value, key)
	if err != nil {
		b.counters.Drop(registry.DropForged, 1)
		return nil
	}
	var m registry.Message
	if m.Parse(plain) != nil || m.Type != registry.TypeClaim || len(m.Claims) != 1 {
		b.counters.Drop(registry.DropMalformed, 1)
		return nil
	}
	return &m.Claims[0]
}

// openBucket finds or makes the bucket.
func (b *Bus) openBucket(ctx context.Context) (jetstream.KeyValue, error) {
	select {
	case b.bucketTurn <- struct{}{}:
		defer func() { <-b.bucketTurn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if b.kv != nil {
		return b.kv, nil
	}
	kv, err := b.js.KeyValue(ctx, b.bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		if err = b.makeBucket(ctx); err == nil {
			kv, err = b.js.KeyValue(ctx, b.bucket)
		}
	}
	if err != nil {
		return nil, err
	}
	b.kv = kv
	return kv, nil
}

// forgetBucket makes the next Claim look for the bucket anew, unless it is only
// that nobody can decide.
func (b *Bus) forgetBucket(ctx context.Context, why error) {
	if !errors.Is(why, jetstream.ErrStreamNotFound) && !errors.Is(why, jetstream.ErrNoStreamResponse) {
		return
	}
	select {
	case b.bucketTurn <- struct{}{}:
		b.kv = nil
		<-b.bucketTurn
	case <-ctx.Done():
	}
}

// bucketConfig is what a key-value bucket is to JetStream, but for AllowDirect: a
// replica that is behind would say taken to what was just released.
func (b *Bus) bucketConfig(replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: "KV_" + b.bucket, Subjects: []string{"$KV." + b.bucket + ".>"},
		Description: "anytun claims", Storage: jetstream.FileStorage, Replicas: replicas,
		MaxMsgsPerSubject: 1, MaxAge: claimMemory, MaxBytes: maxClaimBytes, MaxMsgs: -1, MaxConsumers: -1, MaxMsgSize: 1024,
		Discard: jetstream.DiscardNew, AllowRollup: true, DenyDelete: true, Duplicates: 2 * time.Minute,
	}
}

// makeBucket makes it on three servers, or on one until there are three: on two
// it would be lost with either.
func (b *Bus) makeBucket(ctx context.Context) error {
	_, err := b.js.CreateStream(ctx, b.bucketConfig(claimReplicas))
	var api *jetstream.APIError
	if errors.As(err, &api) && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		_, err = b.js.CreateStream(ctx, b.bucketConfig(1))
	}
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		return nil
	}
	return err
}

// spread puts the bucket on three servers when there are three, and says whether
// it is.
func (b *Bus) spread(ctx context.Context) bool {
	stream, err := b.js.Stream(ctx, "KV_"+b.bucket)
	if err != nil {
		return false
	}
	if stream.CachedInfo().Config.Replicas >= claimReplicas {
		return true
	}
	if b.peers.count() < claimReplicas-1 {
		return false
	}
	if _, err := b.js.UpdateStream(ctx, b.bucketConfig(claimReplicas)); err != nil {
		b.logger.Debug("claims stay on one server", "error", err)
		return false
	}
	b.logger.Info("claims are on three servers")
	return true
}

// watchLoop tells the handler of claims, from the bucket's whole contents at the
// beginning, after each connection, and now and then.
func (b *Bus) watchLoop(ctx context.Context, h registry.Handler) {
	w := watcher{bus: b, handler: h, known: make(map[string]registry.Claim)}
	for ctx.Err() == nil {
		if err := w.watch(ctx); err != nil && ctx.Err() == nil {
			b.logger.Debug("claims can't be read", "error", err)
			wait(ctx, time.Second)
		}
	}
}

// watcher is watchLoop's.
type watcher struct {
	bus     *Bus
	handler registry.Handler
	known   map[string]registry.Claim // by key: what was told
	spread  bool
}

// watch reads and follows the bucket for one interval.
func (w *watcher) watch(ctx context.Context) error {
	b := w.bus
	ctx, cancel := context.WithTimeout(ctx, b.watchInterval)
	defer cancel()
	opening, opened := context.WithTimeout(ctx, claimTimeout)
	kv, err := b.openBucket(opening)
	opened()
	if err != nil {
		return err
	}
	// The context is for the beginning and for all of it, and whoever was asked
	// to begin may be dead.
	watching, stop := context.WithCancel(ctx)
	defer stop()
	late := time.AfterFunc(claimTimeout, stop)
	entries, err := kv.WatchAll(watching)
	if err != nil {
		return err
	}
	defer func() { _ = entries.Stop() }()
	if !late.Stop() {
		return errNoAnswer
	}
	again := time.NewTicker(10 * time.Second)
	defer again.Stop()
	w.spread = false
	found := make(map[string]bool) // nil when the first reading is done
	for {
		select {
		case entry, ok := <-entries.Updates():
			switch {
			case !ok:
				return errNoAnswer
			case entry != nil:
				if found != nil {
					found[entry.Key()] = true
				}
				w.update(entry)
			case found != nil:
				w.missing(found)
				found = nil
			}
		case <-again.C:
			if found != nil { // a bucket is read in less
				return errNoAnswer
			}
			if !w.spread {
				asking, asked := context.WithTimeout(ctx, claimTimeout)
				w.spread = b.spread(asking)
				asked()
			}
		case <-b.rewatch:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *watcher) update(entry jetstream.KeyValueEntry) {
	b := w.bus
	if entry.Operation() != jetstream.KeyValuePut {
		b.counters.Received(registry.TypeRelease, 1, 0)
		w.released(entry.Key())
		return
	}
	c := b.parseClaim(entry.Key(), entry.Value())
	if c == nil {
		return
	}
	b.counters.Received(registry.TypeClaim, 1, len(entry.Value()))
	w.known[entry.Key()] = *c
	if c.Until.After(time.Now()) {
		w.handler.Claimed(*c)
	}
}

func (w *watcher) released(key string) {
	if c, ok := w.known[key]; ok {
		delete(w.known, key)
		w.handler.Released(c)
	}
}

// missing releases what was told before and isn't in the bucket any more.
func (w *watcher) missing(found map[string]bool) {
	for key := range w.known {
		if !found[key] {
			w.released(key)
		}
	}
}
