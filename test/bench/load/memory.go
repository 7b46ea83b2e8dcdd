package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// The connections of test mem: first and more in all.
const (
	memoryFirst = 1000
	memoryMore  = 5000
)

// memory opens connections, uses each once, lets them be idle, and reads what
// the processes weigh: with memoryFirst of them, and what each further one adds.
// It means something in processes that have only just begun.
func (t test) memory() (figures, error) {
	f := make(figures)
	weigh := func(client, server string, sub figures, per float64) {
		if len(t.procs.client) > 0 {
			f[client] = (megabytes(t.procs.client) - sub[figClientMB]) / per
		}
		if len(t.procs.server) > 0 {
			f[server] = (megabytes(t.procs.server) - sub[figServerMB]) / per
		}
	}
	weigh(figClientBare, figServerBare, nil, 1)
	var conns []net.Conn
	defer func() { closeAll(conns) }()
	var err error
	if conns, err = t.openIdle(conns, memoryFirst); err != nil {
		return nil, err
	}
	pause(time.Second)
	weigh(figClientMB, figServerMB, nil, 1)
	if conns, err = t.openIdle(conns, memoryMore); err != nil {
		return f, err // what is known is known
	}
	pause(time.Second)
	weigh(figClientKBEach, figServerKBEach, f, float64(memoryMore-memoryFirst)/1e3)
	return f, nil
}

// openIdle opens connections until there are so many and makes one request on
// each. What it returns is open, even with an error.
func (t test) openIdle(conns []net.Conn, upTo int) ([]net.Conn, error) {
	const atOnce = 16
	var mu sync.Mutex
	var errs []error
	next := len(conns)
	var loops sync.WaitGroup
	for range atOnce {
		loops.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= upTo {
					return
				}
				c, err := t.openOne(i)
				mu.Lock()
				if err == nil {
					conns = append(conns, c)
				} else {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	loops.Wait()
	if len(errs) > 0 {
		return conns, fmt.Errorf("%d of %d connections failed: %w", len(errs), upTo, errors.Join(errs[:1]...))
	}
	return conns, nil
}

func (t test) openOne(i int) (net.Conn, error) {
	c, err := t.path.dial(portHTTP + i%httpPorts)
	if err != nil {
		return nil, err
	}
	err = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err == nil {
		err = get(c, bufio.NewReaderSize(c, 2048), getSize, false)
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}
