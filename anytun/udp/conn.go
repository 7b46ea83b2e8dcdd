package udp

import (
	"net/netip"
	"syscall"
)

// Endpoint names the far end of an exchange together with the near address it
// uses: Addr is the remote outer address and port, Local the address of this
// host that the remote sent to, and so the one that replies must come from. An
// invalid Local leaves the choice to the kernel. IPv4 addresses are always in
// their 4-byte form, never mapped into IPv6. Endpoints are comparable.
type Endpoint struct {
	Addr  netip.AddrPort
	Local netip.Addr
}

// Group is a run of datagrams that arrived one after another from one endpoint,
// in the order of arrival: mostly what the kernel joined into one message.
//
// Packets and their bytes belong to the reader until its next ReadBatch, and
// may be changed in place. The capacity of each packet ends where the packet
// ends, so that an append can't run into the next datagram.
type Group struct {
	From    Endpoint
	Packets [][]byte
}

// Conn is an unconnected UDP socket that works in batches.
type Conn interface {
	// ReadBatch blocks until at least one datagram has arrived and returns what
	// there is, in order. It is for one goroutine at a time. The result is
	// valid until the next call. Once the Conn is closed the error wraps
	// net.ErrClosed; any error is final.
	ReadBatch() ([]Group, error)

	// WriteBatch sends the datagrams to one endpoint in order, as few messages
	// as possible: consecutive datagrams of equal size leave as one
	// message where the kernel can segment (a shorter one may end such a run).
	// It blocks while the socket's buffer is full, and doesn't keep or change
	// pkts. It may be called from several goroutines at once. Datagrams that
	// the kernel refuses singly are counted, not reported; an error, which
	// wraps net.ErrClosed after Close, is final.
	WriteBatch(pkts [][]byte, to Endpoint) error

	// LocalAddr is the address the socket is bound to.
	LocalAddr() netip.AddrPort

	// Close unblocks ReadBatch and WriteBatch. It may be called repeatedly.
	Close() error
}

// Options are the settings of [Listen]. The zero value is good.
type Options struct {
	// ReusePort lets several sockets of this user share one address; the kernel
	// spreads remote endpoints over them (SO_REUSEPORT). Unix only.
	ReusePort bool

	// Control, if set, is called before the socket is bound, as
	// net.ListenConfig.Control is.
	Control func(network, address string, c syscall.RawConn) error

	// RecvBuffer and SendBuffer are the sizes in bytes asked for the socket's
	// buffers. 0 means 32 and 8 MiB, below 0 leaves the system's default. The kernel
	// may give less: see Stats.
	RecvBuffer, SendBuffer int

	// Messages is how many kernel messages one ReadBatch takes at most, each
	// with a buffer of 64 KiB. 0 means 8. Of small ones it takes up to 64, unless
	// ShareBuffers is set.
	Messages int

	// ShareBuffers makes the socket hold those buffers only while there are
	// datagrams in them, for a program with many sockets of which most are
	// idle. Linux only; elsewhere a socket keeps one buffer.
	ShareBuffers bool

	// NoOffload keeps UDP_SEGMENT and UDP_GRO off. For tests and for drivers
	// that get them wrong.
	NoOffload bool
}

const (
	// defaultRecvBuffer holds what one or two connections with full windows have
	// under way, in datagrams that nothing has joined: the kernel counts more than
	// twice their size.
	defaultRecvBuffer = 32 << 20
	defaultSendBuffer = 8 << 20

	defaultMessages = 8

	// smallMessages is how many messages of less than smallMessage bytes one
	// ReadBatch takes.
	smallMessages = 64
	smallMessage  = 4 << 10

	// messageSize holds the longest UDP payload and the longest that the
	// kernel joins.
	messageSize = 1 << 16
)

func (o Options) withDefaults() Options {
	if o.RecvBuffer == 0 {
		o.RecvBuffer = defaultRecvBuffer
	}
	if o.SendBuffer == 0 {
		o.SendBuffer = defaultSendBuffer
	}
	if o.Messages <= 0 {
		o.Messages = defaultMessages
	}
	return o
}
