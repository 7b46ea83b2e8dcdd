package cmd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"
)

// Task is a part of a program that runs until its context ends.
type Task struct {
	Name string
	Run  func(ctx context.Context) error
}

// Supervision says what a running program does with signals.
type Supervision struct {
	Tasks []Task

	// Drain is called at the first SIGINT or SIGTERM. It stops accepting and
	// returns when nothing is open any more, or when ctx ends: after DrainTime,
	// or at a second signal.
	Drain     func(ctx context.Context)
	DrainTime time.Duration
	// DrainRequest, if not nil, starts a drain like a signal does; it is for the
	// admin page.
	DrainRequest <-chan struct{}

	// Reload is called at SIGHUP. It reports its own errors: a file that can't
	// be read must not end a running program.
	Reload func()

	Logger *slog.Logger
}

// Run runs the tasks until a signal has been followed, ctx ends, or a task ends
// by itself, which is an error. It returns after every task has ended.
func (v Supervision) Run(ctx context.Context, p *Process) error {
	signals, stop := p.Notify()
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	ended := make(chan error, len(v.Tasks)) // every task reports once, so none blocks
	for _, t := range v.Tasks {
		go t.run(ctx, ended)
	}
	running := len(v.Tasks)

	var drained chan struct{} // nil until a drain is under way
	endDrain := func() {}     // replaced when the drain starts
	startDrain := func(by string) {
		v.Logger.Info("draining; a second signal ends at once", "signal", by, "drain_time", v.DrainTime.String())
		drainCtx, cancelDrain := context.WithTimeout(ctx, v.DrainTime)
		endDrain = cancelDrain
		drained = make(chan struct{})
		go v.drain(drainCtx, drained)
	}
	var failure error
	done := ctx.Done()
	for running > 0 {
		select {
		case err := <-ended:
			running--
			if failure == nil && ctx.Err() == nil {
				failure = err
			}
			cancel()
		case <-done:
			done = nil
		case <-drained:
			drained = nil
			cancel()
		case <-v.DrainRequest:
			if drained == nil && ctx.Err() == nil {
				startDrain("none, asked by the admin page")
			}
		case sig := <-signals:
			switch {
			case sig == syscall.SIGHUP:
				v.Logger.Info("reading files again", "signal", sig.String())
				if v.Reload != nil {
					v.Reload()
				}
			case drained == nil && ctx.Err() == nil:
				startDrain(sig.String())
			default:
				v.Logger.Info("ending at once", "signal", sig.String())
				endDrain()
				cancel()
			}
		}
	}
	endDrain()
	if drained != nil {
		<-drained
	}
	if failure == nil {
		v.Logger.Info("ended")
	}
	return failure
}

func (v Supervision) drain(ctx context.Context, drained chan<- struct{}) {
	defer close(drained)
	if v.Drain != nil {
		v.Drain(ctx)
	}
}

func (t Task) run(ctx context.Context, ended chan<- error) {
	err := t.Run(ctx)
	switch {
	case err == nil:
		err = fmt.Errorf("%s ended by itself", t.Name)
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
	default:
		var e *Error
		if !errors.As(err, &e) {
			err = fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	ended <- err
}
