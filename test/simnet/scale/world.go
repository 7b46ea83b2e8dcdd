package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/anytun-go/anytun/anytun/portblock"
)

// never is later than everything.
const never = time.Duration(math.MaxInt64)

// choices is how many sites a client's or peer's packets may get to: the nearest
// ones, in the order in which routing prefers them.
const choices = 6

// place is a point of the world, a unit square.
type place struct{ x, y float32 }

// latency is one way. Across the whole world it is 140 ms.
func latency(a, b place) time.Duration {
	return 2*time.Millisecond + time.Duration(math.Hypot(float64(a.x-b.x), float64(a.y-b.y))*100*float64(time.Millisecond))
}

// server is a site: one server.
type server struct {
	place
	up      bool
	downAt  time.Duration // last failure
	upAt    time.Duration // last time that it was announced
	changes uint64        // failures and starts so far
	started time.Duration // last start of the process
	loaded  time.Duration // when it had the snapshot

	clients int             // whose packets get here now
	gone    []time.Duration // when others did so last, since the last gossip
	group   int             // in a partition
}

// peer is a network that flows go to.
type peer struct {
	place
	sites     [choices]uint16
	flipEvery time.Duration // 0: its route is stable
}

// client is a client and its path to the cluster.
type client struct {
	place
	number uint32
	sites  [choices]uint16
	site   uint16        // where its packets get to, if they get through
	cut    time.Duration // until then its packets go to a dead site
	online bool
	other  bool // an unstable one's packets take its second choice
	mobile bool

	flipEvery time.Duration // 0: its route is stable
	nat       time.Duration // 0: longer than any keep-alive

	life     uint32        // of online times; older ones' events are void
	endpoint uint32        // numbers, so that old and new can be told apart
	session  uint32        //
	oldUntil time.Duration // until then packets of the session before are good

	told     [4]version // newest first: what was published
	flows    []flow
	advanced time.Duration // what flows is true for
}

// event is something that is going to happen.
type event struct {
	at   time.Duration
	seq  uint32 // keeps the order of those at the same time
	kind kind
	who  uint32
	life uint32
}

type kind uint8

const (
	evFail     kind = iota // of a server
	evStart                // the process
	evAnnounce             // it is reachable
	evRoute                // a client's packets take the best way again
	evFlip                 // they take the other way
	evWander               // a stable client's route changes for good
	evMove                 // a mobile client has another network
	evRenumber             // another address
	evRebind               // another port
	evForgot               // its translator's patience is shorter than the keep-alive
	evRekey                //
	evOnline               //
	evOffline              //
	evGossip               // a server's watermarks
	evHour                 // census
	evCut                  // the registry falls apart
	evMissed               // long enough for servers to forget
	evHeal                 // it is whole again
)

// queue is a binary heap.
type queue []event

func (q queue) before(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}

func (q *queue) push(e event) {
	*q = append(*q, e)
	h := *q
	for i := len(h) - 1; i > 0; {
		up := (i - 1) / 2
		if !h.before(i, up) {
			break
		}
		h[i], h[up] = h[up], h[i]
		i = up
	}
}

func (q *queue) pop() event {
	h := *q
	first := h[0]
	last := len(h) - 1
	h[0] = h[last]
	h = h[:last]
	for i := 0; ; {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < last; child++ {
			if h.before(child, least) {
				least = child
			}
		}
		if least == i {
			break
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
	*q = h
	return first
}

// world is the simulation.
type world struct {
	config
	now     time.Duration
	q       queue
	seq     uint32
	events  int
	chance  *rand.Rand // of what happens; flows have their own, so that their number changes nothing else
	flowing *rand.Rand
	plan    portblock.Plan
	servers []server
	clients []client
	peers   []peer
	up      int // servers
	online  int // clients

	cutAt, healAt time.Duration // of the partition; never, 0: there is none
	onlineTime    float64       // seconds, of all clients
	onlineSince   time.Duration

	bus   traffic
	stats stats
}

func newWorld(c config) (*world, error) {
	w := &world{
		config: c, chance: rand.New(rand.NewPCG(c.Seed, 1)), flowing: rand.New(rand.NewPCG(c.Seed, 2)),
		servers: make([]server, c.Servers), clients: make([]client, c.Clients), peers: make([]peer, c.Peers),
		up: c.Servers, cutAt: never,
	}
	blocks := portblock.Blocks{}
	addresses := make([]netip.Addr, blocks.Addresses(uint32(c.Clients)))
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})
	}
	var err error
	if w.plan, err = portblock.NewPlan(blocks, addresses, nil, netip.Prefix{}); err != nil {
		return nil, fmt.Errorf("egress addresses: %w", err)
	}
	w.bus.init()
	towns := make([]place, 40)
	for i := range towns {
		towns[i] = place{w.chance.Float32(), w.chance.Float32()}
	}
	for i := range w.servers {
		s := &w.servers[i]
		*s = server{place: w.settle(towns), up: true, downAt: -never, upAt: -never, started: -never, loaded: -never}
		s.group = i
		if c.Groups > 0 {
			s.group = min(int(s.x*float32(c.Groups)), c.Groups-1)
		}
		w.at(w.spread(seenInterval), evGossip, uint32(i), 0)
	}
	for i := range w.peers {
		p := &w.peers[i]
		p.place = w.settle(towns)
		p.sites = w.nearest(p.place)
		p.flipEvery = w.flipping()
	}
	for i := range w.clients {
		w.settleClient(&w.clients[i], uint32(i+1), towns)
	}
	if c.FailEvery > 0 {
		w.at(w.spread(c.FailEvery), evFail, 0, 0)
	}
	for t := min(time.Hour, c.Day/2); t < c.Day; t += time.Hour {
		w.at(t, evHour, 0, 0)
	}
	if c.Partition > 0 {
		w.cutAt, w.healAt = c.Day/2, c.Day/2+c.Partition
		w.at(w.cutAt, evCut, 0, 0)
		w.at(w.cutAt+w.Forget+sweepInterval, evMissed, 0, 0)
		w.at(w.healAt, evHeal, 0, 0)
	}
	return w, nil
}

// settle finds a place, most likely near a town.
func (w *world) settle(towns []place) place {
	if w.chance.IntN(5) == 0 {
		return place{w.chance.Float32(), w.chance.Float32()}
	}
	t := towns[w.chance.IntN(len(towns))]
	near := func(v float32) float32 {
		return min(max(v+float32(w.chance.NormFloat64())*0.03, 0), 1)
	}
	return place{near(t.x), near(t.y)}
}

func (w *world) settleClient(c *client, number uint32, towns []place) {
	*c = client{
		place: w.settle(towns), number: number, mobile: w.chance.Float64() < w.Mobile,
		advanced: 0, cut: -never,
	}
	c.sites = w.nearest(c.place)
	c.flipEvery = w.flipping()
	if w.chance.Float64() < w.ShortNAT {
		c.nat = 30*time.Second + w.spread(30*time.Second)
	}
	if w.chance.Float64() >= w.Part {
		w.appear(c, 0, false)
	} else if on := float64(w.On); w.chance.Float64() < on/(on+float64(w.Off)) {
		w.appear(c, 0, true)
	} else {
		w.at(w.exp(w.Off), evOnline, number, 0)
	}
}

// flipping is the mean time between an unstable client's or peer's flips, evenly
// spread over the orders of magnitude; 0 for a stable one.
func (w *world) flipping() time.Duration {
	if w.chance.Float64() >= w.Unstable {
		return 0
	}
	lo, hi := math.Log(float64(w.FlipMin)), math.Log(float64(w.FlipMax))
	return time.Duration(math.Exp(lo + (hi-lo)*w.chance.Float64()))
}

// nearest is the sites that routing prefers. It isn't perfect: half of the time
// the nearest one isn't the first.
func (w *world) nearest(at place) (sites [choices]uint16) {
	type candidate struct {
		site uint16
		d    float32
	}
	var best [choices]candidate
	n := 0
	for i := range w.servers {
		s := &w.servers[i]
		d := (s.x-at.x)*(s.x-at.x) + (s.y-at.y)*(s.y-at.y)
		if n == choices && d >= best[n-1].d {
			continue
		}
		if n < choices {
			n++
		}
		j := n - 1
		for ; j > 0 && best[j-1].d > d; j-- {
			best[j] = best[j-1]
		}
		best[j] = candidate{uint16(i), d}
	}
	for i := range sites {
		sites[i] = best[min(i, n-1)].site
	}
	if w.chance.IntN(2) == 0 {
		i := 1 + w.chance.IntN(3)
		sites[0], sites[i] = sites[i], sites[0]
	}
	return sites
}

// best is the site that a client's packets go to once routing has settled.
func (w *world) best(c *client) uint16 {
	order := c.sites
	if c.other {
		order[0], order[1] = order[1], order[0]
	}
	i := slices.IndexFunc(order[:], func(s uint16) bool { return w.servers[s].up })
	return order[max(i, 0)]
}

func (w *world) client(number uint32) *client { return &w.clients[number-1] }

func (w *world) at(t time.Duration, k kind, who, life uint32) {
	if t >= w.Day {
		return
	}
	w.seq++
	w.q.push(event{at: t, seq: w.seq, kind: k, who: who, life: life})
}

// exp is a time without memory, spread an even one below the limit.
func (w *world) exp(mean time.Duration) time.Duration {
	return time.Duration(w.chance.ExpFloat64() * float64(mean))
}

func (w *world) spread(limit time.Duration) time.Duration {
	return time.Duration(w.chance.Float64() * float64(limit))
}

// count keeps the sum of online time.
func (w *world) count(change int) {
	w.onlineTime += float64(w.online) * (w.now - w.onlineSince).Seconds()
	w.onlineSince = w.now
	w.online += change
}

func (w *world) run() {
	for len(w.q) > 0 {
		e := w.q.pop()
		w.now = e.at
		w.events++
		w.handle(e)
	}
	w.now = w.Day
	w.count(0)
	w.bus.hellos(w)
}

// hash mixes numbers to an even one in [0, 1): chance that needs no memory.
func hash(numbers ...uint64) float64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, n := range numbers {
		h ^= n
		h *= 0xbf58476d1ce4e5b9
		h ^= h >> 29
		h *= 0x94d049bb133111eb
		h ^= h >> 32
	}
	return float64(h>>11) / (1 << 53)
}

// converge is how long a network goes on sending to a site that has died, or not
// to one that is new: 4/5 within twice the median, a few for minutes. a and b
// are even in [0, 1).
func (w *world) converge(a, b float64) time.Duration {
	if a < w.Slow {
		return time.Duration(float64(30*time.Second) * math.Pow(10, b))
	}
	// Log-normal: 0.8236 makes the 80th percentile twice the median.
	z := math.Sqrt2 * math.Erfinv(2*b-1)
	return time.Duration(float64(w.Converge) * math.Exp(0.8236*z))
}
