package tun

import (
	"log/slog"
	"net/netip"
)

// Host is the part of the host's configuration that leads packets to a device
// and lets it send. The zero value leads nothing.
type Host struct {
	// Device is the interface's name; it has to exist for Up.
	Device string

	// Egress are the addresses that belong to the device: packets for them go
	// there, whoever sends them.
	Egress []netip.Prefix

	// Service are the addresses of the server's own UDP sockets, an unspecified
	// address for all of the host's. They stay with the host even if their
	// address is an egress address.
	Service []netip.AddrPort

	Logger *slog.Logger // nil: discard
}

func (h Host) logger() *slog.Logger {
	if h.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return h.Logger
}
