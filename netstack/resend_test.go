package netstack

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The holes of a log against a twin that remembers every byte.
func TestHolesAgainstTwin(t *testing.T) {
	const size = 400
	rng := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		base := rng.Uint32()
		if rng.IntN(2) == 0 {
			base = -rng.Uint32N(size) // about to wrap
		}
		var twin [size]bool // arrived
		g := &sendLog{top: base, mss: 1}
		una, top := 0, 0
		for i := 0; i < 30 && una < size; i++ {
			if rng.IntN(4) == 0 {
				n := rng.IntN(size-una+1) / 4
				for i := range n {
					twin[una+i] = true
				}
				una += n
				for una < size && twin[una] {
					una++
				}
				top = max(top, una)
				g.acked(base+uint32(una), 0)
			} else {
				var b []byte
				for range 1 + rng.IntN(4) {
					from := rng.IntN(size)
					to := from + rng.IntN(size-from+1)
					if rng.IntN(3) > 0 {
						to = min(to, from+20)
					}
					b = binary.BigEndian.AppendUint32(b, base+uint32(from))
					b = binary.BigEndian.AppendUint32(b, base+uint32(to))
					if from <= una || to <= from { // the byte at una hasn't arrived
						copy(b[len(b)-4:], b[len(b)-8:]) // an empty block
						continue
					}
					for i := from; i < to; i++ {
						twin[i] = true
					}
					top = max(top, to)
				}
				g.reported(b, base+uint32(una), base+size, 1)
			}
			var got, want []int
			for _, h := range g.holes {
				for s := h.start; s != h.end; s++ {
					got = append(got, int(s-base))
				}
			}
			for i := una; i < top; i++ {
				if !twin[i] {
					want = append(want, i)
				}
			}
			if !slices.Equal(got, want) || g.top != base+uint32(top) {
				t.Fatalf("from %#x, acknowledged %d: holes %v up to %d, want %v up to %d", base, una, got, g.top-base, want, top)
			}
		}
	}
}

// mendBench is a busy connection with 99 segments in flight, on a path of 40 ms.
func mendBench(t *testing.T) *holdBench {
	h := newHoldBench(t, true)
	h.flight(0, 1, 100)
	h.pass(40 * time.Millisecond)
	_, _ = h.ack(1, 100)
	h.flow().logs = logState{until: h.table.now() + int64(logIdle), credit: hideBurst * holdMSS}
	h.flight(1, 100, 140)
	h.pass(40 * time.Millisecond)
	return h
}

func (h *holdBench) flow() *tcpFlow {
	for i := range h.table.sets {
		if s := h.table.sets[i].Load(); s != nil {
			for j := range s.ways {
				if s.ways[j].used != 0 {
					return &s.ways[j]
				}
			}
		}
	}
	h.t.Fatal("no flow")
	return nil
}

// due does what releaseHeld does. It returns the segments sent again, by number,
// and whether gVisor was told.
func (h *holdBench) due() (again []uint32, told bool) {
	for _, d := range h.table.hold.due(h.table.now(), nil) {
		r, ok := h.table.mend(d, nil)
		for i := range r {
			x := &r[i]
			seq := binary.BigEndian.Uint32(x.p.TransportHeader().Slice()[4:]) + uint32(x.skip) - holdISS
			for ; x.n > 0; x.n -= x.mss {
				again = append(again, seq/holdMSS)
				seq += uint32(x.mss)
			}
			x.p.DecRef()
		}
		if !ok {
			l := h.table.release(d)
			told = told || l != nil && l.n > 0
		}
	}
	return again, told
}

func (h *holdBench) wantDue(what string, want []uint32, told bool) {
	h.t.Helper()
	if got, tell := h.due(); !slices.Equal(got, want) || tell != told {
		h.t.Errorf("%s: sent %v again, want %v; gVisor was told: %v", what, got, want, tell)
	}
}

// A few lost segments are sent again without gVisor's knowledge, a lost
// retransmission, too, and the packets are let go when they are acknowledged.
func TestMend(t *testing.T) {
	h := mendBench(t)
	p := h.flow().log.pkts[10].p // segment 11 and further
	p.IncRef()
	defer p.DecRef()
	for i := uint32(12); i < 30; i++ {
		if i == 20 || i == 21 {
			continue
		}
		v, _ := h.ack(11, 140, 12, min(i+1, 20))
		if i >= 22 {
			v, _ = h.ack(11, 140, 22, i+1, 12, 20)
		}
		wantVerdict(t, "duplicate", v, map[bool]verdict{true: pass, false: held}[i == 12])
	}
	h.wantDue("before the window ends", nil, false)
	h.pass(holdRTT)
	h.wantDue("after the window", []uint32{11, 20, 21}, false)
	h.wantDue("at once again", nil, false)
	h.flight(100, 101, 150)
	h.pass(30 * time.Millisecond)
	v, strip := h.ack(20, 150, 22, 60)
	if v != pass || !strip {
		t.Errorf("progress: verdict %d, strip %v", v, strip)
	}
	if n := p.ReadRefs(); n != 1 {
		t.Errorf("%d references to an acknowledged packet", n)
	}
	h.pass(60 * time.Millisecond)
	h.wantDue("the second was lost again", []uint32{20, 21}, false)
	h.flight(101, 102, 240)
	h.pass(40 * time.Millisecond)
	v, _ = h.ack(90, 240)
	wantVerdict(t, "progress", v, pass)
	if len(h.table.hold.active) != 0 || h.c.heldReleased.Load() != 0 {
		t.Errorf("%d lists wait, %d acknowledgements were released", len(h.table.hold.active), h.c.heldReleased.Load())
	}
	if got := h.window(); got != holdMin {
		t.Errorf("loss was taken for reordering: the window is %v", got)
	}
	v, _ = h.ack(102, 240)
	wantVerdict(t, "the end", v, pass)
	if h.flow().log != nil {
		t.Error("packets are kept without anything in flight")
	}
}

// What may be congestion, gVisor sees.
func TestMendGivesUp(t *testing.T) {
	lose := func(h *holdBench) {
		for i := uint32(3); i < 9; i++ {
			_, _ = h.ack(2, 140, 3, i)
		}
	}
	t.Run("much is lost", func(t *testing.T) {
		h := mendBench(t)
		for i := uint32(60); i < 66; i++ {
			_, _ = h.ack(2, 140, 59, i)
		}
		h.pass(holdRTT)
		credit := h.flow().log.credit
		h.wantDue("57 segments", nil, true)
		if left := h.flow().logs.credit; left != credit {
			t.Errorf("what gVisor was told of has cost %d bytes of credit", credit-left)
		}
		v, _ := h.ack(2, 140, 59, 70)
		wantVerdict(t, "afterwards", v, pass)
		// What is sent while gVisor recovers can be mended afterwards.
		h.flight(100, 120, 160)
		_, _ = h.ack(100, 160)
		h.flow().log.credit = hideBurst * holdMSS // as it is some time later
		_, _ = h.ack(101, 160, 102, 105)
		h.pass(holdMax)
		h.wantDue("after recovery", []uint32{101}, false)
	})
	t.Run("what gVisor sends again is not sent twice", func(t *testing.T) {
		h := mendBench(t)
		for i := uint32(60); i < 63; i++ {
			_, _ = h.ack(2, 140, 59, i)
		}
		h.pass(holdRTT)
		h.wantDue("57 segments", nil, true)
		h.flight(100, 140, 160)
		_, _ = h.ack(2, 140, 105, 110) // 100 to 104 are missing as well
		h.pass(holdMax - holdRTT)
		h.flight(101, 102, 161) // gVisor has seen it, too
		h.pass(holdRTT)
		_, _ = h.ack(100, 160, 105, 110) // the end of recovery
		h.flow().log.credit = hideBurst * holdMSS
		_, _ = h.ack(100, 160, 105, 111)
		h.wantDue("afterwards", []uint32{100, 102, 103, 104}, false)
	})
	t.Run("again and again", func(t *testing.T) {
		h := mendBench(t)
		for i := uint32(1); i < 95; i += 3 { // one in three
			_, _ = h.ack(i, 140, i+1, i+2)
			h.pass(holdRTT)
			if _, told := h.due(); told {
				return
			}
		}
		t.Error("gVisor learns nothing of the loss of every third segment")
	})
	t.Run("a queue", func(t *testing.T) {
		h := mendBench(t)
		_, _ = h.ack(100, 140)
		h.flight(100, 200, 180)
		h.pass(125 * time.Millisecond)
		_, _ = h.ack(200, 180)
		h.flight(200, 300, 300)
		h.pass(125 * time.Millisecond)
		_, _ = h.ack(201, 300)
		_, _ = h.ack(201, 300, 202, 205)
		h.pass(holdMax)
		h.wantDue("the round trip has grown", nil, true)
	})
	t.Run("no queue, but one late answer", func(t *testing.T) {
		h := mendBench(t)
		_, _ = h.ack(100, 140)
		h.flight(100, 200, 180)
		h.pass(125 * time.Millisecond)
		_, _ = h.ack(200, 180)
		h.flight(200, 300, 300)
		_, _ = h.ack(200, 180, 201, 205)
		h.pass(holdMax)
		h.wantDue("mended", []uint32{200}, false)
	})
	t.Run("a dead path", func(t *testing.T) {
		h := mendBench(t)
		lose(h)
		h.pass(holdRTT)
		h.wantDue("first", []uint32{2}, false)
		for range 20 {
			h.pass(holdRTT)
			if _, told := h.due(); told {
				if age := h.table.now() - h.flow().hold.since; age > int64(hideMax-40*time.Millisecond) {
					t.Errorf("gVisor learns of it after %v", time.Duration(age))
				}
				return
			}
		}
		t.Error("gVisor is never told")
	})
	t.Run("gVisor sends again itself", func(t *testing.T) {
		h := mendBench(t)
		lose(h)
		h.sent(holdISS+2*holdMSS, 77, holdMSS, holdOptions(190, 500))
		if h.flow().log != nil {
			t.Error("the device mends, too")
		}
	})
	t.Run("not in the log", func(t *testing.T) {
		h := newHoldBench(t, true)
		_, _ = h.sent(holdISS, 77, holdMSS, holdOptions(100, 500))
		_, _ = h.ack(0, 100)
		h.flight(1, 40, 100)
		_, _ = h.ack(0, 100, 1, 5)
		h.pass(holdMin)
		h.wantDue("the first segment", nil, true)
	})
	t.Run("a reset", func(t *testing.T) {
		h := mendBench(t)
		p := h.flow().log.pkts[50].p
		p.IncRef()
		defer p.DecRef()
		f := h.flow()
		h.table.forgetLocked(f)
		if n := p.ReadRefs(); n != 1 {
			t.Errorf("%d references to a packet of a connection that is gone", n)
		}
	})
}

// What has arrived behind the first hole counts, too, for what may be hidden.
func TestMendFullWindow(t *testing.T) {
	const n = 4000
	h := mendBench(t)
	_, _ = h.ack(100, 140)
	h.flight(100, n, 180)
	h.pass(40 * time.Millisecond)
	var lost, b []uint32
	for i := uint32(100); i < n-60; i += 60 {
		lost = append(lost, i)
		b = append([]uint32{i + 1, i + 60}, b[:min(len(b), 4)]...)
		_, _ = h.ack(100, 180, slices.Clone(b)...)
	}
	h.pass(holdRTT)
	h.wantDue("one in sixty", lost, false)
}

// A round trip ends when the segment is reported, also while gVisor recovers and
// nothing is kept: recovery itself is no sign of a queue.
func TestMendRoundTrip(t *testing.T) {
	h := mendBench(t)
	h.flow().openUntil(h.flow().sent)
	_, _ = h.ack(50, 140)
	h.flight(100, 102, 180)
	h.pass(40 * time.Millisecond)
	_, _ = h.ack(50, 180, 51, 101)
	h.pass(100 * time.Millisecond)
	_, _ = h.ack(102, 180)
	if got := h.flow().recent.most(); got != 40*time.Millisecond {
		t.Errorf("the round trip took %v", got)
	}
}

// When gVisor is to recover it gets to know all that has arrived, though the
// acknowledgements that wait, and those without their blocks, say only the latest.
func TestMendTellsAll(t *testing.T) {
	h := mendBench(t)
	var want, got spans
	var b []uint32
	for i := uint32(2); i < 96; i += 8 { // each comes with an acknowledgement that moves on
		from, to := i+4, i+7
		want.add(span{holdISS + from*holdMSS, holdISS + to*holdMSS}, maxHoles)
		b = append([]uint32{from, to}, b[:min(len(b), 4)]...)
		_, _ = h.ack(1+i/32, 140, slices.Clone(b)...)
	}
	h.flow().log.credit = 0
	h.pass(holdRTT)
	for _, d := range h.table.hold.due(h.table.now(), nil) {
		if _, ok := h.table.mend(d, nil); ok {
			t.Error("mended without credit")
		}
		l := h.table.release(d)
		l.each(func(ack []byte) {
			for b := l.blocks(ack); len(b) >= 8; b = b[8:] {
				got.add(blockOf(b), maxHoles)
			}
		})
	}
	if !slices.Equal(got, want) {
		t.Errorf("gVisor knows of %v, want %v", got, want)
	}
}

// A part of a super-segment is sent again as it was cut the first time, but for
// what changes.
func TestRepeat(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		const mss, data = 1000, 8500
		var out [][]byte
		d := newDevice(&Config{MTU: 1400, Headroom: testHeadroom, Tailroom: testTailroom, Output: func(pkts [][]byte) {
			for _, p := range pkts {
				out = append(out, bytes.Clone(p[testHeadroom:len(p)-testTailroom]))
			}
		}})
		payload := make([]byte, data)
		for i := range payload {
			payload[i] = byte(i*7 + i>>8)
		}
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: maxHeaders, Payload: buffer.MakeWithData(payload)})
		defer p.DecRef()
		p.GSOOptions = stack.GSO{Type: stack.GSOTCPv4, MSS: mss}
		options := holdOptions(7, 8, 1, 2)
		tcp := p.TransportHeader().Push(header.TCPMinimumSize + len(options))
		binary.BigEndian.PutUint32(tcp[4:], holdISS)
		tcp[12], tcp[13] = byte(len(tcp)/4)<<4, flagACK|flagPSH
		copy(tcp[header.TCPMinimumSize:], options)
		l4 := header.IPv4MinimumSize
		if v4 {
			ip := p.NetworkHeader().Push(l4)
			putIPv4(ip, protoTCP, client4, world4, 0, 0)
			binary.BigEndian.PutUint16(ip[4:], 100)
		} else {
			l4 = header.IPv6MinimumSize
			putIPv6(p.NetworkHeader().Push(l4), protoTCP, client6, world6)
		}
		b := d.batch()
		b.put(p, false)
		b.done()
		first := out
		out = nil
		b = d.batch()
		b.repeat(&repeat{p: p.IncRef(), skip: 3 * mss, n: 2 * mss, mss: mss, ack: 55, window: 66, tsVal: 9, tsE: 10})
		b.repeat(&repeat{p: p.IncRef(), skip: 8 * mss, n: 500, mss: mss, ack: 55, window: 66, tsVal: 9, tsE: 10})
		b.done()
		want := [][]byte{first[3], first[4], first[8]}
		for i := range want {
			w := bytes.Clone(want[i])
			stripSACK(w[l4:])
			binary.BigEndian.PutUint32(w[l4+8:], 55)
			w[l4+13] &^= flagPSH
			binary.BigEndian.PutUint16(w[l4+14:], 66)
			binary.BigEndian.PutUint32(w[l4+header.TCPMinimumSize+4:], 9)
			binary.BigEndian.PutUint32(w[l4+header.TCPMinimumSize+8:], 10)
			if i >= len(out) || !bytes.Equal(out[i], w) {
				t.Errorf("IPv4 %v: segment %d:\n%x, want\n%x", v4, i, out[i][:l4+40], w[:l4+40])
			}
		}
		if n := p.ReadRefs(); n != 1 {
			t.Errorf("%d references", n)
		}
	}
}

// A busy sender that loses one packet in three hundred: its data arrive as they
// were, and gVisor learns of few losses.
func TestMendTransfer(t *testing.T) {
	p := newPair(t)
	c, s := p.connect(t, server6)
	const size = 24 << 20
	n := 0
	p.up.mu.Lock()
	p.up.edit = func(b []byte) []byte {
		if n++; n > 3000 && n%300 == 0 && len(b) > 1000 {
			return nil
		}
		return b
	}
	p.up.mu.Unlock()
	go func() {
		_, _ = io.Copy(struct{ io.Writer }{c}, &pattern{bytes: size})
		_ = c.CloseWrite()
	}()
	got, want := sha256.New(), sha256.New()
	_, _ = io.Copy(want, &pattern{bytes: size})
	if n, err := io.Copy(got, struct{ io.Reader }{s}); err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("the data are not what they were")
	}
	st := p.client.Stats()
	t.Logf("mended %d, sent again by gVisor %d", st.LossesMended, st.TCPRetransmits)
	if st.LossesMended == 0 {
		t.Error("no loss was mended")
	}
	c.Close()
	s.Close()
}

func BenchmarkLog(b *testing.B) {
	h := newHoldBench(b, true)
	_, _ = h.sent(holdISS, 77, holdMSS, holdOptions(100, 500))
	_, _ = h.ack(1, 100)
	h.flight(1, 100, 100)
	f := h.flow()
	p := f.log.pkts[0].p
	for b.Loop() {
		f.logSent(p, f.sent, f.sent+holdMSS, 1)
		f.sent += holdMSS
		f.una += holdMSS
		f.log.acked(f.una, int(f.sent-f.una))
	}
}
