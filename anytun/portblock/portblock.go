// Package portblock computes which ports on which egress address belong to a
// client, and back. Because it is arithmetic and not a table, every server of a
// cluster knows the owner of every port without asking anybody.
//
// Each egress address carries as many blocks of equal size as fit between port
// 1024 and 65535; clients 1, 2, 3, … get them in order, address after address:
//
//	address 0                                        address 1
//	1024      2048      3072              64512      1024      2048
//	+---------+---------+---- ... ----+---------+    +---------+----
//	| client 1| client 2|             |client 63|    |client 64|
//	+---------+---------+---- ... ----+---------+    +---------+----
//
// (with 1024 ports per client). Number 0 is the servers and has no block. What is
// left over at the end of an address, if the size does not divide 64512, belongs to
// nobody.
//
// [Blocks] is that arithmetic, [Plan] applies it to a cluster's egress addresses,
// and [Leases] are the one exception to it: blocks without a client that others
// have been lent.
package portblock

import (
	"fmt"
	"math"
)

const (
	// DefaultPorts is the size of a block unless the cluster says otherwise.
	DefaultPorts = 1024
	// FirstPort is where the blocks of an address begin; below are the
	// well-known ports, which a host may serve itself.
	FirstPort = 1024
	// MaxPorts is the size at which an address has one client.
	MaxPorts = 1<<16 - FirstPort
)

// Blocks is a way to divide addresses into blocks. The zero value has
// DefaultPorts ports per client. All servers of a cluster must use the same.
type Blocks struct {
	ports uint32 // 0 means DefaultPorts
}

// New returns the division into blocks of the given number of ports.
func New(ports int) (Blocks, error) {
	if ports < 1 || ports > MaxPorts {
		return Blocks{}, fmt.Errorf("%d ports per client: must be 1 to %d", ports, MaxPorts)
	}
	return Blocks{ports: uint32(ports)}, nil
}

// Ports is the number of ports of a block.
func (b Blocks) Ports() int { return int(b.size()) }

// PerAddress is the number of clients that share one egress address.
func (b Blocks) PerAddress() int { return int(b.perAddress()) }

// Addresses is how many egress addresses the clients 1 to highest need.
func (b Blocks) Addresses(highest uint32) int {
	return int((uint64(highest) + uint64(b.perAddress()) - 1) / uint64(b.perAddress()))
}

// Of returns a client's block: the index of its egress address, its first and
// its last port. Number 0 has none: the index is -1.
func (b Blocks) Of(number uint32) (addrIndex int, first, last uint16) {
	if number == 0 {
		return -1, 0, 0
	}
	addr, block := (number-1)/b.perAddress(), (number-1)%b.perAddress()
	start := FirstPort + block*b.size()
	return int(addr), uint16(start), uint16(start + b.size() - 1)
}

// Client returns the number of the client that a port of an egress address
// belongs to, and false if it is nobody's.
func (b Blocks) Client(addrIndex int, port uint16) (number uint32, ok bool) {
	if addrIndex < 0 || port < FirstPort {
		return 0, false
	}
	block := (uint32(port) - FirstPort) / b.size()
	if block >= b.perAddress() || uint64(addrIndex) > math.MaxUint32/uint64(b.perAddress()) {
		return 0, false
	}
	n := uint64(addrIndex)*uint64(b.perAddress()) + uint64(block) + 1
	if n > math.MaxUint32 {
		return 0, false
	}
	return uint32(n), true
}

func (b Blocks) size() uint32 {
	if b.ports == 0 {
		return DefaultPorts
	}
	return b.ports
}

func (b Blocks) perAddress() uint32 { return MaxPorts / b.size() }
