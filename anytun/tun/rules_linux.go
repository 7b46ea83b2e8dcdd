package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel looks destinations up in the table of the host's own addresses
// first: rule 0. Packets for an egress address that is also the host's own must
// not get that far, but for those of the service. So ours go before it, at the same
// priority, where nobody's numbers are in the way:
//
//	0: from all to 203.0.113.1 ipproto udp dport 4444 lookup local proto 141
//	0: from all to 203.0.113.1 lookup 141141 proto 141
//	0: from all lookup local
//
// The kernel puts a new rule behind those of its priority. So the last one is
// deleted and made again, while a copy at priority 1 stands guard. Taking ours
// away is then all that is needed to have things as they were, also by hand or
// by a successor:
//
//	ip rule del pref 0 proto 141   (as long as it finds any; ip -6 likewise)
const guardPriority = 1

// upRules makes the rules of both families what they should be.
func (s *state) upRules(ruled []netip.Prefix) error {
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		var service, egress []netlink.Rule
		for _, p := range ruled {
			if family(p.Addr()) != f {
				continue
			}
			for _, a := range s.h.Service {
				if to, ok := serviceIn(a.Addr(), p); ok {
					r := ourRule(f, to, unix.RT_TABLE_LOCAL)
					r.IPProto = unix.IPPROTO_UDP
					r.Dport = netlink.NewRulePortRange(a.Port(), a.Port())
					service = append(service, r)
				}
			}
			egress = append(egress, ourRule(f, p, table))
		}
		if err := s.reconcile(f, append(service, egress...)); err != nil {
			return fmt.Errorf("rules of %s: %w", familyName(f), err)
		}
	}
	return nil
}

// downRules takes our rules away.
func (s *state) downRules() error {
	var all error
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		if err := s.reconcile(f, nil); err != nil {
			all = errors.Join(all, fmt.Errorf("rules of %s: %w", familyName(f), err))
		}
	}
	return all
}

// serviceIn is the part of the prefix p that a service on address a has.
func serviceIn(a netip.Addr, p netip.Prefix) (netip.Prefix, bool) {
	a = a.Unmap().WithZone("")
	switch {
	case !a.IsValid():
		return p, false
	case a == netip.IPv6Unspecified(), a.IsUnspecified() && p.Addr().Is4(): // [::] is both families
		return p, true
	case p.Contains(a):
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	return p, false
}

func ourRule(f int, to netip.Prefix, table int) netlink.Rule {
	r := *netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = f, 0, table, protocol
	r.Dst = ipNet(to)
	return r
}

// localRule is the kernel's own rule 0.
func localRule(f, priority int, protocol uint8) netlink.Rule {
	r := *netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = f, priority, unix.RT_TABLE_LOCAL, protocol
	return r
}

// reconcile makes want our only rules, in this order and before rule 0.
func (s *state) reconcile(f int, want []netlink.Rule) error {
	var all []netlink.Rule
	err := again(func() (err error) { all, err = s.nl.RuleList(f); return err })
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		all, err = nil, nil // no IPv6, or a kernel without policy routing
	}
	if err != nil {
		return err
	}
	var ours, first []netlink.Rule // of us; at priority 0
	local, guard := -1, false
	for _, r := range all {
		if r.Protocol == protocol {
			ours = append(ours, r)
			guard = guard || r.Priority == guardPriority
		}
		if r.Priority != 0 {
			continue
		}
		if isLocal(&r) {
			local = len(first)
		}
		first = append(first, r)
	}
	if !guard && slices.EqualFunc(ours, want, sameRule) && (len(want) == 0 || local == len(first)-1 || local < 0) {
		return nil
	}
	if len(want) == 0 && !guard {
		return s.deleteRules(ours)
	}
	if local >= 0 && slices.ContainsFunc(first[local+1:], func(r netlink.Rule) bool { return r.Protocol != protocol }) {
		return errors.New("another program has put rules of priority 0 behind that of the local table (ip rule)")
	}

	// From here on the guard is there whenever rule 0 isn't.
	back := localRule(f, 0, unix.RTPROT_KERNEL)
	if local >= 0 {
		back = first[local]
		if !guard {
			g := localRule(f, guardPriority, protocol)
			if err := s.nl.RuleAdd(&g); err != nil {
				return fmt.Errorf("add guard: %w", err)
			}
			guard = true
		}
		if err := s.nl.RuleDel(&first[local]); err != nil {
			return fmt.Errorf("move rule 0: %w", err)
		}
	}
	ours = slices.DeleteFunc(ours, func(r netlink.Rule) bool { return r.Priority == guardPriority })
	err = s.deleteRules(ours)
	for i := range want {
		if err != nil {
			break
		}
		if err = s.nl.RuleAdd(&want[i]); err != nil {
			err = fmt.Errorf("add %s: %w", want[i].String(), err)
		}
	}
	if guard { // whatever happened: rule 0 was there once
		if e := s.nl.RuleAdd(&back); e != nil {
			return errors.Join(err, fmt.Errorf("put rule 0 back: %w", e))
		}
		g := localRule(f, guardPriority, protocol)
		if e := s.nl.RuleDel(&g); e != nil {
			err = errors.Join(err, fmt.Errorf("delete guard: %w", e))
		}
	}
	return err
}

func (s *state) deleteRules(rules []netlink.Rule) error {
	for i := range rules {
		if err := s.nl.RuleDel(&rules[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete %s: %w", rules[i].String(), err)
		}
	}
	return nil
}

// isLocal is whether r sends everything to the local table.
func isLocal(r *netlink.Rule) bool {
	want := localRule(r.Family, r.Priority, r.Protocol)
	return r.Protocol != protocol && sameRule(*r, want) && r.Mark == 0 && r.Mask == nil && r.IifName == "" &&
		r.OifName == "" && !r.Invert && r.Src == nil && r.Sport == nil && r.UIDRange == nil
}

// sameRule compares what our rules consist of.
func sameRule(a, b netlink.Rule) bool {
	pa, _ := prefixOf(a.Dst)
	pb, _ := prefixOf(b.Dst)
	ports := func(r *netlink.RulePortRange) netlink.RulePortRange {
		if r == nil {
			return netlink.RulePortRange{}
		}
		return *r
	}
	return a.Family == b.Family && a.Priority == b.Priority && a.Table == b.Table && a.Protocol == b.Protocol &&
		pa == pb && a.IPProto == b.IPProto && ports(a.Dport) == ports(b.Dport)
}

func familyName(f int) string {
	if f == unix.AF_INET {
		return "IPv4"
	}
	return "IPv6"
}
