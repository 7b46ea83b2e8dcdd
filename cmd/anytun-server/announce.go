package main

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anytun-go/anytun/anytun/announce"
	"github.com/anytun-go/anytun/cmd"
)

// Bounds of the routing protocols' timers: RFC 4271 section 4.2 has 3 s as the
// least hold time.
const (
	minHoldTime, maxHoldTime = 3 * time.Second, 10 * time.Minute
	minBFD, maxBFD           = 10 * time.Millisecond, 10 * time.Second
)

// parseAnnounce reads what is to be announced to whom.
func (c *config) parseAnnounce(s *cmd.Settings) error {
	peers, hook := s.Strings("bgp-peer"), s.String("announce-hook")
	if len(peers) == 0 && hook == "" {
		if len(s.Strings("announce")) > 0 {
			return cmd.Usage("add --bgp-peer ADDRESS@AS, or --announce-hook COMMAND", "--announce: there is nobody to announce to")
		}
		return nil
	}
	a := &announce.Config{Hook: hook, HoldTime: s.Duration("bgp-hold-time"), BFDInterval: s.Duration("bfd-interval")}
	if err := errors.Join(
		s.CheckRange("bgp-port", 0, 1<<16-1),
		s.CheckDuration("bgp-hold-time", minHoldTime, maxHoldTime),
		s.CheckDuration("bfd-interval", minBFD, maxBFD),
	); err != nil {
		return cmd.First(err)
	}
	a.ListenPort = uint16(s.Int("bgp-port"))
	if len(peers) > 0 {
		if s.Int("bgp-as") < 1 || s.Int("bgp-as") > 1<<32-1 {
			return cmd.Usage("give the autonomous system of this server, such as --bgp-as 64512", "--bgp-as: %d is not an AS number", s.Int("bgp-as"))
		}
		a.AS = uint32(s.Int("bgp-as"))
	}
	if text := s.String("bgp-router-id"); text != "" {
		id, err := netip.ParseAddr(text)
		if err != nil || !id.Is4() {
			return cmd.Usage("give an IPv4 address, such as one of this host's own", "--bgp-router-id: %q is not an IPv4 address", text)
		}
		a.RouterID = id
	}
	var password string
	if file := s.String("bgp-password-file"); file != "" {
		text, err := cmd.ReadSecret(file, "BGP password")
		if err != nil {
			return err
		}
		password = strings.TrimSpace(string(text))
	}
	for _, text := range peers {
		p, err := parsePeer(text)
		if err != nil {
			return err
		}
		p.Password = password
		a.Peers = append(a.Peers, p)
	}
	if err := c.parsePrefixes(s, a); err != nil {
		return err
	}
	// What else can be wrong is found before anything runs.
	if _, err := announce.New(*a); err != nil {
		return cmd.Usage("check the flags that begin with --bgp and --announce", "%w", err)
	}
	c.announce = a
	return nil
}

func (c *config) parsePrefixes(s *cmd.Settings, a *announce.Config) error {
	for _, text := range s.Strings("announce") {
		p, err := netip.ParsePrefix(text)
		if single, e := netip.ParseAddr(text); e == nil {
			p, err = netip.PrefixFrom(single, single.BitLen()), nil
		}
		if err != nil {
			return cmd.Usage("give a prefix such as 198.51.100.1/32", "--announce: %q is not a prefix", text)
		}
		a.Prefixes = append(a.Prefixes, p.Masked())
	}
	if len(a.Prefixes) > 0 {
		return nil
	}
	for _, l := range c.listen {
		if !l.Addr().IsUnspecified() && !l.Addr().IsLoopback() {
			a.Prefixes = append(a.Prefixes, netip.PrefixFrom(l.Addr().Unmap(), l.Addr().Unmap().BitLen()))
		}
	}
	for _, p := range c.egress.prefixes {
		if !slices.Contains(a.Prefixes, p) {
			a.Prefixes = append(a.Prefixes, p)
		}
	}
	if len(a.Prefixes) == 0 {
		return cmd.Usage("say what clients reach the servers by, such as --announce 198.51.100.1/32", "--announce is missing")
	}
	return nil
}

// parsePeer reads ADDRESS@AS[,bfd][,multihop=N][,port=N].
func parsePeer(text string) (p announce.Peer, err error) {
	bad := func() (announce.Peer, error) {
		return p, cmd.Usage("give ADDRESS@AS, such as 192.0.2.1@64512, and perhaps ,bfd or ,multihop=2 behind it",
			"--bgp-peer: %q is not a peer", text)
	}
	words := strings.Split(text, ",")
	address, as, found := strings.Cut(words[0], "@")
	if !found {
		return bad()
	}
	if p.Addr, err = netip.ParseAddr(address); err != nil {
		return bad()
	}
	n, err := strconv.ParseUint(as, 10, 32)
	if err != nil || n == 0 {
		return bad()
	}
	p.AS = uint32(n)
	for _, word := range words[1:] {
		key, value, _ := strings.Cut(word, "=")
		n, err := strconv.ParseUint(value, 10, 16)
		switch {
		case word == "bfd":
			p.BFD = true
		case key == "multihop" && err == nil && n >= 1 && n <= 255:
			p.Multihop = uint8(n)
		case key == "port" && err == nil && n >= 1:
			p.Port = uint16(n)
		default:
			return bad()
		}
	}
	return p, nil
}
