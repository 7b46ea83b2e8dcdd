package tun

import "encoding/binary"

// vnetSize is the length of struct virtio_net_hdr (linux/virtio_net.h), bytes.
const vnetSize = 10

const (
	vnetNeedsChecksum = 1 // in flags

	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDP   = 5    // VIRTIO_NET_HDR_GSO_UDP_L4
	gsoECN   = 0x80 // beside the others
)

// vnet is a virtio-net header. It has the machine's byte order.
type vnet struct {
	flags   uint8
	gso     uint8
	headLen uint16 // IP and transport header, a hint
	gsoSize uint16 // payload bytes of each packet of a super-packet but the last
	// The checksum over everything from start belongs at start+offset, where
	// the sum of the pseudo header stands.
	start, offset uint16
}

func (v *vnet) put(b []byte) {
	_ = b[vnetSize-1]
	b[0], b[1] = v.flags, v.gso
	binary.NativeEndian.PutUint16(b[2:], v.headLen)
	binary.NativeEndian.PutUint16(b[4:], v.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], v.start)
	binary.NativeEndian.PutUint16(b[8:], v.offset)
}

func getVnet(b []byte) vnet {
	_ = b[vnetSize-1]
	return vnet{
		flags:   b[0],
		gso:     b[1],
		headLen: binary.NativeEndian.Uint16(b[2:]),
		gsoSize: binary.NativeEndian.Uint16(b[4:]),
		start:   binary.NativeEndian.Uint16(b[6:]),
		offset:  binary.NativeEndian.Uint16(b[8:]),
	}
}
