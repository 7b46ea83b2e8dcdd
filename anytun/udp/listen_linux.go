package udp

import "net/netip"

func listen(addr netip.AddrPort, o Options) (Conn, error) { return listenPortable(addr, o) }
