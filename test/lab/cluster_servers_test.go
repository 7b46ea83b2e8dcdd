//go:build linux

package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Numbers of the autonomous systems.
const (
	asCore    = 65000
	asAccess  = 65001
	asEdge    = 65002
	asServers = 65010
)

const clusterPort = 6222 // where servers meet each other

func serverName(number int) string { return "s" + strconv.Itoa(number) }

// withNetAdmin puts the command line of a user who may do nothing but configure
// the network before args: what --egress tun needs, and no more.
func withNetAdmin(args ...string) []string {
	uid, gid := ordinaryUser()
	return append([]string{
		"setpriv", "--reuid", strconv.Itoa(uid), "--regid", strconv.Itoa(gid), "--clear-groups",
		"--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin",
		"--no-new-privs", "--pdeathsig", "KILL", "--",
	}, args...)
}

// serverArgs is the command line of a server.
func (c *cluster3) serverArgs(t *testing.T, s *server3) []string {
	t.Helper()
	args := []string{
		program(t, "anytun-server"),
		"--listen", netip.AddrPortFrom(c.services.v4, serverPort).String(),
		"--listen", netip.AddrPortFrom(c.services.v6, serverPort).String(),
		"--cluster-key", c.keys.key, "--clients", c.keys.clients, "--state-dir", s.dir,
		"--server-number", strconv.Itoa(s.number),
		"--egress", "tun", "--egress-address", c.egress.v4.String(), "--egress-address", c.egress.v6.String(),
		"--dns", netip.AddrPortFrom(dst4, dnsPort).String(),
		"--cluster-listen", fmt.Sprintf("%s:%d", c.addressOf(serverName(s.number), "core"), clusterPort),
		"--bgp-as", strconv.Itoa(asServers), "--bgp-router-id", c.addressOf(serverName(s.number), "core"),
		"--bfd-interval", "300ms", // patience for a busy machine
		"--drain-time", "3s",
		"--admin", fmt.Sprintf("127.0.0.1:%d", serverAdminPort),
	}
	for _, other := range c.servers {
		if other != s {
			args = append(args, "--cluster-join", fmt.Sprintf("%s:%d", c.addressOf(serverName(other.number), "core"), clusterPort))
		}
	}
	for _, router := range s.neighbours() {
		args = append(args, "--bgp-peer", fmt.Sprintf("%s@%d,bfd", c.addressOf(router, serverName(s.number)), routerAS[router]))
	}
	for _, prefix := range c.anycast() {
		args = append(args, "--announce", prefix.String())
	}
	return append(args, c.options.ServerArgs...)
}

// neighbours are the routers that a server is cabled to.
func (s *server3) neighbours() []string {
	if s.number == 3 {
		return []string{"core", "edge"}
	}
	return []string{"core"}
}

// anycast are the prefixes that all servers announce.
func (c *cluster3) anycast() []netip.Prefix {
	var prefixes []netip.Prefix
	for _, pair := range []addressPair{c.services, c.egress} {
		for _, a := range []netip.Addr{pair.v4, pair.v6} {
			p := netip.PrefixFrom(a, a.BitLen())
			if len(prefixes) < 2 || p != prefixes[0] && p != prefixes[1] {
				prefixes = append(prefixes, p)
			}
		}
	}
	return prefixes
}

// start starts a server, with more flags if given, and waits for its socket.
func (c *cluster3) start(t *testing.T, number int, more ...string) {
	t.Helper()
	s := c.server(number)
	if s.daemon != nil {
		select {
		case <-s.daemon.done:
		default:
			t.Fatalf("%s runs already", serverName(number))
		}
	}
	if c.options.StandIns {
		c.startStandIn(t, s)
		return
	}
	s.daemon = s.host.start(c.t, serverName(number), withNetAdmin(append(c.serverArgs(t, s), more...)...)...)
	c.endQuickly(s.daemon)
	s.daemon.listening(t, "udp", serverPort)
}

// endQuickly spares the end of a test the time that a daemon takes to drain, and
// looks at what the daemon has said of itself.
func (c *cluster3) endQuickly(d *daemon) {
	c.t.Cleanup(func() {
		d.signal(c.t, syscall.SIGKILL)
		for _, word := range []string{"panic: ", "fatal error: ", "WARNING: DATA RACE"} {
			if _, after, found := strings.Cut(d.printed(), word); found {
				c.t.Errorf("%s: %s%s", d.name, word, after[:min(len(after), 6000)])
			}
		}
	})
}

// startStandIn starts what a server does in the network's eyes: it announces the
// anycast prefixes and answers at them.
func (c *cluster3) startStandIn(t *testing.T, s *server3) {
	t.Helper()
	if s.daemon == nil {
		if !c.options.SameAddress {
			s.address(t, "lo", c.egress.v4.String()+"/32", c.egress.v6.String()+"/128")
		}
		for _, pair := range []addressPair{c.services, c.egress} {
			for _, a := range []netip.Addr{pair.v4, pair.v6} {
				s.host.start(c.t, "answer", helper(t, "answer", netip.AddrPortFrom(a, serverPort).String(), serverName(s.number))...)
			}
			if c.options.SameAddress {
				break
			}
		}
	}
	var peers []birdPeer
	for _, router := range s.neighbours() {
		peers = append(peers, birdPeer{name: router, address: c.addressOf(router, serverName(s.number)), as: routerAS[router]})
	}
	s.daemon = startBird(c.t, s.host, c.addressOf(serverName(s.number), "core"), asServers, c.anycast(), peers)
	s.daemon.listening(t, "udp", serverPort)
}

// kill ends a server with kill -9.
func (c *cluster3) kill(t *testing.T, number int) {
	t.Helper()
	d := c.server(number).daemon
	d.signal(t, syscall.SIGKILL)
	<-d.done
}

// stop halts a server's process: its sockets stay, nobody reads them.
func (c *cluster3) stop(t *testing.T, number int) {
	t.Helper()
	c.server(number).daemon.signal(t, syscall.SIGSTOP)
}

// cont lets a stopped server go on.
func (c *cluster3) cont(t *testing.T, number int) {
	t.Helper()
	c.server(number).daemon.signal(t, syscall.SIGCONT)
}

// drain asks a server to end and waits until it has.
func (c *cluster3) drain(t *testing.T, number int) {
	t.Helper()
	d := c.server(number).daemon
	d.signal(t, syscall.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s hasn't ended two minutes after SIGTERM", d.name)
	}
}

// cut lets the cables of a server carry nothing, with their lights still on.
func (c *cluster3) cut(t *testing.T, number int) {
	t.Helper()
	c.server(number).nft(t, `
table inet cut {
  chain in { type filter hook prerouting priority raw - 20; iifname "eth*" drop
  }
  chain out { type filter hook postrouting priority raw; oifname "eth*" drop
  }
}`)
}

// heal undoes cut.
func (c *cluster3) heal(t *testing.T, number int) {
	t.Helper()
	c.server(number).nft(t, "delete table inet cut")
}

// A count is how many packets have arrived at a server.
type count struct {
	Service uint64 // from clients
	Egress  uint64 // to the egress addresses
}

func (c *cluster3) countingRules() string {
	service, egress := fmt.Sprintf("udp dport %d counter name service accept", serverPort), "counter name egress"
	return fmt.Sprintf(`
table inet counts {
  counter service { }
  counter egress { }
  chain arrived { type filter hook prerouting priority raw - 10;
    iifname != "eth*" accept
    ip daddr %s %s
    ip6 daddr %s %s
    ip daddr %s %s
    ip6 daddr %s %s
  }
}`, c.services.v4, service, c.services.v6, service, c.egress.v4, egress, c.egress.v6, egress)
}

// counts are the packets that have arrived at each server so far.
func (c *cluster3) counts(t *testing.T) [clusterServers]count {
	t.Helper()
	var all [clusterServers]count
	for i, s := range c.servers {
		var listing struct {
			Nftables []struct {
				Counter struct {
					Name    string
					Packets uint64
				}
			}
		}
		text := s.run(t, 10*time.Second, "nft", "-j", "list", "counters", "table", "inet", "counts")
		if err := json.Unmarshal([]byte(text), &listing); err != nil {
			t.Fatalf("nft: %v: %s", err, tail(text, 3))
		}
		for _, n := range listing.Nftables {
			switch n.Counter.Name {
			case "service":
				all[i].Service = n.Counter.Packets
			case "egress":
				all[i].Egress = n.Counter.Packets
			}
		}
	}
	return all
}

// serving is the server that the client's packets go to. It waits for one.
func (c *cluster3) serving(t *testing.T) int {
	t.Helper()
	before := c.counts(t)
	var number int
	eventually(t, 30*time.Second, func() error {
		most := uint64(0)
		for i, now := range c.counts(t) {
			if n := now.Service - before[i].Service; n > most {
				most, number = n, i+1
			}
		}
		if most == 0 {
			return fmt.Errorf("no packet of a client has arrived")
		}
		return nil
	})
	return number
}

func (n count) String() string { return fmt.Sprintf("%d+%d", n.Service, n.Egress) }

// sharesOf is the part of each server in what arrived between two counts.
func sharesOf(before, after [clusterServers]count) string {
	var texts []string
	for i := range after {
		texts = append(texts, fmt.Sprintf("%s %d+%d", serverName(i+1), after[i].Service-before[i].Service, after[i].Egress-before[i].Egress))
	}
	return strings.Join(texts, ", ")
}
