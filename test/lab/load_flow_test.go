//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

const (
	// flowEvery is the time between two packets of a flow, flowLen their size.
	flowEvery = 20 * time.Millisecond
	flowLen   = 200
	// flowGrace is how long an answer may take before its packet counts as lost.
	flowGrace = 2 * time.Second
	// maxFlowPackets bounds what a flow remembers: an hour of them.
	maxFlowPackets = int(time.Hour / flowEvery)
)

// A flow sends numbered packets at a steady rate to somebody who sends them
// back, and keeps account of each.
type flow struct {
	name  string
	tape  tape
	close func()
	send  func([]byte) error
	recv  func([]byte) ([]byte, error) // a packet of ours, without headers
	wg    sync.WaitGroup
	stop  chan struct{}

	mu       sync.Mutex
	from     int // first packet of the measurement
	sent     []time.Time
	rtt      []time.Duration // by packet; 0: no answer
	doubled  int
	late     int // answered after one that was sent later
	corrupt  int
	highest  int // newest packet that was answered
	sendErrs int
}

func (f *flow) start(seed uint64) {
	f.tape, f.stop, f.highest = tape(seed^tape(len(f.name)).word(7)), make(chan struct{}), -1
	f.wg.Go(f.sendLoop)
	f.wg.Go(f.receiveLoop)
}

func (f *flow) sendLoop() {
	ticker := time.NewTicker(flowEvery)
	defer ticker.Stop()
	b := make([]byte, flowLen)
	for {
		select {
		case <-f.stop:
			return
		case <-ticker.C:
		}
		f.mu.Lock()
		n := len(f.sent)
		if n == maxFlowPackets {
			f.mu.Unlock()
			return
		}
		f.sent, f.rtt = append(f.sent, time.Now()), append(f.rtt, 0)
		f.mu.Unlock()
		binary.BigEndian.PutUint64(b, uint64(n))
		f.tape.fill(b[8:], uint64(n)*flowLen)
		if err := f.send(b); err != nil {
			f.mu.Lock()
			f.sendErrs++ // it counts as lost, too
			f.mu.Unlock()
		}
	}
}

func (f *flow) receiveLoop() {
	b := make([]byte, 1<<16)
	for {
		p, err := f.recv(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && p != nil {
			f.note(p)
		}
	}
}

// note takes an answer into account.
func (f *flow) note(p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(p) != flowLen {
		f.corrupt++
		return
	}
	n := binary.BigEndian.Uint64(p)
	if n >= uint64(len(f.sent)) || f.tape.check(p[8:], n*flowLen) >= 0 {
		f.corrupt++
		return
	}
	i := int(n)
	if f.rtt[i] != 0 {
		f.doubled++
		return
	}
	f.rtt[i] = time.Since(f.sent[i])
	if i < f.highest {
		f.late++
	}
	f.highest = max(f.highest, i)
}

func (f *flow) mark() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.from, f.doubled, f.late, f.corrupt = len(f.sent), 0, 0, 0
}

// A flowReport is about the packets sent since the mark, those of the last two
// seconds left out unless they were answered.
type flowReport struct {
	Flow string
	Sent, Lost,
	Doubled, Late, Corrupt int
	// From the first to the last lost packet, and in one piece.
	LostSpan, LostRun time.Duration
	// Lost is when each was sent, since the mark's first packet.
	LostAt []time.Duration
	RTT    time.Duration // median
	MaxRTT time.Duration
}

func (f *flow) report() flowReport {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := flowReport{Flow: f.name, Doubled: f.doubled, Late: f.late, Corrupt: f.corrupt}
	var rtts []time.Duration
	run := 0
	first, last := time.Time{}, time.Time{}
	for i := f.from; i < len(f.sent); i++ {
		if f.rtt[i] == 0 && time.Since(f.sent[i]) < flowGrace {
			continue
		}
		r.Sent++
		if f.rtt[i] != 0 {
			rtts = append(rtts, f.rtt[i])
			run = 0
			continue
		}
		r.Lost++
		r.LostAt = append(r.LostAt, f.sent[i].Sub(f.sent[f.from]).Round(time.Millisecond))
		run++
		r.LostRun = max(r.LostRun, time.Duration(run)*flowEvery)
		if first.IsZero() {
			first = f.sent[i]
		}
		last = f.sent[i].Add(flowEvery)
	}
	r.LostSpan = last.Sub(first)
	if len(rtts) > 0 {
		slices.Sort(rtts)
		r.RTT, r.MaxRTT = rtts[len(rtts)/2], rtts[len(rtts)-1]
	}
	return r
}

func (f *flow) end() {
	close(f.stop)
	f.close()
	f.wg.Wait()
}

// udpFlow sends to a sink, through a SOCKS proxy unless that is empty.
func udpFlow(proxy string, to netip.AddrPort) (*flow, error) {
	if proxy == "" {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return nil, err
		}
		return &flow{
			name: "udp", close: func() { c.Close() },
			send: func(b []byte) error { _, err := c.Write(b); return err },
			recv: func(b []byte) ([]byte, error) { n, err := c.Read(b); return b[:n], err },
		}, nil
	}
	control, relay, err := socksRequest(proxy, socksAssociate, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	if err != nil {
		return nil, err
	}
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		control.Close()
		return nil, err
	}
	head := appendSOCKSAddress([]byte{0, 0, 0}, to)
	out := make([]byte, 0, len(head)+flowLen)
	return &flow{
		name: "udp", close: func() { c.Close(); control.Close() },
		send: func(b []byte) error {
			_, err := c.Write(append(append(out, head...), b...))
			return err
		},
		recv: func(b []byte) ([]byte, error) {
			n, err := c.Read(b)
			if err != nil || n < len(head) || string(b[:len(head)]) != string(head) {
				return nil, err // from elsewhere
			}
			return b[len(head):n], nil
		},
	}, nil
}

// pingFlow sends echo requests from this host, IPv4, with a raw socket.
func pingFlow(to netip.Addr) (*flow, error) {
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return nil, err
	}
	id, dst := os.Getpid()&0xffff, &net.IPAddr{IP: to.AsSlice()}
	seq := 0
	return &flow{
		name: "ping", close: func() { c.Close() },
		send: func(b []byte) error {
			seq++
			m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq & 0xffff, Data: b}}
			wire, err := m.Marshal(nil)
			if err != nil {
				return err
			}
			_, err = c.WriteTo(wire, dst)
			return err
		},
		recv: func(b []byte) ([]byte, error) {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return nil, err
			}
			m, err := icmp.ParseMessage(1, b[:n])
			if err != nil {
				return nil, fmt.Errorf("icmp: %w", err)
			}
			echo, ok := m.Body.(*icmp.Echo)
			if !ok || m.Type != ipv4.ICMPTypeEchoReply || echo.ID != id || from.String() != to.String() {
				return nil, nil
			}
			return echo.Data, nil
		},
	}, nil
}
