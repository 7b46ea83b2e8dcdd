package netstack

import (
	"math/rand/v2"
	"sync"
	"time"
)

// roads is one direction of a network in which every packet takes any of
// several roads, each of which keeps its order and has a delay of its own. What
// arrives at the same time comes in one batch.
type roads struct {
	mu     sync.Mutex
	rng    *rand.Rand
	ways   []chan parcel
	delays []time.Duration
	loss   float64

	arrived chan []byte
	stop    chan struct{}
	wg      sync.WaitGroup
}

type parcel struct {
	at time.Time
	b  []byte
}

// newRoads starts the roads; deliver is called by one goroutine.
func newRoads(deliver func([][]byte), delays ...time.Duration) *roads {
	r := &roads{
		rng: rand.New(rand.NewPCG(5, 6)), delays: delays,
		arrived: make(chan []byte, 8192), stop: make(chan struct{}),
	}
	for range delays {
		c := make(chan parcel, 8192)
		r.ways = append(r.ways, c)
		r.wg.Go(func() { r.carryLoop(c) })
	}
	r.wg.Go(func() { r.deliverLoop(deliver) })
	return r
}

// send takes a copy of b.
func (r *roads) send(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rng.Float64() < r.loss {
		return
	}
	i := r.rng.IntN(len(r.ways))
	select {
	case r.ways[i] <- parcel{time.Now().Add(r.delays[i]), append([]byte(nil), b...)}:
	default: // the queue is full
	}
}

func (r *roads) carryLoop(c chan parcel) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var p parcel
		select {
		case p = <-c:
		case <-r.stop:
			return
		}
		if d := time.Until(p.at); d > 0 {
			timer.Reset(d)
			select {
			case <-timer.C:
			case <-r.stop:
				return
			}
		}
		select {
		case r.arrived <- p.b:
		case <-r.stop:
			return
		}
	}
}

func (r *roads) deliverLoop(deliver func([][]byte)) {
	batch := make([][]byte, 0, 128)
	for {
		select {
		case b := <-r.arrived:
			batch = append(batch[:0], b)
		case <-r.stop:
			return
		}
		for more := true; more && len(batch) < cap(batch); {
			select {
			case b := <-r.arrived:
				batch = append(batch, b)
			default:
				more = false
			}
		}
		deliver(batch)
	}
}

func (r *roads) close() { close(r.stop); r.wg.Wait() }
