//go:build linux

package main

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Where things are in struct virtio_net_hdr, in the byte order of this machine.
const (
	vnetType      = 1
	vnetSegment   = 4
	vnetChecksum  = 6
	typeNone      = unix.VIRTIO_NET_HDR_GSO_NONE
	typeTCP4      = unix.VIRTIO_NET_HDR_GSO_TCPV4
	typeUDP       = unix.VIRTIO_NET_HDR_GSO_UDP_L4
	typeECN       = unix.VIRTIO_NET_HDR_GSO_ECN
	flagFIN       = 0x01
	flagPSH       = 0x08
	flagCWR       = 0x80
	smallestIPv4  = 20
	smallestUDP   = 8
	smallestTCP   = 20
	tcpSequence   = 4
	tcpDataOffset = 12
	tcpFlags      = 13
	udpLength     = 4
)

// lose asks of each segment of a packet whether it is lost. Nothing lost: whole,
// and the packet is to be sent as it is. Otherwise each run of segments between
// lost ones is given to emit as a packet of its own, valid until emit returns.
// A packet of a kind that nobody sends here is one segment.
func lose(p []byte, lost func() bool, emit func([]byte)) (whole bool, losses int) {
	s, ok := parseSuper(p)
	if !ok {
		if lost() {
			return false, 1
		}
		return true, 0
	}
	gone := make([]bool, s.segments)
	for i := range gone {
		if gone[i] = lost(); gone[i] {
			losses++
		}
	}
	if losses == 0 {
		return true, 0
	}
	for from := 0; from < s.segments; from++ {
		if gone[from] {
			continue
		}
		to := from + 1
		for to < s.segments && !gone[to] {
			to++
		}
		emit(s.part(from, to))
		from = to // which is lost, or the end
	}
	return false, losses
}

// A super is a packet that stands for several segments.
type super struct {
	packet    []byte // with the kernel's header
	ip        int    // its length, and those of the headers of both layers
	headers   int
	tcp       bool
	segment   int // payload of each segment but the last
	segments  int
	payload   []byte
	transport int // where its header begins in the packet
}

// parseSuper is false if the packet is one segment, or no IPv4 we understand.
func parseSuper(p []byte) (s super, ok bool) {
	if len(p) < vnetSize+smallestIPv4 || p[vnetSize]>>4 != 4 {
		return s, false
	}
	if p[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
		return s, false // the kernel gives none such
	}
	kind := p[vnetType] &^ typeECN
	if kind != typeTCP4 && kind != typeUDP {
		return s, false
	}
	s = super{packet: p, ip: int(p[vnetSize]&15) * 4, tcp: kind == typeTCP4, segment: int(binary.NativeEndian.Uint16(p[vnetSegment:]))}
	s.transport = vnetSize + s.ip
	switch {
	case s.tcp && len(p) >= s.transport+smallestTCP:
		s.headers = s.ip + int(p[s.transport+tcpDataOffset]>>4)*4
	case !s.tcp && len(p) >= s.transport+smallestUDP:
		s.headers = s.ip + smallestUDP
	default:
		return s, false
	}
	if s.segment == 0 || len(p) <= vnetSize+s.headers+s.segment {
		return s, false
	}
	s.payload = p[vnetSize+s.headers:]
	s.segments = (len(s.payload) + s.segment - 1) / s.segment
	return s, true
}

// part is the packet of the segments from the first up to, not including, the last.
func (s super) part(from, to int) []byte {
	payload := s.payload[from*s.segment : min(to*s.segment, len(s.payload))]
	b := append(append([]byte(nil), s.packet[:vnetSize+s.headers]...), payload...)
	if len(payload) <= s.segment {
		b[vnetType] = typeNone
		binary.NativeEndian.PutUint16(b[vnetSegment:], 0)
	}
	ip, transport := b[vnetSize:s.transport], b[s.transport:]
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)-vnetSize))
	binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+uint16(from))
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip, 0)))
	if s.tcp {
		binary.BigEndian.PutUint32(transport[tcpSequence:], binary.BigEndian.Uint32(transport[tcpSequence:])+uint32(from*s.segment))
		if to < s.segments {
			transport[tcpFlags] &^= flagFIN | flagPSH
		}
		if from > 0 {
			transport[tcpFlags] &^= flagCWR
		}
	} else {
		binary.BigEndian.PutUint16(transport[udpLength:], uint16(len(transport)))
	}
	// The kernel, which fills the checksum in, expects that of the pseudo header there.
	at := s.transport + int(binary.NativeEndian.Uint16(b[vnetChecksum+2:]))
	pseudo := sum(ip[12:20], uint32(ip[9])+uint32(len(transport)))
	binary.BigEndian.PutUint16(b[at:], fold(pseudo))
	return b
}

// sum adds 16-bit words, of which there is a whole number in all headers here.
func sum(b []byte, to uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		to += uint32(binary.BigEndian.Uint16(b))
	}
	return to
}

func fold(v uint32) uint16 {
	for v>>16 != 0 {
		v = v&0xffff + v>>16
	}
	return uint16(v)
}
