//go:build linux

package main

import "time"

const (
	vnetSize   = 10 // of the kernel's header before each packet, struct virtio_net_hdr
	bufferSize = vnetSize + 65536
	smallSize  = vnetSize + 2048
)

// A queue holds packets until they are due, in the order in which they came,
// and buffers to be used again. The zero queue is empty.
type queue struct {
	packets    []packet // a ring: count of them from head on
	head       int
	count      int
	bytes      int
	free       [][]byte // of bufferSize
	freeSmall  [][]byte // of smallSize
	mostQueued int      // bytes; 0: mostQueued
}

type packet struct {
	due   time.Duration
	bytes []byte
}

// buffer is one for any packet. It is the caller's until push or release.
func (q *queue) buffer() []byte { return take(&q.free, bufferSize) }

func take(free *[][]byte, size int) []byte {
	n := len(*free)
	if n == 0 {
		return make([]byte, size)
	}
	b := (*free)[n-1]
	*free = (*free)[:n-1]
	return b[:size]
}

// release takes a buffer back that push has refused, or pop has given.
func (q *queue) release(b []byte) {
	switch cap(b) {
	case bufferSize:
		q.free = append(q.free, b)
	case smallSize:
		q.freeSmall = append(q.freeSmall, b)
	}
}

// push adds a packet, whose buffer is the queue's from then on; false: the queue
// is full, and the buffer is still the caller's. Packets are due in the order in
// which they are pushed.
func (q *queue) push(due time.Duration, p []byte) bool {
	limit := q.mostQueued
	if limit == 0 {
		limit = mostQueued
	}
	if q.bytes+len(p) > limit {
		return false
	}
	if len(p) <= smallSize && cap(p) == bufferSize {
		small := take(&q.freeSmall, smallSize)[:len(p)]
		copy(small, p)
		q.release(p)
		p = small
	}
	if q.count == len(q.packets) {
		grown := make([]packet, max(64, 2*q.count))
		n := copy(grown, q.packets[q.head:])
		copy(grown[n:], q.packets[:q.head])
		q.packets, q.head = grown, 0
	}
	q.packets[(q.head+q.count)%len(q.packets)] = packet{due, p}
	q.count++
	q.bytes += len(p)
	return true
}

// due is when the next packet is.
func (q *queue) due() (time.Duration, bool) {
	if q.count == 0 {
		return 0, false
	}
	return q.packets[q.head].due, true
}

// pop takes the next packet if it is due. The caller releases it.
func (q *queue) pop(now time.Duration) ([]byte, bool) {
	if due, ok := q.due(); !ok || due > now {
		return nil, false
	}
	p := &q.packets[q.head]
	b := p.bytes
	p.bytes = nil
	q.head = (q.head + 1) % len(q.packets)
	q.count--
	q.bytes -= len(b)
	return b, true
}
