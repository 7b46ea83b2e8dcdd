package netstack

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	nicID = tcpip.NICID(1)

	minMTU = 1280 // RFC 8200 section 5
	maxMTU = 65535
)

// The numbers of TCP, where they differ from gVisor's defaults.
const (
	// Socket buffers, in bytes. They are limits, not allocations, and gVisor
	// tunes them between minimum and maximum by what a connection uses. Of the
	// receive buffer it offers half as window, and a path that loses a segment in
	// every window has more than twice its round trip in flight, until the
	// retransmission has arrived: with 40 ms that makes 90 MB/s.
	bufferMin, bufferDefault, bufferMax = 4 << 10, 1 << 20, 16 << 20

	// A connection outlives a dead tunnel: a client may sleep for hours or be
	// between networks. RFC 9293 section 3.8.3 lets the application choose
	// when to give up; here it is after maxRetries transmissions at most
	// maxRTO apart, half a day. maxRTO is far below the 60 s that RFC 6298
	// wants as the least limit, since after an outage a connection waits as
	// long as its last interval before it moves again.
	maxRTO     = 15 * time.Second
	maxRetries = uint64(12 * time.Hour / maxRTO)

	// A connection that is idle for long is asked for a sign of life, so that
	// what a vanished peer left behind doesn't stay for ever, but with the
	// same patience.
	keepAliveIdle     = 2 * time.Hour
	keepAliveInterval = 15 * time.Minute
	keepAliveCount    = int(12 * time.Hour / keepAliveInterval)

	// A connection that its user has closed has this long to get its last
	// bytes acknowledged. Nobody waits for it any more, and it may hold
	// bufferMax bytes.
	orphanTimeout = 15 * time.Minute

	// TIME-WAIT guards against the loss of the last ACK and against segments
	// of the old connection that arrive in the new one. Both need little time
	// here: a peer whose FIN is not acknowledged repeats it within a second or
	// is answered by a RST when it has nothing left to lose, and the tunnel's
	// replay window and the sequence numbers, which move on by 15 MB/s between
	// connections, keep old segments out. Two minutes, on the other hand, would
	// lock a client with 1,024 ports to 8 connections per second and
	// destination, and cost 5 KiB of memory for each.
	timeWait = time.Second

	listenBacklog = 1024

	// Datagrams of one UDP socket that wait for their reader, in bytes.
	udpBuffer, udpBufferMax = 1 << 20, 4 << 20
)

// Config says how a Stack is connected to its tunnel.
type Config struct {
	// MTU is the size in bytes of the largest IP packet that Output is given,
	// 1280 to 65535.
	MTU int

	// Headroom and Tailroom are the bytes left free before and after each
	// packet given to Output, for the tunnel's header and tag.
	Headroom, Tailroom int

	// Output takes packets to the tunnel. Every element has Headroom bytes,
	// then the packet, then Tailroom bytes; its capacity ends there too. The
	// slices may be overwritten, so that packets can be sealed in place, but
	// are not to be kept after Output has returned. The packets of one batch
	// lie one behind another in memory. Output is called inline from the
	// stack, by several goroutines at once, and must not call back into the
	// stack; what it can't send it drops.
	Output func(pkts [][]byte)

	// Forward makes the stack take packets for every destination address
	// (see ForwardTCP and ForwardUDP) and lets it send from every address.
	Forward bool

	// PortsUsedUp, if not nil, is called when a dial or a socket found no port
	// in any range of SetPortRanges, at most once a second. It runs in the
	// caller's goroutine and must not block; new ranges that are set within a
	// second still serve the dial that caused the call.
	PortsUsedUp func()

	// Clock drives the timers of the protocols; nil means the real clock. The
	// deadlines of connections are always those of the real clock.
	Clock tcpip.Clock

	// Logger is told about state changes; nil discards.
	Logger *slog.Logger
}

func (c *Config) validate() error {
	switch {
	case c.MTU < minMTU || c.MTU > maxMTU:
		return fmt.Errorf("netstack: MTU %d is not between %d and %d", c.MTU, minMTU, maxMTU)
	case c.Headroom < 0 || c.Tailroom < 0 || c.Headroom > 4096 || c.Tailroom > 4096:
		return fmt.Errorf("netstack: headroom %d, tailroom %d: want 0 to 4096", c.Headroom, c.Tailroom)
	case c.Output == nil:
		return fmt.Errorf("netstack: no Output")
	}
	return nil
}

// Stack is a TCP/IP stack with one interface, the tunnel. Its methods are safe
// for concurrent use, but Input keeps the order of packets only for a single
// caller.
type Stack struct {
	st    *stack.Stack
	dev   *device
	clock tcpip.Clock
	log   *slog.Logger

	forward bool
	udp     func(from, to netip.AddrPort, payload []byte) // ForwardUDP's
	tcp     *tcpForwarder                                 // ForwardTCP's

	own   atomic.Pointer[[]netip.Addr]
	notes unreachableNotes

	ports       ports
	portsUsedUp func() // Config's

	// handlers are the running calls of ForwardTCP's handler, of repair and
	// Resume, and the like.
	handlers sync.WaitGroup

	// mu is held for reading while an endpoint is made, so that Close misses
	// none, and for writing to change what follows.
	mu     sync.RWMutex
	closed bool
	addrMu sync.Mutex // held by SetAddresses; taken before mu

	dnsQueries, dnsHits atomic.Uint64

	outage  outage
	windows windows
}

// quiet silences gVisor's own logger, which would write to stderr, and for
// some malformed packets one line each.
var quiet = sync.OnceFunc(func() {
	//nolint:forbidigo // gVisor's package log, to silence it
	log.SetTarget(&log.GoogleEmitter{Writer: &log.Writer{Next: io.Discard}})
})

// New returns a running stack without addresses.
func New(c Config) (*Stack, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	quiet()
	if c.Clock == nil {
		c.Clock = tcpip.NewStdClock()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Stack{
		dev:         newDevice(&c),
		clock:       c.Clock,
		log:         c.Logger,
		forward:     c.Forward,
		ports:       ports{wait: make(chan struct{}, 1)},
		portsUsedUp: c.PortsUsedUp,
	}
	s.own.Store(new([]netip.Addr))
	s.dev.flows.hold.fire = s.releaseHeld
	// A far end's loopback addresses are destinations like all others, so
	// packets to and from them must not count as martian.
	s.st = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: true}),
			ipv6.NewProtocolWithOptions(ipv6.Options{AllowExternalLoopbackTraffic: true}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		Clock:              c.Clock,
	})
	s.windows.init(s)
	if err := s.configure(); err != nil {
		s.st.Destroy()
		return nil, err
	}
	go s.dev.small.run() // ends with Close
	return s, nil
}

func (s *Stack) configure() error {
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	maxRTO := tcpip.TCPMaxRTOOption(maxRTO)
	retries := tcpip.TCPMaxRetriesOption(maxRetries)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	recovery := tcpip.TCPRecovery(0) // no RACK: see outage.go
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack,
		&recovery,
		&moderate,
		&maxRTO,
		&retries,
		&wait,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax},
		&tcpip.TCPSendBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax},
	} {
		if err := s.st.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: set %T: %s", o, err)
		}
	}
	for _, o := range []any{
		tcpip.ReceiveBufferSizeOption{Min: bufferMin, Default: udpBuffer, Max: udpBufferMax},
		tcpip.SendBufferSizeOption{Min: bufferMin, Default: udpBuffer, Max: udpBufferMax},
	} {
		if err := s.st.SetOption(o); err != nil {
			return fmt.Errorf("netstack: set %T: %s", o, err)
		}
	}
	if err := s.st.CreateNIC(nicID, s.dev); err != nil {
		return fmt.Errorf("netstack: create the interface: %s", err)
	}
	s.st.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	if !s.forward {
		return nil
	}
	if err := s.st.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("netstack: accept every destination: %s", err)
	}
	if err := s.st.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("netstack: send from every address: %s", err)
	}
	return nil
}

// Close aborts every connection, ends every listener and releases all that
// the stack holds. It returns after the stack's goroutines have ended, and the
// calls of ForwardTCP's handler with them; it must be called neither from such
// a handler nor from Output. Packets given to Input from now on are dropped.
// Close is idempotent.
func (s *Stack) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.dev.inClosed.Store(true)
	s.dev.flows.hold.close()
	ended := make(chan struct{})
	go s.awaitHandlers(ended)
	// A handler may be in the middle of making an endpoint, which then isn't
	// among those aborted; so look again until the last handler has gone.
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for waiting := true; waiting; {
		for _, e := range s.st.RegisteredEndpoints() {
			e.Abort()
		}
		select {
		case <-ended:
			waiting = false
		case <-again.C:
		}
	}
	s.st.Destroy()
	s.dev.small.close()
	s.dev.outClosed.Store(true)
	return nil
}

// enter makes Close wait until s.handlers.Done is called, or reports false when
// the stack is closed already.
func (s *Stack) enter() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return false
	}
	s.handlers.Add(1)
	return true
}

func (s *Stack) awaitHandlers(ended chan<- struct{}) {
	s.handlers.Wait()
	close(ended)
}

// SetAddresses makes addrs the stack's own addresses, removing all others.
// Connections of an address that stays are not disturbed; those of an address
// that goes are reset.
func (s *Stack) SetAddresses(addrs []netip.Addr) error {
	s.addrMu.Lock()
	defer s.addrMu.Unlock()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return net.ErrClosed
	}
	want := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		if a = a.Unmap().WithZone(""); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("netstack: %v can't be an address of the stack", a)
		} else if !slices.Contains(want, a) {
			want = append(want, a)
		}
	}
	have := *s.own.Load()
	for _, a := range have {
		if slices.Contains(want, a) {
			continue
		}
		s.abortFrom(a)
		if err := s.st.RemoveAddress(nicID, tcpipAddr(a)); err != nil {
			return fmt.Errorf("netstack: remove address %v: %s", a, err)
		}
		s.log.Info("netstack address removed", "addr", a)
	}
	now := slices.DeleteFunc(slices.Clone(have), func(a netip.Addr) bool { return !slices.Contains(want, a) })
	defer func() { s.own.Store(&now) }()
	for _, a := range want {
		if slices.Contains(have, a) {
			continue
		}
		pa := tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: tcpipAddr(a).WithPrefix()}
		if err := s.st.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("netstack: add address %v: %s", a, err)
		}
		now = append(now, a)
		s.log.Info("netstack address added", "addr", a)
	}
	return nil
}

// abortFrom resets the connections whose local address is a.
func (s *Stack) abortFrom(a netip.Addr) {
	local := tcpipAddr(a)
	for _, e := range s.st.RegisteredEndpoints() {
		ep, ok := e.(*tcp.Endpoint)
		if !ok {
			continue
		}
		info, ok := ep.Info().(*stack.TransportEndpointInfo)
		if ok && info.ID.LocalAddress == local && info.ID.RemotePort != 0 {
			ep.Abort()
		}
	}
}

// isOwn reports whether a is an address of the stack. a is not 4-in-6.
func (s *Stack) isOwn(a netip.Addr) bool { return slices.Contains(*s.own.Load(), a) }

// hasFamily reports whether the stack has an address of a's family.
func (s *Stack) hasFamily(a netip.Addr) bool {
	return slices.ContainsFunc(*s.own.Load(), func(o netip.Addr) bool { return o.Is4() == a.Is4() })
}

// tcpipAddr is a in gVisor's form: 4 bytes or 16.
func tcpipAddr(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

// netipAddr is the way back; the empty address becomes the zero Addr.
func netipAddr(a tcpip.Address) netip.Addr {
	switch a.Len() {
	case header.IPv4AddressSize:
		return netip.AddrFrom4(a.As4())
	case header.IPv6AddressSize:
		return netip.AddrFrom16(a.As16()).Unmap()
	default:
		return netip.Addr{}
	}
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
