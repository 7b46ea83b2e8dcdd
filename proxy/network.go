package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// ErrNotSupported is wrapped by a Network's errors for what it can't do at all, for example SOCKS BIND for a peer that
// has no way of reaching us.
var ErrNotSupported = errors.New("the network does not support this")

// Network is what a proxy reaches the world with. All methods may be called concurrently.
//
// Errors are *net.OpError wrapping a syscall.Errno, *net.DNSError, context errors, or wrap ErrNotSupported; ReasonOf
// turns them into what the application is told.
type Network interface {
	// DialContext opens a TCP connection ("tcp") to "host:port"; a name is resolved at the far end.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	// ListenPacket opens a UDP socket that sends to any destination, IPv4 and IPv6, from one port.
	ListenPacket(ctx context.Context) (PacketConn, error)
	// Listen opens a listener that peer can reach (SOCKS BIND). An unspecified peer address means anybody.
	Listen(ctx context.Context, peer netip.AddrPort) (net.Listener, error)
	// LookupNetIP resolves a name at the far end; network is "ip", "ip4" or "ip6".
	LookupNetIP(ctx context.Context, network, name string) ([]netip.Addr, error)
	// LookupAddr finds the name of an address at the far end.
	LookupAddr(ctx context.Context, addr netip.Addr) (string, error)
}

// PacketConn is a UDP socket; *net.UDPConn is one. If it also has the method WaitReadable() error, no buffer is held
// while nothing arrives. If it is a BatchConn, only what that has is used.
type PacketConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	LocalAddr() net.Addr
	SetReadDeadline(t time.Time) error
	Close() error
}

// BatchConn is a UDP socket that moves many datagrams at once.
type BatchConn interface {
	// ReadBatch waits for datagrams and returns some that have come, in order, with their senders: each with room bytes
	// before it, at most 32. They are the caller's, to be changed as well, until the next call. One goroutine at a time
	// calls it. Any error is final.
	ReadBatch(room int) (datagrams [][]byte, from []netip.AddrPort, err error)
	// WriteBatch sends datagrams in order. It ends at the first that can't be sent and returns how many went before it,
	// and why this one didn't. It may be called concurrently.
	WriteBatch(datagrams [][]byte, to []netip.AddrPort) (int, error)
	LocalAddr() net.Addr
	Close() error
}
