package netstack

import (
	"errors"
	"log/slog"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
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
	// stack, by several goroutines at once; what it can't send it drops.
	Output func(pkts [][]byte)

	// Forward makes the stack take packets for every destination address
	// (see ForwardTCP and ForwardUDP) and lets it send from every address.
	Forward bool

	// Clock drives every timer of the stack; nil means the real clock.
	Clock tcpip.Clock

	// Logger is told about state changes; nil discards.
	Logger *slog.Logger
}

// Stack is a TCP/IP stack with one interface, the tunnel. Its methods are safe
// for concurrent use.
type Stack struct{}

// New returns a running stack without addresses.
func New(c Config) (*Stack, error) { return nil, errors.ErrUnsupported }

// Close aborts every connection, ends every listener and releases all that
// the stack holds. It returns after the stack's goroutines have ended; it must
// not be called from inside Output. Close is idempotent.
func (s *Stack) Close() error { return nil }

// SetAddresses makes addrs the stack's own addresses, removing all others.
// Connections of an address that stays are not disturbed.
func (s *Stack) SetAddresses(addrs []netip.Addr) error { return errors.ErrUnsupported }

// SetPortRange sets the ports, first and last included, from which the stack
// takes the local ports of new connections and sockets.
func (s *Stack) SetPortRange(first, last uint16) error { return errors.ErrUnsupported }

// Input takes IP packets from the tunnel in their order of arrival. Neither
// pkts nor the packets are kept or changed. Consecutive TCP segments of one
// flow are joined before the stack sees them, so long batches are cheaper than
// many short ones.
func (s *Stack) Input(pkts [][]byte) {}
