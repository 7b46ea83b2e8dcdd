package proxy

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
)

// ErrBadHost is returned for a host that is neither an address nor something a name server could know.
var ErrBadHost = errors.New("not a host name")

// maxNameBytes is the longest name in its text form, RFC 1035 section 2.3.4 (with a final dot).
const maxNameBytes = 254

// Target is what an application wants to reach: an address or a name, and a port. Exactly one of Addr (valid) and Name
// (not empty) is set.
type Target struct {
	Name string
	Addr netip.Addr
	Port uint16
}

// NewTarget makes a target from a host as an application wrote it. Addresses in text form become addresses, so nobody
// asks a name server for "192.0.2.1"; IPv4-mapped ones become IPv4. Names are not resolved.
func NewTarget(host string, port uint16) (Target, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		// A zone names an interface of this host, which means nothing at the far end.
		if addr.Zone() != "" {
			return Target{}, ErrBadHost
		}
		return Target{Addr: addr.Unmap(), Port: port}, nil
	}
	if !validName(host) {
		return Target{}, ErrBadHost
	}
	return Target{Name: host, Port: port}, nil
}

// ParseTarget parses "host:port".
func ParseTarget(hostport string) (Target, error) {
	host, p, err := net.SplitHostPort(hostport)
	if err != nil {
		return Target{}, err
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return Target{}, err
	}
	return NewTarget(host, uint16(port))
}

// String is "host:port" for Network.DialContext.
func (t Target) String() string {
	if t.Addr.IsValid() {
		return netip.AddrPortFrom(t.Addr, t.Port).String()
	}
	return net.JoinHostPort(t.Name, strconv.Itoa(int(t.Port)))
}

// validName keeps out what could be mistaken for something else further on: control bytes, blanks, and the separators
// of addresses and URLs. Whether the rest is a name is for the name servers to say.
func validName(name string) bool {
	if name == "" || len(name) > maxNameBytes {
		return false
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c <= ' ', c == 0x7f:
			return false
		case c == ':', c == '/', c == '%', c == '[', c == ']', c == '@', c == '\\', c == '?', c == '#':
			return false
		}
	}
	return true
}
