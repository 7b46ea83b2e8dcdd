package netstack

import (
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/faketime"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// holdBench is a flow table with a clock of its own, and one connection seen from
// both sides. Sequence numbers begin just below the wrap.
type holdBench struct {
	t     testing.TB
	clock *faketime.ManualClock
	table flowTable
	c     counters
	v4    bool
	fired int
}

const (
	holdISS = 0xfffff000
	holdMSS = 1000
)

func newHoldBench(t testing.TB, v4 bool) *holdBench {
	h := &holdBench{t: t, clock: faketime.NewManualClock(), v4: v4}
	h.table.init(h.clock, false, &h.c)
	h.table.hold.fire = func() { h.fired++ }
	t.Cleanup(h.table.hold.close)
	return h
}

func (h *holdBench) pass(d time.Duration) { h.clock.Advance(d) }

// options returns timestamps and SACK blocks, as gVisor and Linux write them.
func holdOptions(val, echo uint32, blocks ...uint32) []byte {
	o := binary.BigEndian.AppendUint32([]byte{1, 1, 8, 10}, val)
	o = binary.BigEndian.AppendUint32(o, echo)
	if len(blocks) > 0 {
		o = append(o, 1, 1, 5, byte(2+4*len(blocks)))
		for _, b := range blocks {
			o = binary.BigEndian.AppendUint32(o, b)
		}
	}
	return o
}

// sent tells the table that gVisor sends n bytes at seq.
func (h *holdBench) sent(seq, ack uint32, n int, options []byte) (held, strip bool) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: maxHeaders, Payload: buffer.MakeWithData(make([]byte, n)),
	})
	defer p.DecRef()
	p.TransportProtocolNumber = header.TCPProtocolNumber
	tcp := p.TransportHeader().Push(header.TCPMinimumSize + len(options))
	binary.BigEndian.PutUint16(tcp, 4000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13] = byte(len(tcp)/4)<<4, flagACK
	copy(tcp[header.TCPMinimumSize:], options)
	if h.v4 {
		ip := p.NetworkHeader().Push(header.IPv4MinimumSize)
		putIPv4(ip, protoTCP, client4, world4, 0, 0)
		binary.BigEndian.PutUint16(ip[2:], uint16(p.Size()))
	} else {
		putIPv6(p.NetworkHeader().Push(header.IPv6MinimumSize), protoTCP, client6, world6)
	}
	return h.table.out(p, h.table.now())
}

// got tells the table that n bytes at seq arrive from the peer.
func (h *holdBench) got(seq, ack uint32, n int, options []byte) (verdict, bool) {
	l4 := header.IPv6MinimumSize
	from, to := world6, client6
	if h.v4 {
		l4, from, to = header.IPv4MinimumSize, world4, client4
	}
	b := make([]byte, l4+header.TCPMinimumSize+len(options)+n)
	tcp := b[l4:]
	binary.BigEndian.PutUint16(tcp, 80)
	binary.BigEndian.PutUint16(tcp[2:], 4000)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13] = byte((header.TCPMinimumSize+len(options))/4)<<4, flagACK
	copy(tcp[header.TCPMinimumSize:], options)
	if h.v4 {
		putIPv4(b, protoTCP, from, to, 0, 0)
	} else {
		putIPv6(b, protoTCP, from, to)
	}
	p, ok := parseIP(b)
	if !ok {
		h.t.Fatal("not a packet")
	}
	return h.table.in(&p, 0, h.table.now())
}

// ack is got without data; blocks are in segments of holdMSS.
func (h *holdBench) ack(n uint32, echo uint32, blocks ...uint32) (verdict, bool) {
	for i := range blocks {
		blocks[i] = holdISS + blocks[i]*holdMSS
	}
	return h.got(77, holdISS+n*holdMSS, 0, holdOptions(500, echo, blocks...))
}

// flight sends the segments from first to last, last excluded, at timestamp ts.
func (h *holdBench) flight(first, last, ts uint32) {
	for i := first; i < last; i++ {
		if held, _ := h.sent(holdISS+i*holdMSS, 77, holdMSS, holdOptions(ts, 500)); held {
			h.t.Fatal("data was held back")
		}
	}
}

func (h *holdBench) release() []*heldList {
	var all []*heldList
	for _, d := range h.table.hold.due(h.table.now(), nil) {
		if l := h.table.release(d); l != nil {
			all = append(all, l)
		}
	}
	return all
}

func (h *holdBench) window() time.Duration { return h.table.paths[0].out.window(h.table.now(), 0, 0) }

func wantVerdict(t *testing.T, what string, got, want verdict) {
	t.Helper()
	if got != want {
		t.Errorf("%s: verdict %d, want %d", what, got, want)
	}
}

func TestHoldLate(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		h := newHoldBench(t, v4)
		h.flight(0, 10, 100)
		h.pass(200 * time.Microsecond)
		v, _ := h.ack(1, 100)
		wantVerdict(t, "progress", v, pass)
		v, _ = h.ack(1, 100)
		wantVerdict(t, "duplicate without SACK", v, pass)
		for i := uint32(3); i < 6; i++ {
			v, _ = h.ack(1, 100, 2, i)
			wantVerdict(t, "duplicate", v, held)
		}
		h.pass(800 * time.Microsecond)
		if l := h.release(); len(l) != 0 {
			t.Error("released before the window ended")
		}
		v, strip := h.ack(5, 100, 6, 7)
		wantVerdict(t, "progress", v, pass)
		if !strip {
			t.Error("gVisor sees the SACK blocks of progress")
		}
		if h.c.heldAcks.Load() != 3 || h.c.heldDropped.Load() != 3 {
			t.Errorf("held %d, dropped %d", h.c.heldAcks.Load(), h.c.heldDropped.Load())
		}
		if got, want := h.window(), holdMin+800*time.Microsecond*5/4; got != want {
			t.Errorf("the window is %v, want %v", got, want)
		}
		h.pass(2 * holdMemory)
		if got := h.window(); got != holdMin {
			t.Errorf("the window is %v after a while", got)
		}
		if len(h.table.hold.active) != 0 {
			t.Error("a list waits for nothing")
		}
	}
}

// After the window everything passes, until what was in flight is acknowledged.
// Whether the retransmission was for nothing, the echoed timestamp says.
func TestHoldLost(t *testing.T) {
	for _, spurious := range []bool{false, true} {
		h := newHoldBench(t, true)
		h.flight(0, 10, 100)
		_, _ = h.ack(0, 100)
		for i := uint32(2); i < 5; i++ {
			v, _ := h.ack(0, 100, 1, i)
			wantVerdict(t, "duplicate", v, held)
		}
		h.pass(holdMin)
		if h.fired == 0 {
			t.Error("the timer has not fired")
		}
		l := h.release()
		if len(l) != 1 || l[0].n != 3 {
			t.Fatalf("released %v", l)
		}
		v, strip := h.ack(0, 100, 1, 6)
		if v != pass || strip {
			t.Errorf("in recovery: verdict %d, strip %v", v, strip)
		}
		h.sent(holdISS, 77, holdMSS, holdOptions(103, 500)) // again
		h.pass(4 * time.Millisecond)
		echo := uint32(103)
		if spurious {
			echo = 100
		}
		v, _ = h.ack(7, echo)
		wantVerdict(t, "progress", v, pass)
		v, _ = h.ack(7, echo, 8, 9)
		// A recovery for nothing needs no duplicates.
		wantVerdict(t, "duplicate in recovery", v, map[bool]verdict{false: pass, true: held}[spurious])
		h.flight(10, 12, 105)
		v, _ = h.ack(10, 105)
		wantVerdict(t, "end of recovery", v, pass)
		v, _ = h.ack(11, 105)
		if want := map[bool]verdict{false: pass, true: passRestart}[spurious]; v != want {
			t.Errorf("spurious %v: verdict %d after recovery, want %d", spurious, v, want)
		}
		if got := h.window() > holdMin; got != spurious {
			t.Errorf("spurious %v: the window is %v", spurious, h.window())
		}
		h.flight(12, 20, 110)
		v, _ = h.ack(11, 105, 13, 14)
		wantVerdict(t, "duplicate after recovery", v, held)
	}
}

// Where data lies in queues, segments may be as late as that.
func TestHoldQueue(t *testing.T) {
	h := newHoldBench(t, true)
	h.flight(0, 1, 100)
	h.pass(2 * time.Millisecond)
	_, _ = h.ack(1, 100)
	h.flight(1, 10, 102)
	h.pass(30 * time.Millisecond)
	_, _ = h.ack(10, 102)
	h.flight(10, 20, 132)
	v, _ := h.ack(10, 102, 11, 12)
	wantVerdict(t, "duplicate", v, held)
	h.pass(27 * time.Millisecond)
	if l := h.release(); len(l) != 0 {
		t.Error("released although the queue is longer")
	}
	h.pass(time.Millisecond)
	if l := h.release(); len(l) != 1 || l[0].n != 1 {
		t.Errorf("released %v", l)
	}
}

// A peer that reports duplicates widens the window, once for each recovery.
func TestHoldDSACK(t *testing.T) {
	h := newHoldBench(t, true)
	h.flight(0, 10, 100)
	_, _ = h.ack(5, 100)
	before := h.window()
	for range 5 {
		v, _ := h.ack(5, 100, 2, 3) // below the acknowledgement
		wantVerdict(t, "a report alone", v, pass)
	}
	if got := h.window(); got <= before || got > 4*before {
		t.Errorf("the window went from %v to %v", before, got)
	}
	v, _ := h.ack(5, 100, 7, 8, 6, 9)
	wantVerdict(t, "a report with news", v, held)
}

// Too many duplicates: those that stay still tell of every segment. Too few:
// gVisor gets three.
func TestHoldLists(t *testing.T) {
	h := newHoldBench(t, false)
	h.flight(0, 200, 100)
	_, _ = h.ack(0, 100)
	for i := uint32(1); i < 190; i += 2 {
		_, _ = h.ack(0, 100, i, i+1)
	}
	h.pass(holdMin)
	l := h.release()
	if len(l) != 1 || l[0].n > heldAcks || l[0].n < heldAcks/2 {
		t.Fatalf("released %v", l)
	}
	for i := range l[0].n {
		if _, ok := parseIP(l[0].buf[i][:l[0].size[i]]); !ok {
			t.Errorf("%x is no packet", l[0].buf[i][:l[0].size[i]])
		}
	}
	h = newHoldBench(t, true)
	h.flight(0, 3, 100)
	_, _ = h.ack(0, 100)
	_, _ = h.ack(0, 100, 2, 3)
	h.pass(holdMin)
	l = h.release()
	if len(l) != 1 {
		t.Fatal("nothing released")
	}
	l[0].enough()
	var ends []uint32
	for i := range l[0].n {
		p, ok := parseIP(l[0].buf[i][:l[0].size[i]])
		if !ok {
			t.Fatal("no packet")
		}
		b := sackBlocks(p.payload()[header.TCPMinimumSize:])
		if got := binary.BigEndian.Uint32(b) - holdISS; got != 2*holdMSS {
			t.Errorf("a block from %d", got)
		}
		ends = append(ends, binary.BigEndian.Uint32(b[4:])-holdISS)
	}
	if want := []uint32{2333, 2666, 3000}; !slices.Equal(ends, want) {
		t.Errorf("blocks up to %d, want %d", ends, want)
	}
}

// When too many connections wait, the others don't.
func TestHoldBounds(t *testing.T) {
	h := newHoldBench(t, true)
	for range holds {
		if h.table.hold.get(new(flowSet), new(flowKey), false, 1, 1e9) == nil {
			t.Fatal("no list")
		}
	}
	h.flight(0, 10, 100)
	_, _ = h.ack(0, 100)
	v, _ := h.ack(0, 100, 2, 5)
	wantVerdict(t, "one too many", v, pass)
	// The table is as large as it is, and what is thrown out holds nothing.
	h = newHoldBench(t, true)
	h.flight(0, 10, 100)
	_, _ = h.ack(0, 100)
	_, _ = h.ack(0, 100, 2, 5)
	k := flowKey{v4: true, ports: [4]byte{4000 >> 8, 4000 & 255, 0, 80}}
	a, b := client4.As4(), world4.As4()
	copy(k.local[:], a[:])
	copy(k.remote[:], b[:])
	s := h.table.set(&k, false)
	if s == nil || s.findLocked(&k) == nil {
		t.Fatal("the connection isn't known")
	}
	for i := range flowWays {
		o := k
		o.ports[2] = byte(i + 1)
		f := h.table.claimLocked(s, &o)
		f.used = h.table.now() + int64(i)
	}
	if s.findLocked(&k) != nil || len(h.table.hold.active) != 0 {
		t.Errorf("%d lists are left of a connection that was thrown out", len(h.table.hold.active))
	}
}

// gVisor's duplicates wait, too, unless the segment that fills the hole was sent
// again.
func TestMute(t *testing.T) {
	for _, again := range []bool{false, true} {
		h := newHoldBench(t, !again)
		in := func(n, ts uint32) { _, _ = h.got(holdISS+n*holdMSS, 5, holdMSS, holdOptions(ts, 100)) }
		out := func(n, echo uint32, blocks ...uint32) (held, strip bool) {
			for i := range blocks {
				blocks[i] = holdISS + blocks[i]*holdMSS
			}
			return h.sent(5, holdISS+n*holdMSS, 0, holdOptions(100, echo, blocks...))
		}
		out(0, 500)
		in(0, 500)
		out(1, 500)
		for i := uint32(2); i < 5; i++ {
			in(i, 500+i)
			if held, _ := out(1, 500, 2, i+1); !held {
				t.Error("a duplicate left")
			}
		}
		ts := uint32(501)
		wait := 700 * time.Microsecond
		if again {
			ts, wait = 520, 10*time.Millisecond
		}
		h.pass(wait)
		if l := h.release(); len(l) > 0 != again {
			t.Errorf("released %v", l)
		} else if again && (!l[0].ours || l[0].n != 3) {
			t.Errorf("released %+v", l[0])
		}
		if held, strip := out(1, 500, 2, 6); held == again || strip {
			t.Errorf("again %v: held %v, strip %v", again, held, strip)
		}
		in(1, ts)
		held, strip := out(5, ts, 6, 7)
		if held || strip == false {
			t.Errorf("progress: held %v, strip %v", held, strip)
		}
		if got := h.table.paths[0].in.window(h.table.now(), 0, 0) > holdMin; got == again {
			t.Errorf("again %v: the window is %v", again, h.table.paths[0].in.window(h.table.now(), 0, 0))
		}
	}
}

// The peers of a stack that forwards wait by themselves.
func TestMuteForward(t *testing.T) {
	h := newHoldBench(t, true)
	h.table.many = true
	_, _ = h.sent(5, holdISS, 0, holdOptions(100, 500))
	_, _ = h.got(holdISS+holdMSS, 5, holdMSS, holdOptions(500, 100))
	for range 2 {
		if held, strip := h.sent(5, holdISS, 0, holdOptions(100, 500, holdISS+holdMSS, holdISS+2*holdMSS)); held || strip {
			t.Errorf("held %v, strip %v", held, strip)
		}
	}
}

// What is withheld is said before what is known to have left it out, and what leaves
// for the network is said twice.
func TestHeldListEach(t *testing.T) {
	for _, ours := range []bool{false, true} {
		h := newHoldBench(t, true)
		k := flowKey{v4: true}
		l := h.table.hold.get(nil, &k, ours, 1, 2)
		tell := func(blocks ...uint32) {
			ip := make([]byte, header.IPv4MinimumSize+header.TCPMinimumSize)
			ip[header.IPv4MinimumSize+12] = byte((header.TCPMinimumSize + len(holdOptions(1, 2, blocks...))) / 4 << 4)
			ip = append(ip, holdOptions(1, 2, blocks...)...)
			putIPv4(ip, protoTCP, client4, world4, 0, 0)
			copy(l.next(len(ip)), ip)
		}
		tell(90, 91, 80, 85)
		tell(90, 92, 80, 85)
		tell(90, 93, 80, 85)
		l.more = spans{{10, 20}, {30, 40}, {50, 60}, {81, 82}, {90, 93}}
		var got [][2]span
		l.each(func(b []byte) {
			x := l.blocks(b)
			got = append(got, [2]span{blockOf(x), blockOf(x[8:])})
		})
		want := [][2]span{
			{{10, 20}, {30, 40}},
			{{50, 60}, {80, 85}},
			{{90, 91}, {80, 85}},
			{{90, 92}, {80, 85}},
			{{90, 93}, {80, 85}},
		}
		if ours {
			want = append(want, [2]span{{10, 20}, {30, 40}}, [2]span{{50, 60}, {90, 93}})
		}
		if !slices.Equal(got, want) {
			t.Errorf("ours %v: %v, want %v", ours, got, want)
		}
	}
}

func TestStripSACK(t *testing.T) {
	tcp := append(make([]byte, header.TCPMinimumSize), holdOptions(1, 2, 3, 4, 5, 6)...)
	tcp[12] = byte(len(tcp)/4) << 4
	stripSACK(tcp)
	if val, echo, ok := timestamps(tcp[header.TCPMinimumSize:]); val != 1 || echo != 2 || !ok {
		t.Errorf("timestamps %d, %d, %v", val, echo, ok)
	}
	if b := sackBlocks(tcp[header.TCPMinimumSize:]); b != nil {
		t.Errorf("blocks %x", b)
	}
	for _, o := range [][]byte{{5}, {5, 0}, {5, 1, 0, 0}, {5, 200}, {9, 9, 9, 9}, {1, 1, 1, 5}, {0, 5, 10, 1}} {
		if tcpOption(o, 5) != nil {
			t.Errorf("%x has SACK blocks", o)
		}
		tcp := append(make([]byte, header.TCPMinimumSize), o...)
		tcp[12] = byte(len(tcp)/4) << 4
		stripSACK(tcp)
	}
}

// Nothing is allocated for a packet of a connection that is known.
func TestFlowsAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools lose elements")
	}
	h := newHoldBench(t, true)
	h.flight(0, 100, 100)
	_, _ = h.ack(0, 100)
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: maxHeaders})
	defer p.DecRef()
	p.TransportProtocolNumber = header.TCPProtocolNumber
	tcp := p.TransportHeader().Push(header.TCPMinimumSize)
	binary.BigEndian.PutUint16(tcp, 4000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	tcp[12], tcp[13] = 5<<4, flagACK
	putIPv4(p.NetworkHeader().Push(header.IPv4MinimumSize), protoTCP, client4, world4, 0, 0)
	in := tcpPacket(tcpSpec{v4: true, ttl: 64, sport: 80, flags: flagACK, payload: make([]byte, 100)})
	copy(in[12:20], slices.Concat(world4.AsSlice(), client4.AsSlice()))
	binary.BigEndian.PutUint16(in[22:], 4000)
	v, ok := parseIP(in)
	if n := testing.AllocsPerRun(100, func() {
		h.table.out(p, 5)
		_, _ = h.table.in(&v, 0, 5)
	}); n != 0 || !ok {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkFlows(b *testing.B) {
	h := newHoldBench(b, true)
	h.flight(0, 100, 100)
	in := tcpPacket(tcpSpec{v4: true, ttl: 64, sport: 80, flags: flagACK, payload: make([]byte, 100)})
	copy(in[12:20], slices.Concat(world4.AsSlice(), client4.AsSlice()))
	binary.BigEndian.PutUint16(in[22:], 4000)
	v, _ := parseIP(in)
	for b.Loop() {
		_, _ = h.table.in(&v, 0, h.table.now())
	}
}

// After a gap the data that netstack sends goes on at once, and that which its
// peer sends, since netstack as a peer understands what Resume says.
func TestResume(t *testing.T) {
	for _, at := range []netip.Addr{server4, server6} {
		for _, up := range []bool{true, false} {
			p := newPair(t)
			c, s := p.connect(t, at)
			from, to, sender := c, s, p.client
			if !up {
				from, to, sender = s, c, p.server
			}
			_ = from.SetDeadline(time.Time{})
			_ = to.SetDeadline(time.Time{})
			var got atomic.Int64
			go func() { _, _ = io.Copy(struct{ io.Writer }{from}, &pattern{bytes: 1 << 40}) }()
			go func() {
				buf := make([]byte, 1<<16)
				for {
					n, err := to.Read(buf)
					if got.Add(int64(n)); err != nil {
						return
					}
				}
			}()
			until := func(what string, ok func() bool) {
				t.Helper()
				for began := time.Now(); !ok(); time.Sleep(time.Millisecond) {
					if time.Since(began) > 20*time.Second {
						t.Fatalf("up %v: %s", up, what)
					}
				}
			}
			until("nothing arrives", func() bool { return got.Load() > 0 })
			data := map[bool]*way{true: p.up, false: p.down}[up]
			cut := func(v bool) { data.mu.Lock(); data.cut = v; data.mu.Unlock() }
			cut(true)
			began := time.Now()
			p.client.Suspect(true)
			n := sender.st.Stats().TCP.Timeouts.Value()
			until("nothing is sent again", func() bool { return sender.st.Stats().TCP.Timeouts.Value() >= n+2 })
			cut(false)
			had := got.Load()
			p.client.Resume(time.Since(began))
			until("the sender has not sent again", func() bool { return sender.Stats().GapResent > 0 })
			until("nothing arrives after the gap", func() bool { return got.Load() > had })
			if n := p.client.Stats().GapNudged; (n > 0) == up {
				t.Errorf("up %v: nudged %d", up, n)
			}
			p.close()
		}
	}
}
