package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/proxy"
)

// TestHalfClose ends each side first, and lets the other one go on.
func TestHalfClose(t *testing.T) {
	g := start(t)
	t.Run("application first", func(t *testing.T) {
		to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
			b, err := io.ReadAll(c)
			_, _ = fmt.Fprintf(c, "%d %v", len(b), err)
		})
		c := g.client(t)
		c.connect4(to)
		c.send("12345")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.want("5 <nil>")
		c.wantEnd()
	})
	t.Run("server first", func(t *testing.T) {
		got := make(chan string, 1)
		to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, _ = c.Write([]byte("bye"))
			_ = c.CloseWrite()
			b, err := io.ReadAll(c)
			got <- fmt.Sprintf("%s %v", b, err)
		})
		c := g.client(t)
		c.connect4(to)
		c.want("bye")
		c.wantEnd()
		c.send("still here")
		c.Close()
		if s := <-got; s != "still here <nil>" {
			t.Errorf("the server got %q", s)
		}
	})
}

// TestReset checks that a reset arrives as one, on either side.
func TestReset(t *testing.T) {
	g := start(t)
	t.Run("server", func(t *testing.T) {
		to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, _ = io.ReadFull(c, make([]byte, 2))
			_ = c.SetLinger(0)
		})
		c := g.client(t)
		c.connect4(to)
		c.send("go")
		c.wantReset()
	})
	t.Run("application", func(t *testing.T) {
		got := make(chan error, 1)
		to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, _ = c.Write([]byte("hello"))
			_, err := io.ReadAll(c)
			got <- err
		})
		c := g.client(t)
		c.connect4(to)
		c.want("hello")
		if err := c.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if err := <-got; err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("the server got %v, want a reset", err)
		}
	})
}

// TestSlow leaves requests unfinished.
func TestSlow(t *testing.T) {
	g := start(t, func(o *options) { o.HandshakeTimeout = 50 * time.Millisecond })
	for _, tt := range []struct {
		name string
		send []byte
		want []byte
	}{
		{"nothing", nil, nil},
		{"greeting", join(5, 9, 0), join(5, 0xff)},
		{"request", join(5, 1, 0, 5, 1), join(5, 0, 5, 1, 0, 1, 0, 0, 0, 0, 0, 0)},
		{"socks4", join(4, 1, 0, 80, 127, 0, 0, 1, "user"), join(0, 0x5b, 0, 0, 0, 0, 0, 0)},
		{"http", join("GET http://x/ HTTP/1.1\r\nA: b\r\n"), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.client(t)
			if len(tt.send) > 0 {
				c.send(tt.send)
			}
			got, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			if tt.want != nil && !bytes.Equal(got, tt.want) {
				t.Errorf("got % x, want % x", got, tt.want)
			}
		})
	}
	counted(t, "handshake_slow", func() uint64 { return g.Stats().Failures["handshake_slow"] }, 4)
}

// TestHandshakeDeadlineEnds keeps tunnels open for longer than a handshake may take.
func TestHandshakeDeadlineEnds(t *testing.T) {
	const limit = 100 * time.Millisecond
	g := start(t, func(o *options) { o.HandshakeTimeout = limit })
	to := serveTCP(t, "127.0.0.1:0", echo)
	socks, web := g.client(t), g.client(t)
	socks.connect4(to)
	web.send("CONNECT ", to.String(), " HTTP/1.1\r\n\r\n")
	web.want("HTTP/1.1 200 Connection established\r\n\r\n")
	udp := g.associate(t, 0)
	time.Sleep(2 * limit)
	if n := g.Stats().OpenAssociations; n != 1 {
		t.Errorf("%d associations are open, want 1", n)
	}
	udp.tcp.Close()
	for _, c := range []*client{socks, web} {
		c.send("still")
		c.want("still")
	}
}

// TestRefusedWithEarlyData: the reply must arrive although the application goes on sending what nobody will read.
func TestRefusedWithEarlyData(t *testing.T) {
	g := start(t, func(o *options) { o.net.fails["192.0.2.1:80"] = syscall.ECONNREFUSED })
	early := bytes.Repeat([]byte("x"), 200_000)
	for range 20 {
		c := g.client(t)
		c.send(5, 1, 0, 5, 1, 0, 1, 192, 0, 2, 1, 0, 80, early)
		time.Sleep(time.Millisecond) // an early reset would be here by now
		c.want(5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0)
		c.wantEnd()
	}
}

func TestIdleTimeouts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*options)
		half   bool
	}{
		{"both sides open", func(o *options) { o.IdleTimeout = 40 * time.Millisecond }, false},
		{"one side ended", func(o *options) { o.HalfIdleTimeout = 40 * time.Millisecond }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, tt.change)
			done := make(chan struct{})
			to := serveTCP(t, "127.0.0.1:0", func(c *net.TCPConn) {
				if tt.half {
					_, _ = io.ReadAll(c)
					_, _ = c.Write([]byte("x"))
				}
				<-done
			})
			defer close(done)
			c := g.client(t)
			c.connect4(to)
			if tt.half {
				if err := c.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				c.want("x")
			}
			if rest, err := io.ReadAll(c); err == nil {
				t.Errorf("got %q and a proper end, want a reset", rest)
			}
			counted(t, "idle tunnels", func() uint64 { return g.Stats().IdleTunnels }, 1)
		})
	}
}

func TestMaxConns(t *testing.T) {
	g := start(t, func(o *options) { o.MaxConns = 2 })
	to := serveTCP(t, "127.0.0.1:0", echo)
	a, b := g.client(t), g.client(t)
	a.connect4(to)
	b.connect4(to)
	c := g.client(t)
	c.send(5, 1, 0)
	counted(t, "limit waits", func() uint64 { return g.Stats().LimitWaits }, 1)
	if n := g.Stats().OpenConns; n != 2 {
		t.Errorf("%d connections are open, want 2", n)
	}
	a.Close()
	c.want(5, 0) // it was waiting for its turn
}

func TestDrain(t *testing.T) {
	t.Run("waits", func(t *testing.T) {
		g := start(t)
		to := serveTCP(t, "127.0.0.1:0", echo)
		c := g.client(t)
		c.connect4(to)
		keepAlive := g.client(t) // an HTTP connection between two requests must not hold it up
		keepAlive.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		keepAlive.want("HTTP/1.1 200 OK\r\n")
		drained := make(chan error, 1)
		go func() { drained <- g.Drain(context.Background()) }()
		eventually(t, func() bool {
			n, err := net.Dial("tcp", g.addr)
			if err == nil {
				n.Close()
			}
			return err != nil
		}, func() { t.Error("it still accepts") })
		if _, err := io.ReadAll(keepAlive); err != nil {
			t.Errorf("the idle connection: %v, want its end", err)
		}
		c.send("still")
		c.want("still")
		select {
		case err := <-drained:
			t.Fatalf("drained (%v) with a tunnel open", err)
		default:
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.wantEnd()
		if err := <-drained; err != nil {
			t.Errorf("drained: %v", err)
		}
	})
	t.Run("gives up", func(t *testing.T) {
		g := start(t)
		to := serveTCP(t, "127.0.0.1:0", echo)
		c := g.client(t)
		c.connect4(to)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := g.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("drained: %v, want the deadline", err)
		}
		c.wantReset()
	})
}

// TestShutdown ends the server with every kind of thing open.
func TestShutdown(t *testing.T) {
	g := start(t, func(o *options) {
		o.net.dial = func(ctx context.Context, address string) (net.Conn, error) {
			if strings.HasPrefix(address, "192.0.2.") {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	})
	to := serveTCP(t, "127.0.0.1:0", echo)
	tunnel, dialing, associate, bind, silent, web, forward := g.client(t), g.client(t), g.client(t), g.client(t),
		g.client(t), g.client(t), g.client(t)
	tunnel.connect4(to)
	dialing.greet()
	dialing.send(5, 1, 0, 1, 192, 0, 2, 1, 0, 80)
	associate.greet()
	associate.send(5, 3, 0, 1, 0, 0, 0, 0, 0, 0)
	associate.want(5, 0)
	bind.greet()
	bind.send(5, 2, 0, 1, 0, 0, 0, 0, 0, 0)
	bind.want(5, 0)
	web.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	web.want("HTTP/1.1 200")
	forward.send("GET http://192.0.2.2/ HTTP/1.1\r\nHost: 192.0.2.2\r\n\r\n")
	_ = silent
	counted(t, "forwards", func() uint64 { return g.Stats().Requests["http_forward"] }, 1)
	g.stop() // the cleanup of start checks that all of it ends
}

// TestManyConnections is the smoke test: a thousand tunnels at once, all of them working.
func TestManyConnections(t *testing.T) {
	const many = 1000
	g := start(t)
	to := serveTCP(t, "127.0.0.1:0", echo)
	clients := make([]*client, many)
	for i := range clients {
		clients[i] = g.client(t)
	}
	var wg sync.WaitGroup
	failed := make(chan error, many)
	for i, c := range clients {
		wg.Go(func() {
			request := join(5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, sport(to.Port), fmt.Sprintf("%04d", i))
			reply := make([]byte, 2+10+4)
			_, werr := c.Write(request)
			_, rerr := io.ReadFull(c, reply)
			if err := errors.Join(werr, rerr); err != nil || string(reply[12:]) != fmt.Sprintf("%04d", i) {
				failed <- fmt.Errorf("connection %d: got %q, %w", i, reply, err)
			}
		})
	}
	wg.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if n := g.Stats().OpenTunnels; n != many {
		t.Errorf("%d tunnels are open, want %d", n, many)
	}
	for _, c := range clients {
		c.Close()
	}
	counted(t, "open connections", func() uint64 { return uint64(g.Stats().OpenConns) }, 0)
	if s := g.Stats(); s.BytesOut != 4*many || s.BytesIn != 4*many || s.Requests["socks5_connect"] != many {
		t.Errorf("counted %d bytes out, %d in, %d requests", s.BytesOut, s.BytesIn, s.Requests["socks5_connect"])
	}
}

// TestUnixSocket goes through a unix socket, whose applications are on the loopback address.
func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proxy.sock")
	start(t, func(o *options) { o.listen = "unix://" + path })
	to := serveTCP(t, "127.0.0.1:0", echo)
	dial := func() *net.UnixConn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
		return c.(*net.UnixConn)
	}
	c := dial()
	if _, err := c.Write(join(4, 1, sport(to.Port), 127, 0, 0, 1, 0, "hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b[8:]) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	a := dial()
	if _, err := a.Write(join(5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 12)
	if _, err := io.ReadFull(a, b); err != nil || !bytes.HasPrefix(b, join(5, 0, 5, 0, 0, 1, 127, 0, 0, 1)) {
		t.Errorf("associate: % x, %v", b, err)
	}
}

func TestNew(t *testing.T) {
	n := newNetwork()
	if _, err := proxy.New(proxy.Config{}); err == nil {
		t.Error("no network, no error")
	}
	if _, err := proxy.New(proxy.Config{Network: n}); err == nil {
		t.Error("no handler, no error")
	}
	g := start(t)
	if err := g.Serve(t.Context()); err == nil {
		t.Error("a second Serve works")
	}
}
