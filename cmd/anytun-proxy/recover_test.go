package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/cmd/cmdtest"
	"github.com/anytun-go/anytun/proxy"
)

// outside is what a tunnel's packets arrive at: nothing answers.
type outside struct {
	mu     sync.Mutex
	ports  map[uint16]int // SYNs by source port
	asked  int            // for further ports
	logged bytes.Buffer
}

func (o *outside) output(pkts [][]byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, b := range pkts {
		p := b[wire.DataHeaderLen : len(b)-wire.TagLen]
		if p[0]>>4 == 4 && p[9] == 6 {
			o.ports[binary.BigEndian.Uint16(p[20:])]++
		}
	}
}

func (o *outside) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.logged.Write(p)
}

// sent says how many SYNs left from a port.
func (o *outside) sent(port uint16) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ports[port]
}

// newTestTunnel makes a tunnel with a session of the given ports.
func newTestTunnel(t *testing.T, s client.Session) (*tunnel, *outside) {
	t.Helper()
	key, err := session.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	o := &outside{ports: map[uint16]int{}}
	tun := newTunnel(key.Public(), slog.New(slog.NewTextHandler(o, nil)))
	tun.output = o.output
	tun.more = func() { o.mu.Lock(); o.asked++; o.mu.Unlock() }
	s.Addresses = [2]netip.Addr{tun.inner.IPv4(7), tun.inner.IPv6(7)}
	s.Gateways = [2]netip.Addr{tun.inner.IPv4(0), tun.inner.IPv6(0)}
	s.MTU = 1400
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { tun.recoverLoop(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := tun.close(); err != nil {
			t.Error(err)
		}
	})
	tun.onSession(s)
	if err := tun.wait(t.Context(), "dial", "tcp"); err != nil {
		t.Fatal(err)
	}
	return tun, o
}

var (
	public4 = netip.MustParseAddr("203.0.113.2")
	public6 = netip.MustParseAddr("2001:db8::2")
	another = netip.MustParseAddr("203.0.113.3")
)

// eventually waits for what another goroutine does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(cmdtest.Hangs); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

// A dial that finds no port fails as such, is told, and asks for more; which
// then serve.
func TestPortsUsedUp(t *testing.T) {
	tun, o := newTestTunnel(t, client.Session{FirstPort: 5000, LastPort: 5001})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	dial := func() {
		wg.Go(func() {
			if c, err := tun.DialContext(ctx, "tcp", "192.0.2.1:80"); err == nil {
				c.Close()
				t.Error("somebody has answered")
			}
		})
	}
	dial()
	dial()
	eventually(t, "two SYNs", func() bool { return o.sent(5000) > 0 && o.sent(5001) > 0 })
	_, err := tun.DialContext(ctx, "tcp", "192.0.2.1:80")
	if r := proxy.ReasonOf(err); !errors.Is(err, syscall.EADDRNOTAVAIL) || r != proxy.ReasonNoPorts || r.SOCKS5() != 1 || r.Status() != 503 {
		t.Errorf("a third dial: %v", err)
	}
	o.mu.Lock()
	if o.asked == 0 {
		t.Error("nobody was asked for more")
	}
	if n := strings.Count(o.logged.String(), "ports used up"); n != 1 {
		t.Errorf("said %d times: %s", n, &o.logged)
	}
	o.mu.Unlock()
	if n := tun.stack.Stats().PortsUsedUp; n == 0 {
		t.Error("not counted")
	}
	dial() // waits for a port
	tun.onPorts([]client.PortRange{{First: 9000, Last: 9000, Public: another}})
	eventually(t, "a SYN from a leased port", func() bool { return o.sent(9000) > 0 })
	// Another number: the ports are the new session's only.
	tun.onPorts(nil)
	s := *tun.current.Load()
	s.Number, s.FirstPort, s.LastPort = 8, 6000, 6000
	tun.onSession(s)
	dial()
	eventually(t, "a SYN from a new port", func() bool { return o.sent(6000) > 0 })
}

// Where others reach a listener depends on who they are.
func TestPublicListener(t *testing.T) {
	anybody := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	host4, host6 := netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("[2001:db8::1]:80")
	all := [2]netip.Addr{public4, public6}
	for _, c := range []struct {
		name   string
		peer   netip.AddrPort
		public [2]netip.Addr
		port   bool
		leased bool // the only free port is a leased one
		want   netip.Addr
	}{
		{"a host outside", host4, all, true, false, public4},
		{"a host outside, IPv6", host6, all, true, false, public6},
		{"anybody", anybody, all, true, false, public4},
		{"a leased port", host4, all, true, true, another},
		{"another client", netip.MustParseAddrPort("100.64.0.9:80"), all, true, false, netip.MustParseAddr("100.64.0.7")},
		{"anybody, where nobody outside reaches us", anybody, all, false, false, netip.MustParseAddr("100.64.0.7")},
		{"a server that doesn't tell", host4, [2]netip.Addr{}, true, false, netip.MustParseAddr("100.64.0.7")},
	} {
		t.Run(c.name, func(t *testing.T) {
			tun, _ := newTestTunnel(t, client.Session{FirstPort: 5000, LastPort: 5000, Public: c.public, PublicPort: c.port})
			port := uint16(5000)
			if c.leased {
				port = 9000
				tun.onPorts([]client.PortRange{{First: 9000, Last: 9000, Public: another}})
				l, err := tun.stack.ListenTCP(netip.AddrPort{})
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
			}
			var l interface{ Close() error }
			eventually(t, "a listener", func() bool {
				n, err := tun.Listen(t.Context(), c.peer)
				if err != nil {
					return false
				}
				l = n
				if a := proxy.AddrPortOf(n.Addr()); a != netip.AddrPortFrom(c.want, port) {
					t.Errorf("bound to %v, want %v port %d", a, c.want, port)
				}
				return true
			})
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The stack is told of gaps by recoverLoop, not by the engine's goroutine, and
// nothing is lost when the engine is faster.
func TestRecover(t *testing.T) {
	tun, o := newTestTunnel(t, client.Session{FirstPort: 5000, LastPort: 5000})
	tun.onSuspect(true)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _, _ = tun.DialContext(ctx, "tcp", "192.0.2.1:80") })
	eventually(t, "a SYN", func() bool { return o.sent(5000) > 0 })
	for range 1000 {
		tun.onGap(client.Gap{Length: time.Second})
		tun.onSuspect(false)
		tun.onSuspect(true)
	}
	eventually(t, "the loop", func() bool {
		tun.news.mu.Lock()
		defer tun.news.mu.Unlock()
		return tun.news.gap == 0
	})
	// The first SYN may have been faster than the suspicion; the next is kept.
	eventually(t, "the SYN again", func() bool {
		if o.sent(5000) > 1 {
			tun.onGap(client.Gap{Length: time.Second})
		}
		return tun.stack.Stats().GapResent > 0
	})
}
