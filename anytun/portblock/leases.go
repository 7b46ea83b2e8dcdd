package portblock

import (
	"iter"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Leases says which blocks are lent to other clients than the one of their number.
// A client that has used up its own block gets more of those above the highest
// enrolled client. The blocks of one client differ in their position on the
// address, so an inner port says which block it is of, and no table of ports
// is needed.
//
// The zero value and nil have no leases. Safe for concurrent use. Looking up
// allocates nothing, and takes no lock for blocks below the lowest leased one,
// which is where clients are.
type Leases struct {
	// lowest is the lowest leased block, 0 if there is none.
	lowest atomic.Uint32

	mu      sync.RWMutex
	leases  map[uint32]lease    // by block
	clients map[uint32][]uint32 // blocks by client, ascending
}

type lease struct {
	client uint32
	until  time.Time
}

// Set lends a block to a client until then, or renews it. Whoever had it before
// loses it. Block 0, client 0 and a client's own block can't be lent.
func (l *Leases) Set(block, client uint32, until time.Time) {
	if block == 0 || client == 0 || block == client {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leases == nil {
		l.leases, l.clients = make(map[uint32]lease), make(map[uint32][]uint32)
	}
	if old, ok := l.leases[block]; ok && old.client != client {
		l.dropLocked(block)
	}
	if _, ok := l.leases[block]; !ok {
		// A new slice each time, since Blocks hands them out.
		mine := append(slices.Clone(l.clients[client]), block)
		slices.Sort(mine)
		l.clients[client] = mine
	}
	l.leases[block] = lease{client, until}
	if low := l.lowest.Load(); low == 0 || block < low {
		l.lowest.Store(block)
	}
}

// Drop ends a lease.
func (l *Leases) Drop(block uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropLocked(block)
	if block == l.lowest.Load() {
		l.boundLocked()
	}
}

// Expire ends all leases whose time has come, and returns how many.
func (l *Leases) Expire(now time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	ended := 0
	for block, lease := range l.leases {
		if !lease.until.After(now) {
			l.dropLocked(block)
			ended++
		}
	}
	if ended > 0 {
		l.boundLocked()
	}
	return ended
}

// Len is the number of leases.
func (l *Leases) Len() int {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.leases)
}

// Client is who has leased a block. Leases that are over, but neither dropped nor
// expired, count: a packet more or less does no harm.
func (l *Leases) Client(block uint32) (uint32, bool) {
	if l == nil || block <= l.none() {
		return 0, false
	}
	l.mu.RLock()
	lease, ok := l.leases[block]
	l.mu.RUnlock()
	return lease.client, ok
}

// Blocks are the blocks that a client has leased, in ascending order. The slice
// must not be changed.
func (l *Leases) Blocks(client uint32) []uint32 {
	if l == nil {
		return nil
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.clients[client]
}

// Candidates are the blocks that a client could lease, best first: those above the
// highest enrolled client, from the top down, that nobody has and that lie in
// another position than all the client has already.
func (p *Plan) Candidates(client uint32, l *Leases, highest uint32, now time.Time) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		top := p.Clients()
		if len(p.v4)+len(p.v6) == 0 || client == 0 {
			return // nothing is shared, so nothing can be lent
		}
		taken := make(map[uint32]bool) // by position
		if client <= top && !l.othersBlock(client) {
			taken[p.position(client)] = true
		}
		for _, block := range l.Blocks(client) {
			taken[p.position(block)] = true
		}
		if len(taken) >= p.blocks.PerAddress() {
			return
		}
		for block := top; block > highest && block > 0; block-- {
			if block == client || taken[p.position(block)] || l.heldAt(block, now) {
				continue
			}
			if !yield(block) {
				return
			}
		}
	}
}

// heldAt says whether a block is leased now.
func (l *Leases) heldAt(block uint32, now time.Time) bool {
	if l == nil || block <= l.none() {
		return false
	}
	l.mu.RLock()
	lease, ok := l.leases[block]
	l.mu.RUnlock()
	return ok && lease.until.After(now)
}

// othersBlock says whether a client's own block is lent to another, as happens when
// the client was enrolled after the lease.
func (l *Leases) othersBlock(client uint32) bool {
	_, leased := l.Client(client)
	return leased
}

// at is the block that a client has leased at a position.
func (l *Leases) at(client, position, perAddress uint32) (block uint32, ok bool) {
	if l == nil || l.none() == math.MaxUint32 {
		return 0, false
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, block := range l.clients[client] {
		if (block-1)%perAddress == position {
			return block, true
		}
	}
	return 0, false
}

// none is the highest block such that neither it nor any below is leased.
func (l *Leases) none() uint32 { return l.lowest.Load() - 1 }

func (l *Leases) dropLocked(block uint32) {
	lease, ok := l.leases[block]
	if !ok {
		return
	}
	delete(l.leases, block)
	left := slices.DeleteFunc(slices.Clone(l.clients[lease.client]), func(b uint32) bool { return b == block })
	if len(left) == 0 {
		delete(l.clients, lease.client)
		return
	}
	l.clients[lease.client] = left
}

// boundLocked sets lowest anew.
func (l *Leases) boundLocked() {
	low := uint32(0)
	for block := range l.leases {
		if low == 0 || block < low {
			low = block
		}
	}
	l.lowest.Store(low)
}
