package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestOpen(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{})
	if d.Name() != "anytun0" {
		t.Errorf("name %q", d.Name())
	}
	link := s.run("ip -d link show anytun0; ip addr show anytun0")
	for _, want := range []string{"mtu 1400", "UP", "qlen 1000", "vnet_hdr on"} {
		if !strings.Contains(link, want) {
			t.Errorf("no %q in:\n%s", want, link)
		}
	}
	if strings.Contains(link, "inet") {
		t.Errorf("the device has an address:\n%s", link)
	}
	s.do(func() error {
		for name, c := range map[string]Config{
			"busy":            {Name: d.Name()},
			"long":            {Name: "a-name-that-is-too-long"},
			"mtu":             {MTU: 1279},
			"long mtu":        {MTU: 65536},
			"headroom":        {Headroom: -1},
			"tailroom":        {Tailroom: maxRoom + 1},
			"loopback's name": {Name: "lo"},
		} {
			if d, err := Open(c); err == nil {
				t.Errorf("%s: opened %s", name, d.Name())
				_ = d.Close()
			} else {
				t.Logf("%s: %v", name, err)
			}
		}
		return nil
	})
	for range 2 {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := d.ReadBatch(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("ReadBatch after Close: %v", err)
	}
	if left := s.run("ip link"); strings.Contains(left, "anytun0") {
		t.Errorf("after Close:\n%s", left)
	}
}

// TestDeleted has somebody delete the device under its reader.
func TestDeleted(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Name: "tun0"})
	done := make(chan error)
	go func() {
		for {
			if _, err := d.ReadBatch(); err != nil {
				done <- err
				return
			}
		}
	}()
	s.run("ip link del tun0")
	select {
	case err := <-done:
		if errors.Is(err, net.ErrClosed) {
			t.Errorf("ReadBatch: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("ReadBatch doesn't return")
	}
	f := newFlow(rand.New(rand.NewPCG(1, 1)), 0)
	d.WriteBatch([][]byte{f.packet(10)})
	if s := d.Stats(); s.Drops[DropClosed] != 1 {
		t.Errorf("drops: %v", s.Drops)
	}
}

// TestDownInterface counts packets for an interface that is down.
func TestDownInterface(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Name: "tun0"})
	s.run("ip link set tun0 down")
	f := newFlow(rand.New(rand.NewPCG(1, 1)), 0)
	d.WriteBatch([][]byte{f.packet(10)})
	if s := d.Stats(); s.Drops[DropDown] != 1 {
		t.Errorf("drops: %v", s.Drops)
	}
}

// TestConcurrent uses a device from everywhere while it is closed.
func TestConcurrent(t *testing.T) {
	s := newSpace(t)
	s.run("sysctl -qw net.ipv4.ip_forward=1")
	d := s.open(Config{Name: "tun0"})
	var all sync.WaitGroup
	started := make(chan struct{}, 8)
	for i := range 8 {
		all.Go(func() {
			f := newFlow(rand.New(rand.NewPCG(2, uint64(i))), 0)
			for round := 0; d.Stats().Drops[DropClosed] == 0; round++ {
				d.WriteBatch(f.packets(50))
				if round == 3 {
					started <- struct{}{}
				}
			}
		})
	}
	all.Go(func() {
		for {
			if _, err := d.ReadBatch(); err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("ReadBatch: %v", err)
				}
				return
			}
		}
	})
	for range cap(started) {
		<-started
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	all.Wait()
}

// TestTryRead reads with two readers, of which one waits. Their batches must come
// in order, and one at a time.
func TestTryRead(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Name: "tun0"})
	s.run("ip addr add 10.0.0.1/24 dev tun0")
	c := s.dialUDP("10.0.0.2:9")
	const bursts, burst = 400, 50
	sent := uint32(0)
	send := func(n int) {
		for range n {
			if _, err := c.Write(binary.BigEndian.AppendUint32(nil, sent)); err != nil {
				t.Error(err)
			}
			sent++
		}
	}
	var next atomic.Uint32 // who holds a batch adds to it
	var held atomic.Bool
	check := func(pkts [][]byte) {
		if held.Swap(true) {
			t.Error("two batches at a time")
		}
		for _, p := range pkts {
			if p[0]>>4 != 4 {
				continue // the kernel's own, of IPv6
			}
			if got, want := binary.BigEndian.Uint32(p[28:]), next.Load(); got != want {
				t.Errorf("packet %d, want %d", got, want)
			}
			next.Add(1)
		}
		held.Store(false)
	}

	for send(1); next.Load() == 0; {
		pkts, err := d.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		check(pkts)
	}
	send(1)
	d.TryRead(func([][]byte) { t.Error("TryRead while the batch of ReadBatch is in use") })

	var all sync.WaitGroup
	all.Go(func() {
		for {
			pkts, err := d.ReadBatch()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			check(pkts)
		}
	})
	tried := 0
	deadline := time.Now().Add(patience)
	for range bursts {
		send(burst)
		for next.Load() < sent && !t.Failed() {
			d.TryRead(func(pkts [][]byte) { check(pkts); tried++ })
			if time.Now().After(deadline) {
				t.Errorf("%d packets of %d", next.Load(), sent)
			}
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	all.Wait()
	d.TryRead(func([][]byte) { t.Error("TryRead after Close") })
	if tried == 0 {
		t.Error("TryRead brought nothing")
	}
}

// TestBacklog counts what the kernel could not keep for a slow reader.
func TestBacklog(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Name: "tun0"})
	s.run("ip addr add 10.0.0.1/24 dev tun0")
	c := s.dialUDP("10.0.0.2:9")
	if err := c.SetWriteBuffer(64 << 20); err != nil {
		t.Fatal(err)
	}
	for i := 0; d.Stats().Drops[DropBacklog] == 0; i++ {
		if i > 100*queueLength {
			t.Fatal("no drop is counted")
		}
		_, _ = c.Write([]byte{byte(i)})
	}
	// What it kept comes in order.
	for want := byte(0); want < 200; {
		pkts, err := d.ReadBatch()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pkts {
			if p[0]>>4 == 4 && !bytes.Equal(p[28:], []byte{want}) {
				t.Fatalf("payload %v, want %d", p[28:], want)
			}
			if want++; want == 200 {
				break
			}
		}
	}
}
