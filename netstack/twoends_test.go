package netstack

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// twoEnds is a connection between the devices of two stacks on a path of 20 ms
// each way, without the stacks: a sender that always has something to send, and a
// receiver that acknowledges as gVisor's does.
type twoEnds struct {
	a, b *holdBench // sender, receiver

	now  uint32 // ms
	sent uint32 // segments
	lost map[uint32]bool
	data []onItsWay // to b
	acks []onItsWay // to a
	rng  *rand.Rand

	// The receiver: the next segment, what has arrived, and the latest blocks.
	next   uint32
	have   map[uint32]bool
	blocks []span

	again []uint32 // segments that a's device has sent again
	told  int      // lists that a's stack was given
}

// onItsWay is a segment with data, by its number, or an acknowledgement.
type onItsWay struct {
	at, n uint32
	ack   []byte
}

const oneWay = 20 // ms

func newTwoEnds(t *testing.T, forward bool) *twoEnds {
	e := &twoEnds{
		a: newHoldBench(t, true), b: newHoldBench(t, true),
		lost: map[uint32]bool{}, have: map[uint32]bool{}, rng: rand.New(rand.NewPCG(7, 8)),
	}
	e.b.table.many = forward
	// The handshake: both know the round trip.
	_, _ = e.a.sent(holdISS, 77, holdMSS, holdOptions(0, 0))
	_, _ = e.b.sent(77, holdISS, 1, holdOptions(0, 0))
	e.tick(2 * oneWay)
	_, _ = e.b.got(holdISS, 78, holdMSS, holdOptions(0, 0))
	_, _ = e.b.sent(78, holdISS+holdMSS, 0, holdOptions(0, 0))
	_, _ = e.a.ack(1, 0)
	e.sent, e.next = 1, 1
	e.a.flow().logs = logState{until: e.a.table.now() + int64(logIdle), credit: hideBurst * holdMSS}
	return e
}

func (e *twoEnds) tick(ms uint32) {
	e.now += ms
	e.a.pass(time.Duration(ms) * time.Millisecond)
	e.b.pass(time.Duration(ms) * time.Millisecond)
}

// step is a millisecond in which n new segments are sent.
func (e *twoEnds) step(n int) {
	for ; n > 0; n-- {
		e.a.flight(e.sent, e.sent+1, e.now)
		if !e.lost[e.sent] {
			e.data = append(e.data, onItsWay{at: e.now + oneWay, n: e.sent})
		}
		e.sent++
	}
	for len(e.data) > 0 && e.data[0].at <= e.now {
		e.arrive(e.data[0].n)
		e.data = e.data[1:]
	}
	for _, d := range e.b.table.hold.due(e.b.table.now(), nil) {
		if l := e.b.table.release(d); l != nil {
			l.each(func(b []byte) { e.leave(b[header.IPv4MinimumSize:]) })
		}
	}
	for len(e.acks) > 0 && e.acks[0].at <= e.now {
		tcp := e.acks[0].ack
		_, _ = e.a.got(78, binary.BigEndian.Uint32(tcp[8:]), 0, tcp[header.TCPMinimumSize:])
		e.acks = e.acks[1:]
	}
	again, told := e.a.due()
	for _, n := range again {
		e.data = append(e.data, onItsWay{at: e.now + oneWay, n: n})
	}
	e.again = append(e.again, again...)
	if told {
		e.told++
	}
	e.tick(1)
}

// arrive is a segment at the receiver.
func (e *twoEnds) arrive(n uint32) {
	_, _ = e.b.got(holdISS+n*holdMSS, 78, holdMSS, holdOptions(e.now-oneWay, 0))
	e.have[n] = true
	if n != e.next {
		// gVisor remembers six blocks, the latest first.
		x := span{n, n + 1}
		for e.have[x.start-1] {
			x.start--
		}
		for e.have[x.end] {
			x.end++
		}
		e.blocks = slices.DeleteFunc(e.blocks, x.has)
		e.blocks = slices.Insert(e.blocks, 0, x)
		e.blocks = e.blocks[:min(len(e.blocks), 6)]
	}
	for e.have[e.next] {
		delete(e.have, e.next)
		e.next++
	}
	e.blocks = slices.DeleteFunc(e.blocks, func(x span) bool { return x.end <= e.next })
	var options []uint32
	for _, x := range e.blocks[:min(len(e.blocks), 3)] {
		options = append(options, holdISS+x.start*holdMSS, holdISS+x.end*holdMSS)
	}
	o := holdOptions(e.now, e.now-oneWay, options...)
	held, strip := e.b.sent(78, holdISS+e.next*holdMSS, 0, o)
	if held {
		return
	}
	tcp := make([]byte, header.TCPMinimumSize, header.TCPMinimumSize+len(o))
	tcp = append(tcp, o...)
	tcp[12] = byte(len(tcp)/4) << 4
	binary.BigEndian.PutUint32(tcp[8:], holdISS+e.next*holdMSS)
	if strip {
		stripSACK(tcp)
	}
	e.leave(tcp)
}

// leave takes an acknowledgement to the path, which loses some.
func (e *twoEnds) leave(tcp []byte) {
	if e.rng.IntN(200) > 0 {
		e.acks = append(e.acks, onItsWay{at: e.now + oneWay, ack: slices.Clone(tcp)})
	}
}

// A path that is full and has several losses in every round trip: the sender's
// device sends again what was lost and nothing else, and neither stack learns of
// it. What the receiver's device keeps for itself for a while, it must not forget.
func TestMendBetweenStacks(t *testing.T) {
	for _, forward := range []bool{false, true} {
		e := newTwoEnds(t, forward)
		var want []uint32
		for n := uint32(2000); n < 40000; n += 50 + e.rng.Uint32N(300) {
			e.lost[n] = true
			want = append(want, n)
		}
		for e.sent < 42000 {
			e.step(20)
		}
		for range 200 {
			e.step(0)
		}
		slices.Sort(e.again)
		if e.told > 0 || !slices.Equal(e.again, want) {
			t.Errorf("forward %v: the stack was told %d times; %d segments were sent again, of %d lost", forward, e.told, len(e.again), len(want))
		}
		if e.next != e.sent {
			t.Errorf("forward %v: %d segments of %d have arrived", forward, e.next, e.sent)
		}
	}
}
