//go:build linux

package main

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"
)

// TestQueue compares a queue with a slice, through growth and turns of the ring.
func TestQueue(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var q queue
	var twin []packet
	now := time.Duration(0)
	for step := range 20000 {
		now += time.Duration(random.IntN(100))
		if random.IntN(2+step/5000) > 0 {
			b := q.buffer()[:1+random.IntN(4000)]
			for i := range b {
				b[i] = byte(step)
			}
			due := now + 1000
			twin = append(twin, packet{due, bytes.Clone(b)})
			if !q.push(due, b) {
				t.Fatal("full")
			}
			continue
		}
		p, ok := q.pop(now)
		if want := len(twin) > 0 && twin[0].due <= now; ok != want {
			t.Fatalf("step %d: pop says %v, want %v", step, ok, want)
		}
		if !ok {
			continue
		}
		if !bytes.Equal(p, twin[0].bytes) {
			t.Fatalf("step %d: another packet", step)
		}
		twin = twin[1:]
		q.release(p)
	}
	if q.count != len(twin) || q.count < 1000 {
		t.Errorf("%d packets are left, want %d, and many", q.count, len(twin))
	}
}

func TestQueueDue(t *testing.T) {
	var q queue
	if _, ok := q.due(); ok {
		t.Error("something is due in an empty queue")
	}
	q.push(5, []byte{1})
	if due, ok := q.due(); !ok || due != 5 {
		t.Errorf("due at %v %v, want 5", due, ok)
	}
	if _, ok := q.pop(4); ok {
		t.Error("popped before it was due")
	}
	if _, ok := q.pop(5); !ok {
		t.Error("not popped when it was due")
	}
}

func TestQueueFull(t *testing.T) {
	q := queue{mostQueued: 10}
	if !q.push(0, make([]byte, 10)) || q.push(0, make([]byte, 1)) {
		t.Error("a queue takes more than its limit, or less")
	}
	if _, ok := q.pop(0); !ok || !q.push(0, make([]byte, 1)) {
		t.Error("no room after a packet has gone")
	}
}

// A large buffer must not be kept for a small packet: a second's packets would
// take gigabytes.
func TestQueueBuffers(t *testing.T) {
	var q queue
	q.push(0, q.buffer()[:100])
	if len(q.free) != 1 {
		t.Error("the large buffer isn't free again")
	}
	b, _ := q.pop(0)
	if cap(b) != smallSize {
		t.Errorf("the packet is in a buffer of %d bytes", cap(b))
	}
	q.release(b)
	allocations := testing.AllocsPerRun(100, func() {
		q.push(0, q.buffer()[:100])
		q.push(0, q.buffer()[:9000])
		for p, ok := q.pop(0); ok; p, ok = q.pop(0) {
			q.release(p)
		}
	})
	if allocations != 0 {
		t.Errorf("%v allocations", allocations)
	}
}
