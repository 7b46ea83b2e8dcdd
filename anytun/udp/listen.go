package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
)

// Listen opens an unconnected UDP socket. Port 0 lets the system choose. The
// address [::] receives IPv4 too; an invalid address means [::], or 0.0.0.0 on
// hosts without IPv6.
func Listen(addr netip.AddrPort, o Options) (Conn, error) {
	return listen(addr, o)
}

// listenUDP opens the socket that both implementations stand on.
func listenUDP(addr netip.AddrPort, o Options) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		if o.ReusePort {
			if err := setReusePort(c); err != nil {
				return fmt.Errorf("share the port: %w", err)
			}
		}
		if o.Control != nil {
			return o.Control(network, address, c)
		}
		return nil
	}}
	if addr.Addr().IsValid() {
		return listenOn(&lc, addr)
	}
	uc, err := listenOn(&lc, netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()))
	if err == nil || errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES) {
		return uc, err
	}
	return listenOn(&lc, netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()))
}

func listenOn(lc *net.ListenConfig, addr netip.AddrPort) (*net.UDPConn, error) {
	addr = unmap(addr)
	network := "udp6"
	switch {
	case addr.Addr().Is4():
		network = "udp4"
	case addr.Addr() == netip.IPv6Unspecified():
		network = "udp" // dual stack
	}
	pc, err := lc.ListenPacket(context.Background(), network, addr.String())
	if err != nil {
		return nil, fmt.Errorf("listen on udp %s: %w", addr, err)
	}
	return pc.(*net.UDPConn), nil
}

// localAddr is where uc is bound.
func localAddr(uc *net.UDPConn) netip.AddrPort {
	return unmap(uc.LocalAddr().(*net.UDPAddr).AddrPort())
}

// unmap turns ::ffff:192.0.2.1 into 192.0.2.1.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
