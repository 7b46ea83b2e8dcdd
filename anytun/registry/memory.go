package registry

import (
	"context"
	"sync"
	"time"
)

// claims is the arbiter of one process: a table. Its owner guards it.
type claims map[claimKey]Claim

type claimKey struct {
	kind  Kind
	index uint32
}

func (t claims) claim(c Claim, now time.Time) (Claim, error) {
	if err := c.Check(now); err != nil {
		return Claim{}, err
	}
	c.Until = c.Until.Round(0)
	key := claimKey{c.Kind, c.Index}
	if old, ok := t[key]; ok && old.Owner != c.Owner && old.Until.After(now) {
		return old, ErrTaken
	}
	t[key] = c
	return c, nil
}

// release reports whether there was something to release.
func (t claims) release(c Claim, now time.Time) (bool, error) {
	key := claimKey{c.Kind, c.Index}
	old, ok := t[key]
	switch {
	case !ok || !old.Until.After(now):
		delete(t, key)
		return false, nil
	case old.Owner != c.Owner:
		return false, ErrTaken
	}
	delete(t, key)
	return true, nil
}

// live returns what hasn't ended, and forgets the rest.
func (t claims) live(now time.Time) []Claim {
	var out []Claim
	for key, c := range t {
		if c.Until.After(now) {
			out = append(out, c)
		} else {
			delete(t, key)
		}
	}
	return out
}

// NewMemory returns the registry of a server that is alone: nobody hears what it
// publishes, and every claim is its own.
func NewMemory() Registry { return NewHub().Join("alone") }

// ended returns why Run ends.
func ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return ErrClosed
}

// onceClosed is a channel that can be closed again and again.
type onceClosed struct {
	once sync.Once
	c    chan struct{}
}

func (o *onceClosed) close() { o.once.Do(func() { close(o.c) }) }
