package server

import (
	"sync/atomic"

	"github.com/anytun-go/anytun/netstack"
)

// egressCounters is what the sockets egress counts; EgressStats says what the
// counters mean.
type egressCounters struct {
	notRunning, malformed, unknownClient, draining        atomic.Uint64
	forbidden, clientFull, allFull, dialsFull, evicted    atomic.Uint64
	opened, expired                                       [egressKinds]atomic.Uint64
	tcpRefused, tcpUnreachable, tcpTimedOut, tcpNoSocket  atomic.Uint64
	tcpDialFailed, tcpAcceptFailed, tcpReset              atomic.Uint64
	tcpBytesUp, tcpBytesDown                              atomic.Uint64
	udpOut, udpIn, udpBytesOut, udpBytesIn                atomic.Uint64
	udpNoSocket, udpFull, udpSendFailed, udpInvalid       atomic.Uint64
	udpInForbidden, udpInFailed, udpErrors                atomic.Uint64
	pingOut, pingIn                                       atomic.Uint64
	pingFragment, pingNoSocket, pingSendFailed, pingStray atomic.Uint64
	pingOversize                                          atomic.Uint64
}

// EgressStats counts what the sockets egress has done. What is not said to be
// a gauge only grows.
type EgressStats struct {
	// Gauges.
	Flows, FlowsTCP, FlowsUDP, FlowsPing int
	Dials                                int // TCP connections being opened
	Clients                              int // clients that have a flow

	// Drops and refusals of every protocol.
	DropNotRunning    uint64 // packets and flows before or after Run
	DropMalformed     uint64 // packets whose lengths don't agree
	DropUnknownClient uint64 // flows of an inner address that is no client's
	DropDraining      uint64 // flows refused because of Drain
	DropForbidden     uint64 // TCP flows, datagrams and pings to where clients may not go
	DropClientFull    uint64 // flows above MaxFlowsPerClient
	DropAllFull       uint64 // flows above MaxFlows
	DropDialsFull     uint64 // TCP flows above MaxDialsPerClient or MaxDials
	Evicted           uint64 // idle mappings given up for a new flow of the same client

	TCPOpened       uint64 // connections admitted
	TCPExpired      uint64 // idle for TCPTimeout
	TCPRefused      uint64 // dials that ended with a reset
	TCPUnreachable  uint64 // dials without a route, or stopped by a filter
	TCPTimedOut     uint64 // dials without an answer
	TCPNoSocket     uint64 // dials for which the host had no descriptor, port or memory
	TCPDialFailed   uint64 // dials that failed otherwise
	TCPAcceptFailed uint64 // clients that were gone when the dial had succeeded
	TCPReset        uint64 // connections that ended with a reset or a time-out
	TCPBytesUp      uint64 // payload from clients
	TCPBytesDown    uint64 // payload to clients

	UDPOpened, UDPExpired      uint64 // mappings
	UDPPacketsOut, UDPBytesOut uint64 // datagrams from clients, payload
	UDPPacketsIn, UDPBytesIn   uint64 // datagrams to clients, payload
	UDPDropNoSocket            uint64 // the host had no socket to give
	UDPDropFull                uint64 // the host's send buffer was full
	UDPDropSend                uint64 // the host refused to send
	UDPDropInvalid             uint64 // port 0
	UDPDropInForbidden         uint64 // from a source clients may not talk to
	UDPDropIn                  uint64 // replies that the netstack could not send
	UDPErrors                  uint64 // ICMP errors passed on to clients

	PingOpened, PingExpired uint64 // mappings
	PingOut, PingIn         uint64
	PingDropFragment        uint64 // echo requests larger than the MTU, or cut short
	PingDropNoSocket        uint64 // the host allows no ping sockets, or had none to give
	PingDropSend            uint64 // the host refused to send
	PingDropStray           uint64 // replies that belong to nobody
	PingDropOversize        uint64 // replies larger than the MTU

	DNS   DNSStats
	Stack netstack.Stats
}

// Stats returns the counters.
func (e *sockets) Stats() EgressStats {
	kinds, dials, clients := e.flows.gauges()
	c := &e.count
	return EgressStats{
		Flows:    kinds[egressKindTCP] + kinds[egressKindUDP] + kinds[egressKindPing],
		FlowsTCP: kinds[egressKindTCP], FlowsUDP: kinds[egressKindUDP], FlowsPing: kinds[egressKindPing],
		Dials: dials, Clients: clients,

		DropNotRunning: c.notRunning.Load(), DropMalformed: c.malformed.Load(),
		DropUnknownClient: c.unknownClient.Load(), DropDraining: c.draining.Load(),
		DropForbidden: c.forbidden.Load(), DropClientFull: c.clientFull.Load(),
		DropAllFull: c.allFull.Load(), DropDialsFull: c.dialsFull.Load(),
		Evicted: c.evicted.Load(),

		TCPOpened: c.opened[egressKindTCP].Load(), TCPExpired: c.expired[egressKindTCP].Load(),
		TCPRefused: c.tcpRefused.Load(), TCPUnreachable: c.tcpUnreachable.Load(),
		TCPTimedOut: c.tcpTimedOut.Load(), TCPNoSocket: c.tcpNoSocket.Load(),
		TCPDialFailed: c.tcpDialFailed.Load(), TCPAcceptFailed: c.tcpAcceptFailed.Load(),
		TCPReset: c.tcpReset.Load(), TCPBytesUp: c.tcpBytesUp.Load(), TCPBytesDown: c.tcpBytesDown.Load(),

		UDPOpened: c.opened[egressKindUDP].Load(), UDPExpired: c.expired[egressKindUDP].Load(),
		UDPPacketsOut: c.udpOut.Load(), UDPBytesOut: c.udpBytesOut.Load(),
		UDPPacketsIn: c.udpIn.Load(), UDPBytesIn: c.udpBytesIn.Load(),
		UDPDropNoSocket: c.udpNoSocket.Load(), UDPDropFull: c.udpFull.Load(),
		UDPDropSend: c.udpSendFailed.Load(), UDPDropInvalid: c.udpInvalid.Load(),
		UDPDropInForbidden: c.udpInForbidden.Load(), UDPDropIn: c.udpInFailed.Load(),
		UDPErrors: c.udpErrors.Load(),

		PingOpened: c.opened[egressKindPing].Load(), PingExpired: c.expired[egressKindPing].Load(),
		PingOut: c.pingOut.Load(), PingIn: c.pingIn.Load(),
		PingDropFragment: c.pingFragment.Load(), PingDropNoSocket: c.pingNoSocket.Load(),
		PingDropSend: c.pingSendFailed.Load(), PingDropStray: c.pingStray.Load(),
		PingDropOversize: c.pingOversize.Load(),

		DNS:   e.dns.stats(),
		Stack: e.stack.Stats(),
	}
}
