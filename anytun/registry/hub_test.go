package registry

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// engine is a Handler that keeps what it hears, like a server.
type engine struct {
	mu        sync.Mutex
	locations map[uint32]Location
	seen      map[uint32]uint64
	mappings  map[Mapping]bool
	claims    map[claimKey]Claim
	calls     int
	block     chan struct{} // not nil: Location waits for it
}

func newEngine() *engine {
	return &engine{
		locations: map[uint32]Location{}, seen: map[uint32]uint64{},
		mappings: map[Mapping]bool{}, claims: map[claimKey]Claim{},
	}
}

func (e *engine) Location(l Location) {
	if e.block != nil {
		<-e.block
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls++
	if old, ok := e.locations[l.Client]; !ok || l.Newer(old) {
		e.locations[l.Client] = l
	}
}

func (e *engine) Seen(seen []Seen) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range seen {
		e.seen[s.Client] = max(e.seen[s.Client], s.Counter)
	}
}

func (e *engine) Mapping(m Mapping) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mappings[m] = true
}

func (e *engine) Claimed(c Claim) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.claims[claimKey{c.Kind, c.Index}] = c
}

func (e *engine) Released(c Claim) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.claims, claimKey{c.Kind, c.Index})
}

func (e *engine) Snapshot(yield func(Location) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.locations {
		if !yield(l) {
			return
		}
	}
}

func (e *engine) Mappings(yield func(Mapping) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for m := range e.mappings {
		if !yield(m) {
			return
		}
	}
}

func (e *engine) at(client uint32) Location {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.locations[client]
}

func location(client uint32, counter uint64, server uint16) Location {
	return Location{
		Client: client, Session: uint64(client) << 32, Epoch: 7, Counter: counter, Server: server,
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(client)}), uint16(counter)),
		Local:    netip.MustParseAddrPort("203.0.113.1:4444"),
	}
}

// run starts a server in the bubble, which ends it.
func run(t *testing.T, r Registry, h Handler) {
	t.Helper()
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- r.Run(ctx, h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) && !errors.Is(err, ErrClosed) {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestHubCarries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := NewHub()
		a, b, c := hub.Join("a"), hub.Join("b"), hub.Join("c")
		ea, eb, ec := newEngine(), newEngine(), newEngine()
		run(t, a, ea)
		run(t, b, eb)
		synctest.Wait()
		hub.Delay(50 * time.Millisecond)
		a.PublishLocation(location(1, 5, 1))
		a.PublishSeen([]Seen{{1, 6}, {2, 9}})
		a.PublishMapping(Mapping{Client: 1, Protocol: 6, Inner: 80, Public: 2000, Since: 3})
		time.Sleep(49 * time.Millisecond)
		synctest.Wait()
		if eb.at(1) != (Location{}) {
			t.Error("a message was faster than the delay")
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if eb.at(1) != location(1, 5, 1) || eb.seen[1] != 6 || eb.seen[2] != 9 || len(eb.mappings) != 1 {
			t.Errorf("b knows %+v %v %v", eb.locations, eb.seen, eb.mappings)
		}
		if ea.calls != 0 {
			t.Error("a heard itself")
		}

		// One that starts later gets the whole from either.
		run(t, c, ec)
		synctest.Wait()
		if ec.at(1) != location(1, 5, 1) || len(ec.mappings) != 1 {
			t.Errorf("c started with %+v %v", ec.locations, ec.mappings)
		}
		if s := a.Stats(); s.Out[TypeLocation].Records != 1 || s.Out[TypeLocation].Bytes != 1+LocationSize+SealOverhead || s.Peers != 2 {
			t.Errorf("a counted %+v", s)
		}
		if s := b.Stats(); s.In[TypeSeen].Records != 2 || s.In[TypeMapping].Records != 1 {
			t.Errorf("b counted %+v", s)
		}
	})
}

func TestHubPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := NewHub()
		a, b := hub.Join("a"), hub.Join("b")
		ea, eb := newEngine(), newEngine()
		run(t, a, ea)
		run(t, b, eb)
		synctest.Wait()
		hub.Partition("b", true)
		for counter := range uint64(100) {
			b.PublishLocation(location(1, counter, 2))
		}
		b.PublishLocation(location(1, 50, 2)) // late, and older
		ea.Location(location(3, 1, 1))        // a knows it, and doesn't say so again
		a.PublishLocation(location(2, 1, 1))
		ea.Location(location(2, 1, 1)) // as the server that publishes it does
		synctest.Wait()
		if len(ea.locations) != 2 || len(eb.locations) != 0 {
			t.Fatalf("through the partition: %v %v", ea.locations, eb.locations)
		}
		if err := b.Ready(); !errors.Is(err, ErrUnavailable) {
			t.Errorf("b is ready: %v", err)
		}
		if _, err := b.Claim(t.Context(), Claim{Kind: ClaimServer, Index: 1, Owner: 1, Until: time.Now().Add(time.Hour)}); !errors.Is(err, ErrUnavailable) {
			t.Errorf("claim behind a partition: %v", err)
		}
		if n := b.Stats().Pending; n != 1 {
			t.Errorf("%d wait, want the newest alone", n)
		}
		hub.Partition("b", false)
		synctest.Wait()
		if ea.at(1) != location(1, 99, 2) || eb.at(2) != location(2, 1, 1) || eb.at(3) != location(3, 1, 1) {
			t.Errorf("afterwards a knows %v, b %v", ea.locations, eb.locations)
		}
		if err := b.Ready(); err != nil {
			t.Error(err)
		}
		if s := b.Stats(); s.Reconnects != 1 || s.Snapshots == 0 {
			t.Errorf("b counted %+v", s)
		}
	})
}

func TestClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := NewHub()
		a, b := hub.Join("a"), hub.Join("b")
		ea, eb := newEngine(), newEngine()
		run(t, a, ea)
		run(t, b, eb)
		synctest.Wait()
		ctx := t.Context()
		mine := Claim{Kind: ClaimBlock, Index: 9, Owner: 1, Until: time.Now().Add(time.Minute)}
		theirs := mine
		theirs.Owner = 2
		if got, err := a.Claim(ctx, mine); err != nil || got != mineRound(mine) {
			t.Fatal(got, err)
		}
		if got, err := b.Claim(ctx, theirs); !errors.Is(err, ErrTaken) || got.Owner != 1 {
			t.Error(got, err)
		}
		mine.Until = mine.Until.Add(time.Minute)
		if got, err := b.Claim(ctx, mine); err != nil || got != mineRound(mine) {
			t.Error("renewal through another server:", got, err)
		}
		synctest.Wait()
		key := claimKey{ClaimBlock, 9}
		if ea.claims[key].Owner != 1 || !eb.claims[key].Until.Equal(mine.Until) {
			t.Errorf("told %v %v", ea.claims, eb.claims)
		}
		if err := b.Release(ctx, theirs); !errors.Is(err, ErrTaken) {
			t.Error("released another's:", err)
		}
		time.Sleep(3 * time.Minute)
		theirs.Until = time.Now().Add(time.Minute)
		if got, err := b.Claim(ctx, theirs); err != nil || got.Owner != 2 {
			t.Error("take over after the end:", got, err)
		}
		if err := b.Release(ctx, theirs); err != nil {
			t.Error(err)
		}
		if err := b.Release(ctx, theirs); err != nil {
			t.Error("twice:", err)
		}
		synctest.Wait()
		if len(ea.claims) != 0 || len(eb.claims) != 0 {
			t.Errorf("released, and still told %v %v", ea.claims, eb.claims)
		}
		for _, bad := range []Claim{
			{Kind: 3, Index: 1, Owner: 1, Until: time.Now().Add(time.Minute)},
			{Kind: ClaimBlock, Index: 1, Owner: 1, Until: time.Now()},
			{Kind: ClaimBlock, Index: 1, Owner: 1, Until: time.Now().Add(MaxClaim + 1)},
		} {
			if _, err := a.Claim(ctx, bad); err == nil || errors.Is(err, ErrTaken) {
				t.Errorf("%+v: %v", bad, err)
			}
		}
		// What stands is told to one that starts.
		if _, err := a.Claim(ctx, Claim{Kind: ClaimServer, Index: 4, Owner: 77, Until: time.Now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		ec := newEngine()
		run(t, hub.Join("c"), ec)
		synctest.Wait()
		if len(ec.claims) != 1 || ec.claims[claimKey{ClaimServer, 4}].Owner != 77 {
			t.Errorf("c was told %v", ec.claims)
		}
	})
}

func mineRound(c Claim) Claim { c.Until = c.Until.Round(0); return c }

// A handler that hangs costs its own server, and what it missed comes later.
func TestHubNeverWaits(t *testing.T) {
	hub := NewHub()
	a, b := hub.Join("a"), hub.Join("b")
	ea, eb := newEngine(), newEngine()
	eb.block = make(chan struct{})
	run(t, a, ea)
	run(t, b, eb)
	waitFor(t, "two servers", func() bool { return a.Stats().Peers == 1 && b.Stats().Peers == 1 })
	const clients = inboxSize + 1000
	for c := range uint32(clients) {
		ea.Location(location(c, 1, 1))
		a.PublishLocation(location(c, 1, 1))
	}
	if b.Stats().Drops[DropInbox] == 0 {
		t.Error("nothing dropped: the inbox has no bound")
	}
	close(eb.block)
	waitFor(t, "all of it", func() bool { eb.mu.Lock(); defer eb.mu.Unlock(); return len(eb.locations) == clients })
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("never:", what)
		}
	}
}

func TestMemory(t *testing.T) {
	r := NewMemory()
	e := newEngine()
	done := make(chan error, 1)
	go func() { done <- r.Run(t.Context(), e) }()
	r.PublishLocation(location(1, 1, 1))
	if _, err := r.Claim(t.Context(), Claim{Kind: ClaimServer, Index: 1, Owner: 1, Until: time.Now().Add(time.Hour)}); err != nil {
		t.Error(err)
	}
	if s := r.Stats(); s.Pending != 0 || s.Out[TypeLocation].Bytes != 0 || r.Ready() != nil {
		t.Errorf("%+v, ready %v", s, r.Ready())
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("Run ended with %v", err)
	}
	if _, err := r.Claim(t.Context(), Claim{Kind: ClaimServer, Index: 1, Owner: 1, Until: time.Now().Add(time.Hour)}); !errors.Is(err, ErrClosed) {
		t.Error("claim after the end:", err)
	}
	r.PublishLocation(location(1, 1, 1))
}

func TestOutbox(t *testing.T) {
	var counters Counters
	o := NewOutbox(&counters)
	o.Location(location(1, 3, 1))
	o.Location(location(1, 2, 1))
	o.Location(location(1, 5, 2))
	o.Seen([]Seen{{1, 4}, {1, 2}, {2, 0}})
	o.Mapping(Mapping{Client: 1})
	o.Mapping(Mapping{Client: 1})
	<-o.Wake()
	ls, seen, ms := o.Take(nil, nil, nil)
	slices.SortFunc(seen, func(a, b Seen) int { return int(a.Client) - int(b.Client) })
	if len(ls) != 1 || ls[0] != location(1, 5, 2) || !slices.Equal(seen, []Seen{{1, 4}, {2, 0}}) || len(ms) != 2 || o.Len() != 0 {
		t.Error(ls, seen, ms, o.Len())
	}
	for c := range uint32(maxLocations + 10) {
		o.Location(location(c, 1, 1))
		o.Seen([]Seen{{c, 1}})
		o.Mapping(Mapping{Client: c})
	}
	o.Location(location(3, 9, 1)) // one that waits is renewed even when full
	s := counters.Stats()
	if s.Drops[DropLocations] != 10 || s.Drops[DropSeen] != 10 || s.Drops[DropMappings] != 10 || o.Len() != maxLocations+maxSeen+maxMappings {
		t.Errorf("%d wait, drops %v", o.Len(), s.Drops)
	}
	ls, _, _ = o.Take(nil, nil, nil)
	if !slices.Contains(ls, location(3, 9, 1)) {
		t.Error("a full box refused the newer one of its own")
	}
}

func BenchmarkHubLocation(b *testing.B) {
	hub := NewHub()
	var members [3]Registry
	ctx, cancel := context.WithCancel(b.Context())
	var group sync.WaitGroup
	for i := range members {
		members[i] = hub.Join("")
		group.Go(func() { _ = members[i].Run(ctx, newEngine()) })
	}
	counter := uint64(0)
	for b.Loop() {
		counter++
		members[0].PublishLocation(location(uint32(counter%1000), counter, 1))
	}
	cancel()
	group.Wait()
}

func BenchmarkOutbox(b *testing.B) {
	var counters Counters
	o := NewOutbox(&counters)
	l := location(1, 1, 1)
	for b.Loop() {
		l.Counter++
		l.Client = uint32(l.Counter % 1000)
		o.Location(l)
	}
}
