package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/netstack"
)

// The road of the sockets egress, outward:
//
//	Input            the server's receive goroutine; classifies, drops what is not IP
//	  udpOutbound    datagrams that are whole: policy, flow, the host's UDP socket
//	  pingOutbound   echo requests: policy, flow, the host's ICMP socket
//	  stack.Input    everything else: TCP, fragments, the gateway's own services
//	    forwardTCP   one goroutine per connection: policy, flow, dial, accept, relay
//	    udpOutbound  datagrams that had to be put together
//	    dnsService   port 53 of the gateway addresses
//
// and inward: one goroutine per UDP or ping socket reads the host and gives
// packets to Output; TCP goes through the stack.

// Defaults of socketsConfig.
const (
	defaultFlowsPerClient = 16384
	defaultFlows          = 65536
	defaultDialsPerClient = 512
	defaultDials          = 4096
	defaultDialTimeout    = 15 * time.Second
	defaultUDPTimeout     = 3 * time.Minute // RFC 4787 REQ-5: at least 2 minutes
	defaultQuickTimeout   = 30 * time.Second
	defaultTCPTimeout     = 24 * time.Hour // RFC 5382 REQ-5: at least 2 h 4 min
)

// socketsConfig configures the egress over the host's own sockets. Zero limits
// and durations mean the defaults.
type socketsConfig struct {
	MTU, Headroom, Tailroom int                             // inner packets and the room around them, as netstack.Config
	Gateway                 []netip.Addr                    // the servers' inner addresses; DNS answers there
	Output                  func(pkts [][]byte)             // to the clients, as netstack.Config.Output
	ClientOf                func(netip.Addr) (uint32, bool) // inner address to client number
	DNS                     []netip.AddrPort                // upstream resolvers; none: the host's
	ServicesOnly            bool                            // only Gateway is reached by it: no pings go out
	AllowLocal              bool                            // clients may reach the host's loopback and link-local addresses
	DialTimeout             time.Duration                   // of a TCP connection to the outside
	UDPTimeout              time.Duration                   // idle UDP mapping
	QuickTimeout            time.Duration                   // idle ping mapping, or UDP mapping that only ever asked port 53
	TCPTimeout              time.Duration                   // idle TCP connection
	MaxFlowsPerClient       int                             // TCP, UDP and ping together
	MaxFlows                int                             // of all clients
	MaxDialsPerClient       int                             // TCP connections being opened
	MaxDials                int                             // of all clients
	Logger                  *slog.Logger                    // nil discards

	now  func() time.Time // tests; nil means time.Now
	host dnsHostFiles     // tests; zero means the host's own
	ping egressPingOpen   // tests; zero means by trying
}

func (c *socketsConfig) fill() error {
	switch {
	case c.Output == nil:
		return errors.New("sockets egress: no output")
	case c.ClientOf == nil:
		return errors.New("sockets egress: no way to tell clients by their addresses")
	case c.MTU < 1280 || c.MTU > 65535:
		return fmt.Errorf("sockets egress: mtu %d is not in 1280…65535", c.MTU)
	case c.Headroom < 0 || c.Tailroom < 0:
		return errors.New("sockets egress: negative room around packets")
	}
	for _, a := range c.Gateway {
		if !a.IsValid() || a.Is4In6() || a.IsUnspecified() {
			return fmt.Errorf("sockets egress: %s can't be a gateway address", a)
		}
	}
	for _, d := range []struct {
		at  *int
		def int
	}{
		{&c.MaxFlowsPerClient, defaultFlowsPerClient},
		{&c.MaxFlows, defaultFlows},
		{&c.MaxDialsPerClient, defaultDialsPerClient},
		{&c.MaxDials, defaultDials},
	} {
		if *d.at < 0 {
			return fmt.Errorf("sockets egress: a limit of %d flows", *d.at)
		}
		if *d.at == 0 {
			*d.at = d.def
		}
	}
	for _, d := range []struct {
		at  *time.Duration
		def time.Duration
	}{
		{&c.DialTimeout, defaultDialTimeout},
		{&c.UDPTimeout, defaultUDPTimeout},
		{&c.QuickTimeout, defaultQuickTimeout},
		{&c.TCPTimeout, defaultTCPTimeout},
	} {
		if *d.at < 0 {
			return fmt.Errorf("sockets egress: a timeout of %v", *d.at)
		}
		if *d.at == 0 {
			*d.at = d.def
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	return nil
}

// sockets ends the clients' TCP, UDP and ICMP echo and opens them again as the
// host's own unprivileged sockets. Connections through it live in this process
// and die with it.
//
// Locks: sockets.mu, egressFlows.mu, egressRawPing.mu and the dns locks are
// each held alone, over memory only.
type sockets struct {
	cfg    socketsConfig
	log    *slog.Logger
	now    func() time.Time
	stack  *netstack.Stack
	policy egressPolicy
	flows  *egressFlows
	ping   *egressPing
	dns    *dnsService
	count  egressCounters

	running  atomic.Bool // between the start of Run and its end
	draining atomic.Bool

	mu     sync.Mutex
	ran    bool
	closed bool
	wg     sync.WaitGroup // Add only under mu while not closed
}

// newSockets returns an egress whose Run is to be called; packets given to
// Input before are dropped.
func newSockets(c socketsConfig) (*sockets, error) {
	if err := c.fill(); err != nil {
		return nil, err
	}
	st, err := netstack.New(netstack.Config{
		MTU:      c.MTU,
		Headroom: c.Headroom,
		Tailroom: c.Tailroom,
		Output:   c.Output,
		Forward:  true,
		Logger:   c.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("sockets egress: %w", err)
	}
	if err := st.SetAddresses(c.Gateway); err != nil {
		st.Close()
		return nil, fmt.Errorf("sockets egress: gateway addresses: %w", err)
	}
	e := &sockets{
		cfg:    c,
		log:    c.Logger,
		now:    c.now,
		stack:  st,
		policy: newEgressPolicy(c.Gateway, c.AllowLocal),
		flows:  newEgressFlows(&c),
	}
	e.dns, err = newDNSService(dnsConfig{
		Upstreams: c.DNS,
		Gateway:   c.Gateway,
		ClientOf:  c.ClientOf,
		Host:      c.host,
		Logger:    c.Logger,
		now:       c.now,
	})
	if err != nil {
		st.Close()
		return nil, fmt.Errorf("sockets egress: %w", err)
	}
	return e, nil
}

// Run serves until ctx is done, then aborts every flow and returns when all
// goroutines of the egress have ended. It is to be called once, and Output must
// work until it has returned.
func (e *sockets) Run(ctx context.Context) error {
	e.mu.Lock()
	again := e.ran
	e.ran = true
	e.mu.Unlock()
	if again {
		return errors.New("sockets egress: run twice")
	}
	defer e.shutdown()

	if e.cfg.ServicesOnly {
		e.ping = new(egressPing)
	} else {
		e.ping = openEgressPing(e, e.cfg.ping)
	}
	e.stack.ForwardTCP(e.cfg.MaxDials, func(r *netstack.TCPRequest) { e.forwardTCP(ctx, r) })
	e.stack.ForwardUDP(e.udpReassembled)
	if err := e.dns.start(ctx, e.stack); err != nil {
		return fmt.Errorf("sockets egress: %w", err)
	}
	e.running.Store(true)
	e.expireLoop(ctx)
	return nil
}

// shutdown ends everything that newSockets and Run started.
func (e *sockets) shutdown() {
	e.running.Store(false)
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	for _, f := range e.flows.close() {
		f.endFlow()
	}
	e.ping.close()
	e.dns.stop()
	e.stack.Close()
	e.wg.Wait()
	e.dns.wait()
}

// begin joins a goroutine to those that Run waits for; false means that the
// egress has ended. It pairs with e.wg.Done.
func (e *sockets) begin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.wg.Add(1)
	return true
}

// expireLoop ends idle flows until ctx is done.
func (e *sockets) expireLoop(ctx context.Context) {
	tick := time.NewTicker(min(e.cfg.QuickTimeout, e.cfg.UDPTimeout, e.cfg.TCPTimeout)/8 + time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			e.expire(e.now())
		}
	}
}

// expire ends the flows that have been idle too long at now.
func (e *sockets) expire(now time.Time) {
	for kind, ends := range e.flows.expire(now) {
		e.count.expired[kind].Add(uint64(len(ends)))
		for _, f := range ends {
			f.endFlow()
		}
	}
}

// Drain makes the egress refuse new flows; those there are go on. New TCP
// connections, datagrams and pings are dropped in silence, so that a client
// whose route moves to another server is served there by its next attempt.
// Stats().Flows tells how many are left.
func (e *sockets) Drain() { e.draining.Store(true) }

// CloseClient ends every flow of a client, as when it has been removed.
func (e *sockets) CloseClient(number uint32) {
	for _, f := range e.flows.take(number) {
		f.endFlow()
	}
}

// egressBatch is the scratch memory of one Input call.
type egressBatch struct{ rest [][]byte }

var egressBatches = sync.Pool{New: func() any { return new(egressBatch) }}

// Input takes inner packets of clients, whose sources have been verified, in
// their order of arrival. They are neither kept nor changed. Input doesn't wait
// for the network.
func (e *sockets) Input(pkts [][]byte) {
	if !e.running.Load() {
		e.count.notRunning.Add(uint64(len(pkts)))
		return
	}
	b := egressBatches.Get().(*egressBatch)
	var p egressPacket
	for _, pkt := range pkts {
		if !p.parse(pkt) {
			e.count.malformed.Add(1)
			continue
		}
		if !e.divert(&p) {
			b.rest = append(b.rest, pkt)
		}
	}
	if len(b.rest) > 0 {
		e.stack.Input(b.rest)
		clear(b.rest)
		b.rest = b.rest[:0]
	}
	egressBatches.Put(b)
}

// divert takes the packets that need no netstack and reports whether it did.
func (e *sockets) divert(p *egressPacket) bool {
	switch {
	case p.echoRequest():
		if e.own(p.dst) {
			return false
		}
		e.pingOutbound(p)
		return true
	case p.proto == protoUDP && !p.fragment && !e.own(p.dst):
		if from, to, payload, ok := p.udp(); ok {
			e.udpOutbound(from, to, payload)
		} else {
			e.count.malformed.Add(1)
		}
		return true
	}
	return false
}

// own reports whether a is one of the servers' inner addresses.
func (e *sockets) own(a netip.Addr) bool {
	for _, g := range e.cfg.Gateway {
		if a == g {
			return true
		}
	}
	return false
}

// deny counts a flow that was not admitted.
func (e *sockets) deny(why egressDeny) {
	switch why {
	case egressClientFull:
		e.count.clientFull.Add(1)
	case egressAllFull:
		e.count.allFull.Add(1)
	case egressDialsFull:
		e.count.dialsFull.Add(1)
	case egressClosed:
		e.count.notRunning.Add(1)
	case egressAdmitted:
	}
}

// admit takes a new flow of the client with address from into the account. It
// returns nil when there is no room, the client is not known, or the egress
// drains; the reason has been counted then.
func (e *sockets) admit(kind egressKind, from netip.AddrPort, pace egressPace, now time.Time) *egressFlow {
	number, ok := e.cfg.ClientOf(from.Addr())
	if !ok {
		e.count.unknownClient.Add(1)
		return nil
	}
	if e.draining.Load() {
		e.count.draining.Add(1)
		return nil
	}
	f, victim, why := e.flows.admit(number, egressKey{kind: kind, from: from}, pace, now)
	if victim != nil {
		e.count.evicted.Add(1)
		victim.endFlow()
	}
	if f == nil {
		e.deny(why)
		return nil
	}
	e.count.opened[kind].Add(1)
	return f
}
