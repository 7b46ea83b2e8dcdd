//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

const segment = 100

// superPacket is one of TCP or UDP with n segments, the last of which has half
// the payload. Each byte of the payload is the number of its segment.
func superPacket(tcp bool, n int) []byte {
	var payload []byte
	for i := range n {
		size := segment
		if i == n-1 {
			size /= 2
		}
		payload = append(payload, bytes.Repeat([]byte{byte(i)}, size)...)
	}
	transport := make([]byte, smallestUDP)
	binary.BigEndian.PutUint16(transport[udpLength:], uint16(len(transport)+len(payload)))
	kind, protocol, checksum := byte(typeUDP), byte(17), 6
	if tcp {
		transport = make([]byte, 32) // with options
		binary.BigEndian.PutUint32(transport[tcpSequence:], 1<<32-150)
		transport[tcpDataOffset] = 32 / 4 << 4
		transport[tcpFlags] = flagFIN | flagPSH | flagCWR | 0x10
		kind, protocol, checksum = typeTCP4|typeECN, 6, 16
	}
	ip := make([]byte, smallestIPv4)
	ip[0], ip[8], ip[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(transport)+len(payload)))
	binary.BigEndian.PutUint16(ip[4:], 0xfffe) // the identification
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	vnet := make([]byte, vnetSize)
	vnet[0], vnet[vnetType] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, kind
	binary.NativeEndian.PutUint16(vnet[vnetSegment:], segment)
	binary.NativeEndian.PutUint16(vnet[vnetChecksum:], smallestIPv4)
	binary.NativeEndian.PutUint16(vnet[vnetChecksum+2:], uint16(checksum))
	return bytes.Join([][]byte{vnet, ip, transport, payload}, nil)
}

// losing is an answer for each segment: x is lost.
func losing(plan string) func() bool {
	return func() bool {
		c := plan[0]
		plan = plan[1:]
		return c == 'x'
	}
}

func TestLose(t *testing.T) {
	for _, c := range []struct {
		plan  string
		whole bool
		parts [][2]int // first segment, and the one behind the last
	}{
		{"....", true, nil},
		{"xxxx", false, nil},
		{"x...", false, [][2]int{{1, 4}}},
		{".x..", false, [][2]int{{0, 1}, {2, 4}}},
		{".xx.", false, [][2]int{{0, 1}, {3, 4}}},
		{"...x", false, [][2]int{{0, 3}}},
		{".x.x", false, [][2]int{{0, 1}, {2, 3}}},
	} {
		for _, tcp := range []bool{true, false} {
			p := superPacket(tcp, 4)
			var got [][]byte
			whole, losses := lose(p, losing(c.plan), func(b []byte) { got = append(got, b) })
			if whole != c.whole || losses != bytes.Count([]byte(c.plan), []byte("x")) || len(got) != len(c.parts) {
				t.Fatalf("%s: whole %v, %d lost, %d parts", c.plan, whole, losses, len(got))
			}
			for i, part := range c.parts {
				checkPart(t, got[i], tcp, part[0], part[1], 4)
			}
		}
	}
}

// checkPart looks at everything in a packet that must have changed.
func checkPart(t *testing.T, b []byte, tcp bool, from, to, of int) {
	t.Helper()
	ip := b[vnetSize:]
	if int(binary.BigEndian.Uint16(ip[2:])) != len(ip) {
		t.Errorf("IP length is %d, the packet has %d bytes", binary.BigEndian.Uint16(ip[2:]), len(ip))
	}
	if got := binary.BigEndian.Uint16(ip[4:]); got != uint16(0xfffe+from) {
		t.Errorf("identification %#x of segment %d", got, from)
	}
	var header uint32
	for i := 0; i < smallestIPv4; i += 2 {
		header += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	if header%0xffff != 0 {
		t.Errorf("IP checksum is wrong: %#x", header)
	}
	transport := ip[smallestIPv4:]
	payload := transport[smallestUDP:]
	checksum := transport[6:]
	if tcp {
		payload, checksum = transport[32:], transport[16:]
		if got, want := binary.BigEndian.Uint32(transport[4:]), uint32(from*segment)-150; got != want {
			t.Errorf("sequence number %d of segment %d, want %d", got, from, want)
		}
		want := byte(0x10)
		if from == 0 {
			want |= flagCWR
		}
		if to == of {
			want |= flagFIN | flagPSH
		}
		if transport[13] != want {
			t.Errorf("segments %d to %d have flags %#x, want %#x", from, to, transport[13], want)
		}
	} else if int(binary.BigEndian.Uint16(transport[4:])) != len(transport) {
		t.Errorf("UDP length is %d, not %d", binary.BigEndian.Uint16(transport[4:]), len(transport))
	}
	pseudo := uint32(0x0a00+0x0001+0x0a00+0x0002) + uint32(ip[9]) + uint32(len(transport))
	if uint32(binary.BigEndian.Uint16(checksum)) != pseudo%0xffff {
		t.Errorf("checksum of the pseudo header is %#x, want %#x", checksum[:2], pseudo%0xffff)
	}
	var want []byte
	for i := from; i < to; i++ {
		n := segment
		if i == of-1 {
			n /= 2
		}
		want = append(want, bytes.Repeat([]byte{byte(i)}, n)...)
	}
	if !bytes.Equal(payload, want) {
		t.Errorf("segments %d to %d have another payload", from, to)
	}
	one := len(want) <= segment
	if (b[vnetType] == typeNone) != one || (binary.NativeEndian.Uint16(b[vnetSegment:]) == 0) != one {
		t.Errorf("segments %d to %d have an offload header of % x", from, to, b[:vnetSize])
	}
}

func TestLoseSingle(t *testing.T) {
	none := func([]byte) { t.Error("a part of a packet of one segment") }
	p := superPacket(true, 1)
	if whole, losses := lose(p, losing("."), none); !whole || losses != 0 {
		t.Error("lost")
	}
	if whole, losses := lose(p, losing("x"), none); whole || losses != 1 {
		t.Error("not lost")
	}
}

// Whatever comes is a packet or none, never a panic.
func TestLoseTruncated(t *testing.T) {
	for _, tcp := range []bool{true, false} {
		p := superPacket(tcp, 4)
		for n := range p {
			lose(p[:n], losing("x.x.x"), func([]byte) {})
		}
	}
}
