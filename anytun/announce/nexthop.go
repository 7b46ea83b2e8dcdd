package announce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// localTowards is the address from which the kernel would speak to a peer.
func localTowards(peer netip.Addr) (netip.Addr, error) {
	// Connecting a UDP socket sends nothing; it asks the routing table.
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, 179)))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("no way to %s: %w", peer, err)
	}
	defer c.Close()
	ap := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return ap.Addr().Unmap().WithZone(""), nil
}

var errNoNextHop = errors.New("no next hop")

// otherFamily is an address, of the family that local is not of, of the
// interface that has local: a global one that isn't ours to announce if there is
// one, else, for IPv6, the link-local one. errNoNextHop if there is none.
func otherFamily(local netip.Addr, announced func(netip.Addr) bool) (netip.Addr, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list interfaces: %w", err)
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue // gone meanwhile
		}
		var has bool
		var global, link netip.Addr
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			ip, ok := netip.AddrFromSlice(n.IP)
			if !ok {
				continue
			}
			ip = ip.Unmap()
			switch {
			case ip == local:
				has = true
			case ip.Is4() == local.Is4() || announced(ip):
			case ip.Is6() && ip.IsLinkLocalUnicast():
				link = ip
			case !global.IsValid():
				global = ip
			}
		}
		switch {
		case !has:
		case global.IsValid():
			return global, nil
		case link.IsValid():
			return link, nil
		default:
			return netip.Addr{}, fmt.Errorf("%w: interface %s has %s only", errNoNextHop, i.Name, local)
		}
	}
	return netip.Addr{}, fmt.Errorf("%w: no interface has %s", errNoNextHop, local)
}
