package announce

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/pprof"
	"strings"
	"sync/atomic"
	"time"
)

// helperConfig is what the tests want of a helper; in helperEnv, as JSON.
type helperConfig struct {
	Config
	Check, Logger *struct{} // hide Config's, which JSON can't hold
	Sick          bool      // the check fails from the start
	Password      string    // of all peers
	Log           string    // file
}

// helper announces until its standard input ends or says "stop", and answers
// each line of it with one of JSON.
func helper(config string) error {
	var c helperConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	file, err := os.Create(c.Log)
	if err != nil {
		return err
	}
	defer file.Close()
	c.Config.Logger = slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for i := range c.Peers {
		c.Peers[i].Password = c.Password
	}
	var sick atomic.Bool
	sick.Store(c.Sick)
	c.Config.Check = func(context.Context) error {
		if sick.Load() {
			return errors.New("sick")
		}
		return nil
	}
	a, err := New(c.Config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()

	answer := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch in.Text() {
		case "sick":
			sick.Store(true)
		case "well":
			sick.Store(false)
		case "drain":
			a.Drain()
		case "status":
			if err := answer.Encode(a.Status()); err != nil {
				return err
			}
			continue
		case "stop":
			cancel()
			begin := time.Now()
			err := <-done
			var goroutines strings.Builder
			if err := pprof.Lookup("goroutine").WriteTo(&goroutines, 2); err != nil {
				return err
			}
			if err := answer.Encode(stopped{Err: fmt.Sprint(err), Took: time.Since(begin), Goroutines: goroutines.String()}); err != nil {
				return err
			}
			return nil
		}
		if err := answer.Encode(struct{}{}); err != nil {
			return err
		}
	}
	cancel()
	return <-done
}

// stopped is the answer to "stop".
type stopped struct {
	Err        string
	Took       time.Duration
	Goroutines string // that were left, with their stacks
}
