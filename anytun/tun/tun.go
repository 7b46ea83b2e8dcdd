package tun

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// ErrNotSupported is what Open and Host return where there are no such devices.
var ErrNotSupported = errors.New("tun: not supported on this system")

// Config describes a device. The zero value is good.
type Config struct {
	// Name of the interface, at most 15 bytes; a %d in it becomes the first
	// free number. Empty means "anytun%d".
	Name string

	// MTU in bytes, 1280 (RFC 8200 section 5) to 65535. 0 means 1400.
	MTU int

	// Headroom and Tailroom are the bytes left free before and after each
	// packet that ReadBatch returns.
	Headroom, Tailroom int
}

const (
	defaultName = "anytun%d"
	defaultMTU  = 1400
	minMTU      = 1280
	maxPacket   = 65535
	maxRoom     = 1024 // of headroom and of tailroom
)

func (c Config) withDefaults() (Config, error) {
	if c.Name == "" {
		c.Name = defaultName
	}
	if c.MTU == 0 {
		c.MTU = defaultMTU
	}
	if c.MTU < minMTU || c.MTU > maxPacket {
		return c, fmt.Errorf("mtu %d is not between %d and %d", c.MTU, minMTU, maxPacket)
	}
	if c.Headroom < 0 || c.Headroom > maxRoom || c.Tailroom < 0 || c.Tailroom > maxRoom {
		return c, fmt.Errorf("headroom %d or tailroom %d is not between 0 and %d", c.Headroom, c.Tailroom, maxRoom)
	}
	return c, nil
}

// DropReason says why a packet was lost at the device.
type DropReason uint8

const (
	// DropMalformed is a packet whose headers contradict themselves or its
	// length, in either direction.
	DropMalformed DropReason = iota
	// DropOffload is a super-packet of a kind that was never asked for.
	DropOffload
	// DropRefused is a packet that the kernel found invalid (EINVAL).
	DropRefused
	// DropQueueFull is ENOBUFS, ENOMEM or EAGAIN: no memory in the kernel.
	DropQueueFull
	// DropDown is EIO: the interface is down.
	DropDown
	// DropClosed is a packet written after Close, or to a device that is gone.
	DropClosed
	// DropBacklog is a packet to the server that the kernel threw away because
	// the device's queue was full: the server reads too slowly.
	DropBacklog

	// NumDropReasons is the number of reasons above.
	NumDropReasons = iota
)

var dropNames = [NumDropReasons]string{
	DropMalformed: "malformed",
	DropOffload:   "offload",
	DropRefused:   "refused",
	DropQueueFull: "queue_full",
	DropDown:      "down",
	DropClosed:    "closed",
	DropBacklog:   "backlog",
}

// String is the reason's name as a metrics label.
func (r DropReason) String() string {
	if int(r) < len(dropNames) {
		return dropNames[r]
	}
	return "unknown"
}

// Traffic counts one direction of a device.
type Traffic struct {
	Packets  uint64 // of the MTU's size
	Bytes    uint64 // of those packets with their headers
	Messages uint64 // what the kernel gave or was given, one system call each: one packet or many
}

// Stats is a snapshot of a device's counters.
type Stats struct {
	Read, Written Traffic // from the kernel, to the kernel

	// Drops is indexed by DropReason, in packets; in Messages for DropBacklog.
	Drops [NumDropReasons]uint64

	// USO says whether the kernel takes and gives UDP super-packets.
	USO bool
}

// counters are Stats in the making.
type counters struct {
	read, written direction
	drops         [NumDropReasons]atomic.Uint64
}

type direction struct {
	packets, bytes, messages atomic.Uint64
}

func (d *direction) add(packets, bytes, messages int) {
	d.packets.Add(uint64(packets))
	d.bytes.Add(uint64(bytes))
	d.messages.Add(uint64(messages))
}

func (d *direction) load() Traffic {
	return Traffic{Packets: d.packets.Load(), Bytes: d.bytes.Load(), Messages: d.messages.Load()}
}

func (c *counters) drop(r DropReason, n int) { c.drops[r].Add(uint64(n)) }

func (c *counters) snapshot() Stats {
	s := Stats{Read: c.read.load(), Written: c.written.load()}
	for i := range s.Drops {
		s.Drops[i] = c.drops[i].Load()
	}
	return s
}
