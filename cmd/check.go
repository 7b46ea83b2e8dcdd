package cmd

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// CheckRange says whether a number flag lies between lowest and highest.
func (s *Settings) CheckRange(name string, lowest, highest int) error {
	if n := s.Int(name); n < lowest || n > highest {
		return Usage("give a number from "+strconv.Itoa(lowest)+" to "+strconv.Itoa(highest),
			"%s: %d is out of range", s.where(name), n)
	}
	return nil
}

// CheckDuration says whether a duration flag lies between shortest and longest.
func (s *Settings) CheckDuration(name string, shortest, longest time.Duration) error {
	if d := s.Duration(name); d < shortest || d > longest {
		return Usage("give a duration from "+shortest.String()+" to "+longest.String(),
			"%s: %s is out of range", s.where(name), d)
	}
	return nil
}

// where names the layer that a value is from, as its writer knows it.
func (s *Settings) where(name string) string {
	switch source := s.source[name]; source {
	case "", "flag":
		return "--" + name
	case Twin(name):
		return source
	default:
		return "configuration " + source + ": " + name
	}
}

// CheckAdmin says whether the value of --admin, if any, has the form host:port.
func CheckAdmin(address string) error {
	if address == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return Usage("give host:port, such as 127.0.0.1:9080", "--admin: %q is not an address", address)
	}
	return nil
}

// ParseAddrPort reads the address of a socket that a flag gives: an IP address
// and a port. An empty address means all of the host's. The port may be left
// out when port, the one that is meant then, isn't 0.
func ParseAddrPort(flag, text string, port uint16) (netip.AddrPort, error) {
	if rest, ok := strings.CutPrefix(text, ":"); ok && !strings.Contains(rest, ":") {
		text = "[::]:" + rest
	}
	if address, err := netip.ParseAddrPort(text); err == nil {
		return address, nil
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	if address, err := netip.ParseAddr(bare); err == nil && port != 0 {
		return netip.AddrPortFrom(address, port), nil
	}
	example := "give an IP address and a port, such as 0.0.0.0:4444 or [::1]:4444"
	if port != 0 {
		example = "give an IP address, such as 192.0.2.53 or 192.0.2.53:5353"
	}
	return netip.AddrPort{}, Usage(example, "%s: %q is not the address of a socket", flag, text)
}
