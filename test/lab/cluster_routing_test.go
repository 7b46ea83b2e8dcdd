//go:build linux

package lab

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// routerAS is the autonomous system of each router.
var routerAS = map[string]int{"core": asCore, "access": asAccess, "edge": asEdge}

// A birdPeer is a neighbour of a BIRD. What it announces goes into a table of
// its own as well if table isn't 0, for the kernel's table 100+table.
type birdPeer struct {
	name, address string
	as, table     int
}

// startBird starts BIRD on a host, announcing networks.
func startBird(t *testing.T, h *host, id string, as int, networks []netip.Prefix, peers []birdPeer) *daemon {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `
log stderr { info, remote, warning, error, auth, fatal, bug };
router id %s;
protocol device { }
protocol bfd { interface "*" { min rx interval 200 ms; min tx interval 200 ms; multiplier 5; }; }
`, id)
	for _, v := range []int{4, 6} {
		// merge paths is ECMP: all equally good routes go to the kernel as one.
		fmt.Fprintf(&b, `
protocol kernel kernel%d { merge paths on; ipv%d { import none; export where source = RTS_BGP; }; }
protocol static static%d { ipv%d;
`, v, v, v, v)
		for _, n := range networks {
			if n.Addr().Is4() == (v == 4) {
				fmt.Fprintf(&b, "  route %s unreachable;\n", n)
			}
		}
		b.WriteString("}\n")
	}
	for _, p := range peers {
		// Between routers nothing dies here, and a busy machine must not make it seem so.
		bfd := "off"
		if as == asServers || p.as == asServers {
			bfd = "on"
		}
		fmt.Fprintf(&b, `
protocol bgp %s {
  local as %d; neighbor %s as %d; direct; bfd %s;
  hold time 9; connect retry time 1; connect delay time 1; error wait time 1, 2; startup hold time 9;
  ipv4 { import all; export where source ~ [ RTS_STATIC, RTS_BGP ]; next hop self; };
  ipv6 { import all; export where source ~ [ RTS_STATIC, RTS_BGP ]; next hop self; };
}
`, p.name, as, p.address, p.as, bfd)
		if p.table == 0 {
			continue
		}
		for _, v := range []int{4, 6} {
			fmt.Fprintf(&b, `
ipv%[1]d table only%[1]d_%[2]s;
protocol pipe pipe%[1]d_%[2]s { table master%[1]d; peer table only%[1]d_%[2]s; import none; export where proto = "%[2]s"; }
protocol kernel kernel%[1]d_%[2]s { kernel table %[3]d; ipv%[1]d { table only%[1]d_%[2]s; import none; export all; }; }
`, v, p.name, 100+p.table)
		}
	}
	conf := filepath.Join(h.dir, "bird.conf")
	write(t, conf, b.String())
	return h.start(t, "bird", "bird", "-f", "-c", conf, "-s", birdControl(h), "-P", filepath.Join(h.dir, "bird.pid"))
}

// birdControl is the socket of a host's BIRD for birdc.
func birdControl(h *host) string { return filepath.Join(h.dir, "bird.ctl") }

// routers starts BIRD on the three routers and begins to watch their routes.
func (c *cluster3) routers(t *testing.T) {
	t.Helper()
	c.atCore, c.atEdge = watchRoutes(t, c.core), watchRoutes(t, c.edge)
	prefixes := func(texts ...string) []netip.Prefix {
		var all []netip.Prefix
		for _, text := range texts {
			all = append(all, netip.MustParsePrefix(text))
		}
		return all
	}
	peer := func(of, name string, table int) birdPeer {
		as, ok := routerAS[name]
		if !ok {
			as = asServers
		}
		return birdPeer{name: name, address: c.addressOf(name, of), as: as, table: table}
	}
	core := []birdPeer{peer("core", "access", 0), peer("core", "edge", 0)}
	for _, s := range c.servers {
		core = append(core, peer("core", serverName(s.number), s.number))
		number := strconv.Itoa(s.number)
		for _, family := range []string{"-4", "-6"} {
			ip(t, "-n", c.core.ns, family, "rule", "add", "pref", "100"+number, "fwmark", number, "lookup", "10"+number)
		}
	}
	startBird(t, c.core, "10.0.0.1", asCore, prefixes("192.0.2.0/25", "2001:db8:3::/64"), core)
	startBird(t, c.access, "10.0.0.2", asAccess, prefixes("198.51.100.0/24", "2001:db8:1::/48"), []birdPeer{peer("access", "core", 0)})
	startBird(t, c.edge, "10.0.10.2", asEdge, prefixes("192.0.2.128/25", "2001:db8:4::/64"),
		[]birdPeer{peer("edge", "core", 0), peer("edge", "s3", 3)})
	// Where core steers, edge must not know better.
	for _, family := range []string{"-4", "-6"} {
		ip(t, "-n", c.edge.ns, family, "rule", "add", "pref", "1001", "fwmark", "1", "lookup", "100")
	}
	c.edge.route(t, "default via 10.0.10.1 table 100", "default via fd00:10::1 table 100")
	for _, r := range []*host{c.core, c.edge} {
		service := fmt.Sprintf("udp dport %d goto service", serverPort)
		r.nft(t, fmt.Sprintf(`
table inet steer {
  chain service { }
  chain egress { }
  chain pre { type filter hook prerouting priority mangle;
    ip daddr %s %s
    ip6 daddr %s %s
    ip daddr %s goto egress
    ip6 daddr %s goto egress
  }
}`, c.services.v4, service, c.services.v6, service, c.egress.v4, c.egress.v6))
	}
	eventually(t, 30*time.Second, func() error {
		for at, want := range map[*routeWatch]string{c.atCore: "198.51.100.0/24", c.atEdge: "192.0.2.0/25"} {
			if text, _ := at.route("main", want); text == "" {
				return fmt.Errorf("a router has no route to %s", want)
			}
		}
		return nil
	})
}

// steer sends packets of one kind to a server: 0 where BGP says, -1 to a random
// one each. The change is atomic.
func (c *cluster3) steer(t *testing.T, kind string, to int) {
	t.Helper()
	core, edge := "", "add rule inet steer "+kind+" meta mark set 1\n"
	switch to {
	case 0:
		edge = ""
	case -1:
		core = fmt.Sprintf("add rule inet steer %s meta mark set numgen random mod %d offset 1\n", kind, len(c.servers))
	default:
		core = fmt.Sprintf("add rule inet steer %s meta mark set %d\n", kind, c.server(to).number)
	}
	flush := "flush chain inet steer " + kind + "\n"
	c.edge.nft(t, flush+edge)
	c.core.nft(t, flush+core)
}

func (c *cluster3) routeService(t *testing.T, to int) { t.Helper(); c.steer(t, "service", to) }
func (c *cluster3) routeEgress(t *testing.T, to int)  { t.Helper(); c.steer(t, "egress", to) }

// route sends everything to one server as long as that announces itself; with 0,
// where BGP says.
func (c *cluster3) route(t *testing.T, to int) {
	t.Helper()
	c.routeService(t, to)
	c.routeEgress(t, to)
}

// spray sends every packet to a random server.
func (c *cluster3) spray(t *testing.T) {
	t.Helper()
	c.route(t, -1)
}

// roam gives the client another uplink. The old one is dead from then on.
func (c *cluster3) roam(t *testing.T, uplink string) {
	t.Helper()
	type way struct {
		host         *host
		device       string
		gate4, gate6 string
	}
	ways := map[string]way{
		"wan":    {c.nat, "wan", "198.51.100.1", "2001:db8:1:1::1"},
		"wan2":   {c.nat, "wan2", "198.51.100.5", "2001:db8:1:2::1"},
		"mobile": {c.app, "mobile", "198.51.100.9", "2001:db8:1:3::1"},
	}
	to, ok := ways[uplink]
	if !ok {
		t.Fatalf("no uplink is called %q", uplink)
	}
	if uplink == c.uplink {
		return
	}
	// The way of the interfaces: down what is left, up what is taken, routes.
	up := func(h *host, device, gate4, gate6 string) {
		ip(t, "-n", h.ns, "link", "set", device, "up")
		ip(t, "-n", h.ns, "route", "replace", "default", "via", gate4, "dev", device)
		ip(t, "-n", h.ns, "-6", "route", "replace", "default", "via", gate6, "dev", device)
	}
	if uplink == "mobile" {
		ip(t, "-n", c.app.ns, "link", "set", "eth0", "down")
	} else if c.uplink == "mobile" {
		ip(t, "-n", c.app.ns, "link", "set", "mobile", "down")
		up(c.app, "eth0", "192.168.77.1", "fd77::1")
	}
	for name, w := range ways {
		if w.host == c.nat && name != uplink && to.host == c.nat {
			ip(t, "-n", c.nat.ns, "link", "set", w.device, "down")
		}
	}
	up(to.host, to.device, to.gate4, to.gate6)
	c.uplink = uplink
}

// A routeWatch follows the routes of a host's kernel as they change.
type routeWatch struct {
	mu     sync.Mutex
	routes map[[2]string]string    // by table and prefix, as ip prints them
	change map[[2]string]time.Time // when each changed last
}

// watchRoutes begins to follow. It must begin before there are routes.
func watchRoutes(t *testing.T, h *host) *routeWatch {
	t.Helper()
	w := &routeWatch{routes: make(map[[2]string]string), change: make(map[[2]string]time.Time)}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.command(ctx, "ip", "-o", "monitor", "route")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = start(cmd)
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			w.line(time.Now(), lines.Text())
		}
		_ = cmd.Wait() // killed by us
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

// line takes one line of ip monitor.
func (w *routeWatch) line(at time.Time, text string) {
	rest, deleted := strings.CutPrefix(text, "Deleted ")
	fields := strings.Fields(rest)
	for len(fields) > 0 && slices.Contains([]string{"unicast", "unreachable"}, fields[0]) {
		fields = fields[1:]
	}
	if len(fields) == 0 {
		return
	}
	table := "main"
	if i := slices.Index(fields, "table"); i >= 0 && i+1 < len(fields) {
		table = fields[i+1]
	}
	key := [2]string{table, fields[0]}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.change[key] = at
	if deleted {
		delete(w.routes, key)
	} else {
		w.routes[key] = rest
	}
}

// route is the route to a prefix, "" if there is none, and when it changed last.
func (w *routeWatch) route(table, prefix string) (text string, changed time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := [2]string{table, prefix}
	return w.routes[key], w.change[key]
}

// uses says whether the routes to the anycast prefixes lead through a device,
// all of them or none, and when the last of them changed.
func (c *cluster3) uses(w *routeWatch, device string) (all, none bool, changed time.Time) {
	all, none = true, true
	number := strings.TrimPrefix(device, "s")
	for _, p := range c.anycast() {
		for _, table := range []string{"main", "10" + number} {
			text, at := w.route(table, p.Addr().String())
			if strings.Contains(text+" ", " dev "+device+" ") {
				none = false
			} else {
				all = false
			}
			if at.After(changed) {
				changed = at
			}
		}
	}
	return all, none, changed
}

// watches are the routers that have a cable to a server.
func (c *cluster3) watches(number int) []*routeWatch {
	if number == 3 {
		return []*routeWatch{c.atCore, c.atEdge}
	}
	return []*routeWatch{c.atCore}
}

// announced waits until packets for the anycast addresses are sent to a server,
// and BFD watches it.
func (c *cluster3) announced(t *testing.T, number int) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		for _, w := range c.watches(number) {
			if all, _, _ := c.uses(w, serverName(number)); !all {
				return fmt.Errorf("not all routes lead to %s: %s", serverName(number), w.describe(c))
			}
		}
		for _, router := range c.server(number).neighbours() {
			if !c.watched(t, router, number) {
				return fmt.Errorf("%s doesn't watch %s by BFD", router, serverName(number))
			}
		}
		return nil
	})
}

// watched says whether a router's BFD session with a server is up.
func (c *cluster3) watched(t *testing.T, router string, number int) bool {
	t.Helper()
	address := c.addressOf(serverName(number), router)
	for line := range strings.Lines(c.host(router).run(t, 10*time.Second, "birdc", "-s", birdControl(c.host(router)), "show", "bfd", "sessions")) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == address {
			return f[2] == "Up"
		}
	}
	return false
}

// withdrawn waits until no packet for the anycast addresses is sent to a server
// any more, and returns how long after since the last route changed.
func (c *cluster3) withdrawn(t *testing.T, number int, since time.Time) time.Duration {
	t.Helper()
	var last time.Time
	eventually(t, time.Minute, func() error {
		for _, w := range c.watches(number) {
			_, none, at := c.uses(w, serverName(number))
			if !none {
				return fmt.Errorf("routes still lead to %s: %s", serverName(number), w.describe(c))
			}
			if at.After(last) {
				last = at
			}
		}
		return nil
	})
	return last.Sub(since)
}

// describe is what a router does with the anycast prefixes.
func (w *routeWatch) describe(c *cluster3) string {
	var texts []string
	for _, p := range c.anycast() {
		for _, table := range []string{"main", "101", "102", "103"} {
			if text, _ := w.route(table, p.Addr().String()); text != "" {
				texts = append(texts, text)
			}
		}
	}
	return strings.Join(texts, "; ")
}
