package netstack

// Stats counts what a Stack has done since it was made.
type Stats struct {
	PacketsIn, BytesIn   uint64 // IP packets given to Input
	PacketsOut, BytesOut uint64 // IP packets given to Output
	Delivered            uint64 // packets handed to the stack after joining
	Batches              uint64 // calls of Output

	DropMalformed   uint64 // Input: not an IP packet, or cut off
	DropNoForwarder uint64 // Input: a transport protocol nobody takes
	DropForeignEcho uint64 // Input: ICMP echo request to an address not our own
	DropOversize    uint64 // Output: a packet larger than MTU
	DropClosed      uint64 // Input or Output after Close
	DropICMPLimit   uint64 // an ICMP error that the rate limit held back

	TCPForwardFull uint64 // SYNs dropped because of ForwardTCP's maxInFlight

	TCPEstablished  uint64 // connections now established
	TCPRetransmits  uint64 // segments sent again
	TCPResetsOut    uint64
	TCPResetsIn     uint64
	TCPTimeouts     uint64 // connections given up because the peer was silent
	UDPBufferErrors uint64 // datagrams lost to a full receive buffer
	DNSQueries      uint64 // questions the stack's resolvers sent
	DNSCacheHits    uint64
}

// Stats returns the counters.
func (s *Stack) Stats() Stats { return Stats{} }
