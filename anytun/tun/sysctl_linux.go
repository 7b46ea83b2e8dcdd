package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const sysctlRoot = "/proc/sys/"

// setting is one value under sysctlRoot.
type setting struct{ path, value string }

// Check says what of the host's settings keeps packets from being forwarded, one
// line each, with the command that helps. It changes nothing, and needs neither
// the device nor privileges.
func (h Host) Check() error {
	all := []error{checkPrefixes(h.Egress)}
	if slices.ContainsFunc(h.Egress, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		all = append(all, checkSysctl("net/ipv4/ip_forward", "1", "the host doesn't forward IPv4"))
	}
	if slices.ContainsFunc(h.Egress, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		all = append(all,
			checkSysctl("net/ipv6/conf/all/disable_ipv6", "0", "the host has no IPv6"),
			checkSysctl("net/ipv6/conf/all/forwarding", "1", "the host doesn't forward IPv6 (an interface that "+
				"gets its address from a router needs accept_ra=2 then)"))
	}
	return errors.Join(all...)
}

func checkSysctl(path, want, why string) error {
	got, err := readSysctl(path)
	if err != nil {
		return fmt.Errorf("%s: %w", why, err)
	}
	// Forwarding in IPv6 may also be 2.
	if got == want || want != "0" && got != "0" {
		return nil
	}
	return fmt.Errorf("%s: run: sysctl -w %s=%s", why, strings.ReplaceAll(path, "/", "."), want)
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(sysctlRoot + path)
	return strings.TrimSpace(string(b)), err
}

// set makes the device's own settings, and remembers what they were, for a
// device that outlives us.
func (s *state) set(ruled []netip.Prefix) error {
	v4, v6 := "net/ipv4/conf/"+s.h.Device, "net/ipv6/conf/"+s.h.Device
	var want []setting
	if slices.ContainsFunc(s.h.Egress, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		want = append(want, setting{v4 + "/forwarding", "1"})
	}
	if slices.ContainsFunc(ruled, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		// Packets with one of the host's own addresses as source may be refused
		// otherwise. Kernels of today see from the rules that these aren't forged.
		want = append(want, setting{v4 + "/accept_local", "1"})
	}
	if slices.ContainsFunc(s.h.Egress, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		want = append(want, setting{v6 + "/disable_ipv6", "0"}, setting{v6 + "/forwarding", "1"},
			setting{v6 + "/accept_ra", "0"})
	}
	for _, w := range want {
		old, err := readSysctl(w.path)
		if err != nil {
			return err
		}
		if old == w.value {
			continue
		}
		if err := os.WriteFile(sysctlRoot+w.path, []byte(w.value), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", strings.ReplaceAll(w.path, "/", "."), w.value, err)
		}
		s.undo = append(s.undo, setting{w.path, old})
	}
	return nil
}

// restore undoes set. The settings of a device that is gone are gone too.
func (s *state) restore() error {
	var all error
	for _, u := range slices.Backward(s.undo) {
		err := os.WriteFile(sysctlRoot+u.path, []byte(u.value), 0)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			all = errors.Join(all, err)
		}
	}
	s.undo = nil
	return all
}
