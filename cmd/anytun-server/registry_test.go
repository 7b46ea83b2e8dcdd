package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
)

// unsure is a registry that can't always decide.
type unsure struct {
	registry.Registry
	mu    sync.Mutex
	until time.Time
}

func (u *unsure) set(until time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.until = until
}

func (u *unsure) Claim(ctx context.Context, c registry.Claim) (registry.Claim, error) {
	u.mu.Lock()
	until := u.until
	u.mu.Unlock()
	if time.Now().Before(until) {
		return registry.Claim{}, registry.ErrUnavailable
	}
	return u.Registry.Claim(ctx, c)
}

func lease(t *testing.T, reg registry.Registry, dir, listen string) (*numberHolder, error) {
	t.Helper()
	return leaseNumber(t.Context(), reg, &registryConfig{dir: dir, listen: listen}, slog.New(slog.DiscardHandler))
}

// Every server gets the lowest number that is free, the one it had when it starts
// again, and another's when that was given back.
func TestLeaseNumber(t *testing.T) {
	hub := registry.NewHub()
	a, b := hub.Join("a"), hub.Join("b")
	first, err := lease(t, a, t.TempDir(), "192.0.2.1:6222")
	if err != nil || first.claim.Index != 1 {
		t.Fatalf("number %v, %v", first, err)
	}
	second, err := lease(t, b, t.TempDir(), "192.0.2.2:6222")
	if err != nil || second.claim.Index != 2 {
		t.Fatalf("number %v, %v", second, err)
	}
	again, err := lease(t, b, t.TempDir(), "192.0.2.2:6222")
	if err != nil || again.claim.Index != 2 {
		t.Errorf("the second time number %v, %v", again, err)
	}
	first.release()
	third, err := lease(t, a, t.TempDir(), "192.0.2.3:6222")
	if err != nil || third.claim.Index != 1 {
		t.Errorf("number %v after it was given back, %v", third, err)
	}
}

// Without an answer a server that never had a number waits, and fails in the end;
// one that had goes on with it.
func TestLeaseNumberWithoutAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &unsure{Registry: registry.NewMemory(), until: time.Now().Add(time.Hour)}
		dir := t.TempDir()
		start := time.Now()
		if h, err := lease(t, u, dir, "192.0.2.1:6222"); err == nil || time.Since(start) < numberWait {
			t.Errorf("number %v, %v after %v", h, err, time.Since(start))
		}
		u.set(time.Now().Add(time.Minute))
		if h, err := lease(t, u, dir, "192.0.2.1:6222"); err != nil || h.claim.Index != 1 {
			t.Errorf("number %v, %v", h, err)
		}
		u.set(time.Now().Add(time.Hour))
		start = time.Now()
		h, err := lease(t, u, dir, "192.0.2.1:6222")
		if err != nil || h.claim.Index != 1 || time.Since(start) > 2*numberPatience {
			t.Errorf("number %v, %v after %v", h, err, time.Since(start))
		}
	})
}

// A server whose number has become another's ends; one that can't ask goes on.
func TestNumberIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := registry.NewHub()
		u := &unsure{Registry: hub.Join("a")}
		h, err := lease(t, u, filepath.Join(t.TempDir(), "registry"), "192.0.2.1:6222")
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- h.run(t.Context()) }()
		time.Sleep(time.Hour)
		u.set(time.Now().Add(time.Hour))
		time.Sleep(30 * time.Minute) // the lease has ended meanwhile
		select {
		case err := <-ended:
			t.Fatalf("ended with %v", err)
		default:
		}
		if _, err := lease(t, hub.Join("b"), t.TempDir(), "192.0.2.2:6222"); err != nil {
			t.Fatal(err)
		}
		u.set(time.Time{})
		time.Sleep(numberRenew + time.Second)
		select {
		case err := <-ended:
			if err == nil || errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
		default:
			t.Error("two servers have one number")
		}
	})
}
