package udp

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Control data, both ways. A send slot holds at most two messages; which of them
// go out is a matter of where the kernel is told to begin and end:
//
//	0             segmentSpace                  controlSize
//	+-------------+---------------------+-------+
//	| UDP_SEGMENT | IP(V6)_PKTINFO      | spare |
//	+-------------+---------------------+-------+
//
// A receive slot gets IP(V6)_PKTINFO and UDP_GRO in whatever order.
const controlSize = 128

var segmentSpace = unix.CmsgSpace(2)

// control is aligned as struct cmsghdr wants it.
type control [controlSize / 8]uint64

func (c *control) at(offset int) unsafe.Pointer {
	return unsafe.Pointer(&(*[controlSize]byte)(unsafe.Pointer(c))[offset])
}

func (c *control) put(offset int, level, kind int32, size int) unsafe.Pointer {
	h := (*unix.Cmsghdr)(c.at(offset))
	h.Level, h.Type = level, kind
	h.SetLen(unix.CmsgLen(size))
	return c.at(offset + unix.CmsgLen(0))
}

// putSegment says that the message is to be cut into datagrams of size bytes.
func (c *control) putSegment(size int) {
	*(*uint16)(c.put(0, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)) = uint16(size)
}

// putSource says which local address the message leaves from and returns the
// length of the control message in bytes.
func (c *control) putSource(local netip.Addr, is6 bool, zone uint32) int {
	if is6 {
		info := (*unix.Inet6Pktinfo)(c.put(segmentSpace, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo))
		*info = unix.Inet6Pktinfo{Addr: local.As16(), Ifindex: zone}
		return unix.CmsgSpace(unix.SizeofInet6Pktinfo)
	}
	info := (*unix.Inet4Pktinfo)(c.put(segmentSpace, unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo))
	*info = unix.Inet4Pktinfo{Spec_dst: local.As4()}
	return unix.CmsgSpace(unix.SizeofInet4Pktinfo)
}

// parse reads what the kernel said about a received message: the local address
// it was sent to (invalid if not told) and the size of the datagrams in it (0 if
// there is only one). length is msg_controllen.
func (c *control) parse(length int, z *zones) (local netip.Addr, segment int) {
	for off := 0; off+unix.SizeofCmsghdr <= min(length, controlSize); {
		h := (*unix.Cmsghdr)(c.at(off))
		size := int(h.Len)
		if size < unix.CmsgLen(0) || off+size > min(length, controlSize) {
			break
		}
		data, have := unsafe.Add(unsafe.Pointer(h), unix.CmsgLen(0)), size-unix.CmsgLen(0)
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && have >= 4:
			segment = int(*(*int32)(data))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && have >= unix.SizeofInet4Pktinfo:
			// Spec_dst, not Addr: the same for unicast and anycast, but a
			// usable source when somebody sent to a broadcast address.
			local = netip.AddrFrom4((*unix.Inet4Pktinfo)(data).Spec_dst)
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && have >= unix.SizeofInet6Pktinfo:
			info := (*unix.Inet6Pktinfo)(data)
			local = netip.AddrFrom16(info.Addr).Unmap()
			switch {
			case local.IsMulticast():
				local = netip.Addr{}
			case local.IsLinkLocalUnicast() && local.Is6():
				local = local.WithZone(z.name(info.Ifindex))
			}
		}
		off += unix.CmsgSpace(have)
	}
	return local, segment
}
