//go:build linux

package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// failoverEnv is how many rounds to measure; tests make one, shorter than a
// measurement's. failoverOutEnv names the file that a measurement's table goes
// to. test/bench/failover sets both.
const (
	failoverEnv    = "ANYTUN_LAB_FAILOVER"
	failoverOutEnv = "ANYTUN_LAB_FAILOVER_TABLE"
)

// A failoverScale is how much of everything.
type failoverScale struct {
	rounds      int // 0: tests
	connections int
	rate        int           // of a bulk stream, bytes a second
	tick        time.Duration // between its writes: no stall is shorter
	drain       time.Duration // --drain-time of the servers
	before      time.Duration // from the last opened connection to the fault
	after       time.Duration // from the end of the fault to the end
	flips       time.Duration // as long do routes change all the time
	bulk        time.Duration // for a throughput
}

func scaleOf(t *testing.T) failoverScale {
	t.Helper()
	text := os.Getenv(failoverEnv)
	if text == "" {
		return failoverScale{
			connections: 1000, rate: 10_000, tick: 200 * time.Millisecond, drain: 3 * time.Second,
			before: time.Second, after: 3 * time.Second, flips: 6 * time.Second, bulk: time.Second,
		}
	}
	rounds, err := strconv.Atoi(text)
	if err != nil || rounds < 1 {
		t.Fatalf("%s is %q, not a number of rounds", failoverEnv, text)
	}
	return failoverScale{
		rounds: rounds, connections: 1000, rate: 20_000, tick: 50 * time.Millisecond, drain: 10 * time.Second,
		before: 4 * time.Second, after: 6 * time.Second, flips: time.Minute, bulk: 6 * time.Second,
	}
}

// A row is one case of the table, of one round.
type row struct {
	name      string
	streams   int
	broken    int
	why       string
	converged []time.Duration // of each change of routes that the case makes, where it can be seen
	stalls    []time.Duration // sorted; beyond the convergence
	flows     []flowReport
	note      string
}

// A trial is one case at work: a load over the cluster.
type trial struct {
	*run
	c       *cluster3
	scale   failoverScale
	row     row
	streams int     // how many there have to be at the end
	falls   int     // BGP sessions of living servers that the case ends
	fault   *report // of the time until what was broken is put right, if it is
}

// A failoverCase is a row of the table. do makes the fault and puts it right;
// it returns when all that can be seen of it is over.
type failoverCase struct {
	name  string
	title string
	do    func(*trial, *testing.T)
}

var failoverCases = []failoverCase{
	{"nothing", "nothing happens", (*trial).nothing},
	{"kill", "`kill -9` of the server that serves the client", (*trial).kill},
	{"flip", "routes flip every 500 ms", (*trial).flip},
	{"spray", "every packet takes a random server", (*trial).spray},
	{"rolling", "all servers restarted in turn, with drain", (*trial).rolling},
	{"roam", "the client's address changes, three times", (*trial).roam},
	{"stopped", "SIGSTOP of the server that serves the client", (*trial).stopped},
	{"cut", "its cables carry nothing any more", (*trial).cutOff},
}

// TestFailover: whatever happens to servers and routes, no connection breaks and
// every byte arrives. It is the table that test/bench/failover prints.
func TestFailover(t *testing.T) {
	scale := scaleOf(t)
	c := newCluster3(t, cluster3Options{ServerArgs: []string{"--drain-time", scale.drain.String()}})
	c.startKernel(t)
	if scale.rounds == 0 {
		t.Run("trace", func(t *testing.T) { testTrace(t, c) })
		t.Run("path MTU", func(t *testing.T) { testPathMTU(t, c) })
		t.Run("ports", func(t *testing.T) { testPorts(t, c) })
	}
	var rows []row
	port := uint16(7100)
	for range max(1, scale.rounds) {
		for _, f := range failoverCases {
			port++ // ports of the client that linger don't matter for another port of the sink
			t.Run(f.name, func(t *testing.T) {
				x := &trial{c: c, scale: scale, row: row{name: f.title}}
				x.measure(t, at(dst4, port), f.do)
				rows = append(rows, x.row)
			})
		}
		for _, p := range throughputs {
			if p.rate > 0 && scale.rounds == 0 {
				continue
			}
			port++
			t.Run(p.name, func(t *testing.T) { rows = append(rows, p.sprayed(t, c, scale, at(dst4, port))) })
		}
		port++
		t.Run("synchronisation", func(t *testing.T) { rows = append(rows, synchronisation(t, c, scale, at(dst4, port))) })
	}
	printTable(t, "anytun, three servers, kernel route and BGP", rows)
}

// measure runs a load over a case.
func (x *trial) measure(t *testing.T, sink netip.AddrPort, do func(*trial, *testing.T)) {
	x.c.repair(t)
	x.run = startRun(t, x.c.app, x.c.dst, loadConfig{
		Proxy: proxyAddr, Sink: sink, UDP: true, Ping: dst4, Rate: x.scale.rate, Tick: x.scale.tick,
	}.connections(x.scale.connections))
	time.Sleep(x.scale.before)
	before, lost, fallen := x.c.counts(t), x.c.losses(t), x.c.fallen()
	x.mark()
	gaps := x.c.proxy.samples(t, proxyAdminPort, "anytun_client_gap")
	do(x, t)
	if x.fault == nil {
		time.Sleep(x.scale.after)
		r := x.report()
		x.fault = &r
	}
	during := *x.fault
	if err := x.more(10); err != nil {
		t.Error(err)
	}
	x.streams += x.scale.connections + 10
	after := x.end()
	x.explain(t, before, lost, gaps)
	// Where processes get no time at all, BFD and hold timers say so, and all
	// servers are gone at once. The connections must survive even that, but how
	// long it took says nothing about them.
	busy := false
	if now := x.c.fallen() - fallen; now > x.falls {
		busy = true
		t.Logf("this machine is too busy: %d BGP sessions fell, %d expected", now, x.falls)
	}

	x.judge(t, during, after, busy)
}

// explain logs what may be behind the figures.
func (x *trial) explain(t *testing.T, before [clusterServers]count, lost, gaps map[string]float64) {
	t.Helper()
	t.Logf("packets from clients + to the egress addresses: %s", sharesOf(before, x.c.counts(t)))
	for name, n := range x.c.losses(t) {
		if more := n - lost[name]; more > 0 {
			t.Logf("%s: %.0f more", name, more)
		}
	}
	for name, n := range x.c.proxy.samples(t, proxyAdminPort, "anytun_client_gap") {
		if more := n - gaps[name]; more != 0 {
			t.Logf("proxy %s: %.3f more", name, more)
		}
	}
}

// judge makes the row and says what is wrong with it.
func (x *trial) judge(t *testing.T, during, after report, busy bool) {
	t.Helper()
	r := &x.row
	r.streams, r.broken, r.why, r.flows = len(after.streams), len(after.broken()), after.why(), during.flows
	var longest time.Duration
	if len(r.converged) > 0 {
		longest = slices.Max(r.converged)
	}
	for _, s := range during.stalls() {
		r.stalls = append(r.stalls, max(0, s-longest))
	}
	t.Log(r)
	for _, kind := range []byte{kindUp, kindDown, kindPing} {
		s := during.stalls(kind)
		t.Logf("%s: stalls of %v, %v, %v (median, p99, longest)", kindNames[kind], quantile(s, 0.5), quantile(s, 0.99), quantile(s, 1))
	}
	for _, f := range r.flows {
		t.Log(f)
	}
	if r.streams != x.streams {
		t.Errorf("%d streams, want %d", r.streams, x.streams)
	}
	if r.broken > 0 {
		t.Errorf("%d of %d connections broke: %s", r.broken, r.streams, r.why)
	}
	if got := after.from(); !slices.Equal(got, []string{egress4.String()}) {
		t.Errorf("connections come from %v, want %v alone", got, egress4)
	}
	if busy {
		r.note = strings.TrimPrefix(r.note+", disturbed: the machine was too busy for BFD", ", ")
		return
	}
	// Generous: what else this machine does costs time. The table has the figures.
	if q := quantile(r.stalls, 0.5); q > 5*time.Second {
		t.Errorf("half of the connections stalled for %v or longer", q)
	}
	if q := quantile(r.stalls, 0.99); q > 15*time.Second {
		t.Errorf("one of a hundred stalled for %v or longer", q)
	}
	for _, f := range r.flows {
		if f.Corrupt > 0 || f.Sent < 20 || f.LostRun > longest+5*time.Second {
			t.Errorf("more than the packets on their way: %v", f)
		}
	}
}

// repair puts right what a case that failed may have left.
func (c *cluster3) repair(t *testing.T) {
	t.Helper()
	c.route(t, 0)
	for _, s := range c.servers {
		select {
		case <-s.daemon.done:
			c.start(t, s.number)
		default:
			c.cont(t, s.number)
		}
		c.announced(t, s.number)
	}
}

// fallen counts the BGP sessions that ended, as the servers that run tell it. A
// server that was started again begins anew.
func (c *cluster3) fallen() (n int) {
	for _, s := range c.servers {
		n += strings.Count(s.daemon.printed(), "bgp: peer down")
	}
	return n
}

// losses are the packets that our programs, or their sockets, have dropped, by
// reason. A server that was started again begins anew.
func (c *cluster3) losses(t *testing.T) map[string]float64 {
	t.Helper()
	all := make(map[string]float64)
	take := func(name string, d *daemon, port int) {
		for metric, n := range d.samples(t, port, "dropped_total") {
			all[name+" "+metric] = n
		}
		for line := range strings.Lines(d.host.run(t, 10*time.Second, "nstat", "-asz", "UdpRcvbufErrors", "UdpSndbufErrors")) {
			if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "Udp") {
				all[name+" "+f[0]], _ = strconv.ParseFloat(f[1], 64)
			}
		}
	}
	take("proxy", c.proxy, proxyAdminPort)
	for _, s := range c.servers {
		take(serverName(s.number), s.daemon, serverAdminPort)
	}
	return all
}

// nothing is what to compare with: the stalls that the load itself makes.
func (x *trial) nothing(*testing.T) { time.Sleep(x.scale.before) }

// kill: the server's process is gone at once, its kernel is there to say so.
func (x *trial) kill(t *testing.T) {
	n := x.c.serving(t)
	began := time.Now()
	x.c.kill(t, n)
	x.gone(t, n, began)
	x.afterwards(t, func() { x.c.start(t, n); x.c.announced(t, n) })
}

// stopped: the server's process is there and does nothing.
func (x *trial) stopped(t *testing.T) {
	n := x.c.serving(t)
	began := time.Now()
	x.c.stop(t, n)
	x.gone(t, n, began)
	x.falls += len(x.c.server(n).neighbours())
	x.afterwards(t, func() { x.c.cont(t, n); x.c.announced(t, n) })
}

// cutOff: the server's host is dead and nobody says so.
func (x *trial) cutOff(t *testing.T) {
	n := x.c.serving(t)
	began := time.Now()
	x.c.cut(t, n)
	x.gone(t, n, began)
	x.falls += len(x.c.server(n).neighbours())
	x.afterwards(t, func() { x.c.heal(t, n); x.c.announced(t, n) })
}

// gone waits until no route leads to a server any more.
func (x *trial) gone(t *testing.T, n int, since time.Time) {
	x.row.converged = append(x.row.converged, x.c.withdrawn(t, n, since))
}

// afterwards puts right what was broken, a while later: coming back is part of
// the case, but not of its figures.
func (x *trial) afterwards(t *testing.T, right func()) {
	time.Sleep(x.scale.after)
	r := x.report()
	x.fault = &r
	x.mark()
	right()
	time.Sleep(x.scale.after)
	back := x.report().stalls()
	x.row.note = fmt.Sprintf("back again: stalls of %s, p99 %s", ms(quantile(back, 0.5)), ms(quantile(back, 0.99)))
}

func (x *trial) flip(t *testing.T) {
	defer x.c.route(t, 0)
	flips := 0
	for end := time.Now().Add(x.scale.flips); time.Now().Before(end); flips++ {
		x.c.route(t, flips%clusterServers+1)
		time.Sleep(500 * time.Millisecond)
	}
	x.row.note = fmt.Sprintf("%d flips", flips)
}

func (x *trial) spray(t *testing.T) {
	defer x.c.route(t, 0)
	x.c.spray(t)
	time.Sleep(x.scale.flips)
}

func (x *trial) rolling(t *testing.T) {
	for _, s := range x.c.servers {
		x.c.drain(t, s.number)
		x.c.start(t, s.number)
		x.c.announced(t, s.number)
	}
}

// roam: the client's address changes while all of its uplinks are up, as a
// telephone's does on its way out of a house. One that has to come up first
// takes up to a second here, as the kernel looks at links once a second.
func (x *trial) roam(t *testing.T) {
	defer x.c.leave(t, "wan", "")
	for _, move := range [][2]string{{"wan", "wan2"}, {"wan2", "mobile"}, {"mobile", "wan"}} {
		began := time.Now()
		x.c.leave(t, move[1], move[0])
		x.row.converged = append(x.row.converged, time.Since(began))
		time.Sleep(x.scale.before)
	}
}

// leave moves the client to an uplink; the one it leaves carries nothing from
// then on.
func (c *cluster3) leave(t *testing.T, to, from string) {
	t.Helper()
	ways := map[string]struct {
		host         *host
		device       string
		gate4, gate6 string
	}{
		"wan":    {c.nat, "wan", "198.51.100.1", "2001:db8:1:1::1"},
		"wan2":   {c.nat, "wan2", "198.51.100.5", "2001:db8:1:2::1"},
		"mobile": {c.app, "mobile", "198.51.100.9", "2001:db8:1:3::1"},
	}
	c.access.nft(t, "table inet gone { }\ndelete table inet gone")
	if from != "" {
		device := map[string]string{"wan": "left", "wan2": "left2", "mobile": "mobile"}[from]
		c.access.nft(t, fmt.Sprintf(`
table inet gone {
  chain in { type filter hook prerouting priority raw; iifname "%[1]s" drop
  }
  chain out { type filter hook postrouting priority raw; oifname "%[1]s" drop
  }
}`, device))
	}
	w := ways[to]
	if to != "mobile" { // behind the NAT
		ip(t, "-n", c.app.ns, "route", "replace", "default", "via", "192.168.77.1", "dev", "eth0")
		ip(t, "-n", c.app.ns, "-6", "route", "replace", "default", "via", "fd77::1", "dev", "eth0")
	}
	ip(t, "-n", w.host.ns, "route", "replace", "default", "via", w.gate4, "dev", w.device)
	ip(t, "-n", w.host.ns, "-6", "route", "replace", "default", "via", w.gate6, "dev", w.device)
}

// A throughput is streams as fast as they go, on a path that has a rate or not.
type throughput struct {
	name     string
	up, down int
	rate     int // bits a second, each way
}

var throughputs = []throughput{
	{"throughput of 4 uploads, sprayed", 4, 0, 0},
	{"throughput of 4 downloads, sprayed", 0, 4, 0},
	{"throughput of 4 uploads and 4 downloads over 100 Mbit/s, sprayed", 4, 4, 100e6},
}

// sprayed compares the throughput with that of packets that all take one
// server, in turns. Without a rate the processors are the limit, and four
// programs of ours share them with the kernel and the load.
func (p throughput) sprayed(t *testing.T, c *cluster3, scale failoverScale, sink netip.AddrPort) row {
	t.Helper()
	defer c.route(t, 0)
	if p.rate > 0 {
		c.shape(t, "access-core", shape{Rate: p.rate})
		defer c.shape(t, "access-core", shape{})
	}
	r := startRun(t, c.app, c.dst, loadConfig{Proxy: proxyAddr, Sink: sink, Up: p.up, Down: p.down})
	var moved [2]float64 // unsprayed, sprayed
	const turns = 3
	for range turns {
		for i, server := range []int{1, -1} {
			c.route(t, server)
			time.Sleep(scale.bulk / 4)
			before, began := r.report(), time.Now()
			time.Sleep(scale.bulk)
			after, took := r.report(), time.Since(began).Seconds()
			for _, kind := range []byte{kindUp, kindDown} {
				moved[i] += float64(after.bytes(kind)-before.bytes(kind)) / took / turns
			}
		}
	}
	c.route(t, 0)
	end := r.end()
	out := row{
		name: p.name, streams: len(end.streams), broken: len(end.broken()), why: end.why(),
		note: fmt.Sprintf("%.0f %% of the unsprayed: %.1f MB/s, %.1f", 100*moved[1]/moved[0], moved[1]/1e6, moved[0]/1e6),
	}
	t.Log(out)
	if out.broken > 0 {
		t.Errorf("%d of %d connections broke: %s", out.broken, out.streams, out.why)
	}
	if moved[1] < moved[0]/5 { // the table says whether it is half
		t.Errorf("sprayed throughput is only %.0f %% of the unsprayed", 100*moved[1]/moved[0])
	}
	return out
}

func (r row) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d of %d broken", r.name, r.broken, r.streams)
	if r.why != "" {
		fmt.Fprintf(&b, " (%s)", r.why)
	}
	if len(r.converged) > 0 {
		fmt.Fprintf(&b, ", routes converged in %v", r.converged)
	}
	if len(r.stalls) > 0 {
		fmt.Fprintf(&b, ", stalls beyond that: median %v, p99 %v, longest %v",
			quantile(r.stalls, 0.5), quantile(r.stalls, 0.99), quantile(r.stalls, 1))
	}
	if r.note != "" {
		fmt.Fprintf(&b, ", %s", r.note)
	}
	return b.String()
}

func (f flowReport) String() string {
	s := fmt.Sprintf("%s: %d of %d packets lost", f.Flow, f.Lost, f.Sent)
	if f.Lost > 0 {
		s += fmt.Sprintf(", at most %v in a row, within %v", f.LostRun.Round(time.Millisecond), f.LostSpan.Round(time.Millisecond))
	}
	if f.Doubled+f.Late+f.Corrupt > 0 {
		s += fmt.Sprintf(", %d doubled, %d late, %d corrupt", f.Doubled, f.Late, f.Corrupt)
	}
	return s + fmt.Sprintf(", round trip %v, longest %v", f.RTT.Round(10*time.Microsecond), f.MaxRTT.Round(time.Millisecond))
}

// printTable logs the rows of all rounds as a table in Markdown.
func printTable(t *testing.T, title string, rows []row) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", title)
	b.WriteString("| case | connections | broken | routes converged | stall beyond that: median | p99 | longest | UDP lost, longest run | ping lost, longest run | |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|\n")
	var names []string
	for _, r := range rows {
		if !slices.Contains(names, r.name) {
			names = append(names, r.name)
		}
	}
	for _, name := range names {
		sum := row{name: name}
		var notes []string
		lost := make(map[string]flowReport)
		for _, r := range rows {
			if r.name != name {
				continue
			}
			sum.streams += r.streams
			sum.broken += r.broken
			sum.converged = append(sum.converged, r.converged...)
			sum.stalls = append(sum.stalls, r.stalls...)
			for _, s := range []string{r.why, r.note} {
				if s != "" {
					notes = append(notes, s)
				}
			}
			for _, f := range r.flows {
				l := lost[f.Flow]
				l.Sent, l.Lost, l.LostRun = l.Sent+f.Sent, l.Lost+f.Lost, max(l.LostRun, f.LostRun)
				lost[f.Flow] = l
			}
		}
		slices.Sort(sum.stalls)
		slices.Sort(sum.converged)
		flow := func(name string) string {
			f, ok := lost[name]
			if !ok {
				return "–"
			}
			return fmt.Sprintf("%d of %d, %s", f.Lost, f.Sent, ms(f.LostRun))
		}
		converged, stalls := "–", []string{"–", "–", "–"}
		if n := len(sum.converged); n > 0 {
			converged = ms(quantile(sum.converged, 0.5))
			if n > 1 {
				converged += " (" + ms(sum.converged[0]) + " to " + ms(sum.converged[n-1]) + ")"
			}
		}
		if len(sum.stalls) > 0 {
			stalls = []string{ms(quantile(sum.stalls, 0.5)), ms(quantile(sum.stalls, 0.99)), ms(quantile(sum.stalls, 1))}
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %s | %s | %s | %s | %s |\n", name, sum.streams, sum.broken, converged,
			strings.Join(stalls, " | "), flow("udp"), flow("ping"), strings.Join(notes, "; "))
	}
	t.Log("\n" + b.String())
	if out := os.Getenv(failoverOutEnv); out != "" {
		f, err := os.OpenFile(out, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err == nil {
			_, err = f.WriteString(b.String() + "\n")
			err = cmp.Or(err, f.Close())
		}
		if err != nil {
			t.Error(err)
		}
	}
}

func ms(d time.Duration) string {
	return fmt.Sprintf("%d ms", d.Round(time.Millisecond).Milliseconds())
}
