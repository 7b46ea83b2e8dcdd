package netstack

import "sync/atomic"

// Stats counts what a Stack has done since it was made.
type Stats struct {
	PacketsIn, BytesIn   uint64 // IP packets given to Input
	PacketsOut, BytesOut uint64 // IP packets given to Output
	Delivered            uint64 // packets handed to the stack after joining
	Batches              uint64 // calls of Output

	DropMalformed   uint64 // Input: not an IP packet, or cut off
	DropProtocol    uint64 // Input: neither TCP nor UDP nor ICMP
	DropForeignICMP uint64 // Input: ICMP to an address not our own that is no error message
	DropOversize    uint64 // Output: a packet larger than the MTU
	DropNoRoom      uint64 // Input: segments, joined ones counted once, that a connection's receive buffer had no room for
	DropClosed      uint64 // Input or Output after Close

	AcksHeld       uint64 // duplicate acknowledgements held back in case it was only reordering
	AcksDropped    uint64 // of those, dropped because it was
	AcksReleased   uint64 // of those, handed over when their time was up
	AcksSuperseded uint64 // acknowledgements not handed over because of a higher one in the same batch
	LossesMended   uint64 // stretches of data sent again without the stack's knowledge

	PortsUsedUp uint64 // dials and sockets that found no port, each attempt counted

	GapResent uint64 // segments sent again by Resume
	GapNudged uint64 // connections whose peer was asked by Resume to send again

	TCPForwardFull uint64 // SYNs dropped because of ForwardTCP's maxInFlight

	TCPEstablished  uint64 // connections now established
	TCPRetransmits  uint64 // segments sent again
	TCPResetsOut    uint64
	TCPResetsIn     uint64
	TCPTimeouts     uint64 // connections given up because the peer was silent
	UDPBufferErrors uint64 // datagrams lost to a full receive buffer
	DNSQueries      uint64 // questions the stack's resolvers sent
	DNSCacheHits    uint64 // lookups answered from a resolver's cache
}

// counters are those of the device.
type counters struct {
	packetsIn, bytesIn, packetsOut, bytesOut, delivered, batches           atomic.Uint64
	dropMalformed, dropProtocol, dropForeignICMP, dropOversize, dropClosed atomic.Uint64
	forwardFull                                                            atomic.Uint64
	heldAcks, heldDropped, heldReleased, mended, superseded                atomic.Uint64
	gapResent, gapNudged                                                   atomic.Uint64
}

// Stats returns the counters.
func (s *Stack) Stats() Stats {
	c := &s.dev.counters
	g := s.st.Stats()
	return Stats{
		PacketsIn:       c.packetsIn.Load(),
		BytesIn:         c.bytesIn.Load(),
		PacketsOut:      c.packetsOut.Load(),
		BytesOut:        c.bytesOut.Load(),
		Delivered:       c.delivered.Load(),
		Batches:         c.batches.Load(),
		DropMalformed:   c.dropMalformed.Load(),
		DropProtocol:    c.dropProtocol.Load(),
		DropForeignICMP: c.dropForeignICMP.Load(),
		DropOversize:    c.dropOversize.Load(),
		DropNoRoom:      g.DroppedPackets.Value(),
		DropClosed:      c.dropClosed.Load(),
		AcksHeld:        c.heldAcks.Load(),
		AcksDropped:     c.heldDropped.Load(),
		AcksReleased:    c.heldReleased.Load(),
		AcksSuperseded:  c.superseded.Load(),
		LossesMended:    c.mended.Load(),
		PortsUsedUp:     s.ports.usedUp.Load(),
		GapResent:       c.gapResent.Load(),
		GapNudged:       c.gapNudged.Load(),
		TCPForwardFull:  c.forwardFull.Load(),
		TCPEstablished:  g.TCP.CurrentEstablished.Value(),
		TCPRetransmits:  g.TCP.Retransmits.Value(),
		TCPResetsOut:    g.TCP.ResetsSent.Value(),
		TCPResetsIn:     g.TCP.ResetsReceived.Value(),
		TCPTimeouts:     g.TCP.EstablishedTimedout.Value(),
		UDPBufferErrors: g.UDP.ReceiveBufferErrors.Value(),
		DNSQueries:      s.dnsQueries.Load(),
		DNSCacheHits:    s.dnsHits.Load(),
	}
}
