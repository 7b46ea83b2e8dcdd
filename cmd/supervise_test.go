package cmd

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// supervise runs v in a bubble and feeds it signals, each after a second.
func supervise(t *testing.T, v Supervision, signals ...os.Signal) (took time.Duration, err error) {
	t.Helper()
	incoming := make(chan os.Signal)
	stopped := false
	p := &Process{Notify: func() (<-chan os.Signal, func()) { return incoming, func() { stopped = true } }}
	v.Logger = slog.New(slog.DiscardHandler)
	go func() {
		for _, s := range signals {
			time.Sleep(time.Second)
			incoming <- s
		}
	}()
	start := time.Now()
	err = v.Run(t.Context(), p)
	if !stopped {
		t.Error("the signals were not let go")
	}
	return time.Since(start), err
}

func TestSupervise(t *testing.T) {
	boom := errors.New("boom")
	failing := Task{"failing", func(ctx context.Context) error {
		select {
		case <-time.After(5 * time.Second):
			return boom
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	waiting := Task{"waiting", untilDone}
	for _, test := range []struct {
		name    string
		tasks   []Task
		drain   func(context.Context)
		signals []os.Signal
		took    time.Duration
		want    error
	}{
		{
			"a drain that ends early",
			[]Task{waiting, waiting},
			func(context.Context) { time.Sleep(2 * time.Second) },
			[]os.Signal{syscall.SIGTERM},
			3 * time.Second, nil,
		},
		{
			"a drain that takes all its time",
			[]Task{waiting},
			func(ctx context.Context) { <-ctx.Done() },
			[]os.Signal{os.Interrupt},
			11 * time.Second, nil,
		},
		{
			"a second signal",
			[]Task{waiting},
			func(ctx context.Context) { <-ctx.Done() },
			[]os.Signal{syscall.SIGTERM, syscall.SIGTERM},
			2 * time.Second, nil,
		},
		{
			"a reload ends nothing",
			[]Task{waiting},
			nil,
			[]os.Signal{syscall.SIGHUP, syscall.SIGHUP, syscall.SIGTERM},
			3 * time.Second, nil,
		},
		{
			"a failing task ends the others",
			[]Task{waiting, failing},
			nil,
			nil, 5 * time.Second, boom,
		},
		{
			"a failure during the drain",
			[]Task{waiting, failing},
			func(ctx context.Context) { <-ctx.Done() },
			[]os.Signal{syscall.SIGTERM},
			5 * time.Second, boom,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reloads := 0
				took, err := supervise(t, Supervision{
					Tasks: test.tasks, Drain: test.drain, DrainTime: 10 * time.Second,
					Reload: func() { reloads++ },
				}, test.signals...)
				if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
					t.Errorf("got %v, want %v", err, test.want)
				}
				if took != test.took {
					t.Errorf("took %v, want %v", took, test.took)
				}
				want := 0
				for _, s := range test.signals {
					if s == syscall.SIGHUP {
						want++
					}
				}
				if reloads != want {
					t.Errorf("%d reloads, want %d", reloads, want)
				}
			})
		})
	}
}

func TestTaskThatEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, err := supervise(t, Supervision{Tasks: []Task{{"short", func(context.Context) error { return nil }}}})
		if err == nil || err.Error() != "short ended by itself" {
			t.Errorf("got %v", err)
		}
	})
}
