// Command scale simulates a day of a large anycast cluster, event by event: its
// servers, clients, flows, routes that flip, sites that fail, addresses that
// change, and what the servers tell each other about it. It prints how many
// flows broke, how long others stood still, and the bytes of synchronisation.
//
//	go run ./test/simnet/scale -servers 300 -clients 100000 -day 24h
//
// What decides is the project's own: package registry's codec and seal for the
// bytes of every message, package portblock for whose port a packet goes to, and
// anytun/server's rules for what is told when. The network, the users and time
// are a model; ../SCALE.md says which, and holds the results.
//
// The road:
//
//	world.go      places, clients, peers; the queue of events
//	events.go     what happens: sites fail and start, routes flip, addresses change, sessions begin
//	flows.go      who has which flows, how long they stand still, which break
//	knowledge.go  what each server knows of each client, and since when
//	traffic.go    bytes between the servers
//	report.go     tables
//
// Everything follows from the seed. One goroutine; 100,000 clients are 200 MB.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// config is a world. Rates are per client unless they say otherwise.
type config struct {
	Servers, Clients, Peers int // Peers: networks that flows go to
	Day                     time.Duration
	Seed                    uint64

	// Routes.
	Unstable         float64       // part of all clients and peers whose route flips all the time
	FlipMin, FlipMax time.Duration // bounds of the mean time between flips of such a client
	RouteEvery       time.Duration // between route changes of everybody else
	FailEvery        time.Duration // between failures of some site
	Repair           time.Duration // mean time until it is back
	Converge         time.Duration // median time until a network has another route; 4/5 need twice as long at most
	Slow             float64       // part of the networks that need 30 s to 5 min

	// Clients.
	KeepAlive  time.Duration
	Mobile     float64       // part that changes networks
	MoveEvery  time.Duration // how often those do
	Renumber   time.Duration // between new addresses of the others
	Rebind     time.Duration // between the translator forgetting one for no reason
	ShortNAT   float64       // part behind translators that forget after 30 to 60 s
	Part       float64       // part that is there only at times
	On, Off    time.Duration // how long those are there, and aren't
	Flows      float64       // times as many flows as usual
	OldSession time.Duration // how long a client opens packets of the session before
	Patience   time.Duration // a flow that makes no progress for longer is broken

	// Registry.
	Delay     time.Duration // of a message, mean, beyond the way it has to go
	Linger    time.Duration // what was published so shortly before its server's death is lost
	Partition time.Duration // at noon the registry falls apart for so long
	Groups    int           // into so many groups of servers; 0: every server is alone

	// Rules of the servers.
	Forget time.Duration // how long a server that misses others takes their word for clients being there
	Own    bool          // a server that is asked for what it heard itself says no more than that
}

func defaults() config {
	return config{
		Servers: 300, Clients: 100_000, Peers: 20_000, Day: 24 * time.Hour, Seed: 1,
		Unstable: 0.01, FlipMin: 10 * time.Second, FlipMax: time.Hour, RouteEvery: 24 * time.Hour,
		FailEvery: time.Hour, Repair: 15 * time.Minute, Converge: 5 * time.Second, Slow: 0.02,
		KeepAlive: 20 * time.Second,
		Mobile:    0.2, MoveEvery: 30 * time.Minute, Renumber: 24 * time.Hour, Rebind: 12 * time.Hour, ShortNAT: 0.1,
		Part: 0.3, On: 2 * time.Hour, Off: 4 * time.Hour, Flows: 1,
		OldSession: time.Hour, Patience: 100 * time.Second,
		Delay: 30 * time.Millisecond, Linger: 50 * time.Millisecond, Groups: 2,
		Forget: 2 * time.Hour, Own: true,
	}
}

func (c *config) flags(f *flag.FlagSet) {
	f.IntVar(&c.Servers, "servers", c.Servers, "servers, each a site of its own")
	f.IntVar(&c.Clients, "clients", c.Clients, "clients enrolled")
	f.IntVar(&c.Peers, "peers", c.Peers, "networks that flows go to")
	f.DurationVar(&c.Day, "day", c.Day, "length of the simulation")
	f.Uint64Var(&c.Seed, "seed", c.Seed, "of all chance")
	f.Float64Var(&c.Unstable, "unstable", c.Unstable, "part of the clients and of the peers whose route flips all the time")
	f.DurationVar(&c.FlipMin, "flip-min", c.FlipMin, "least mean time between such a client's flips")
	f.DurationVar(&c.FlipMax, "flip-max", c.FlipMax, "most")
	f.DurationVar(&c.RouteEvery, "route-every", c.RouteEvery, "mean time between route changes of any other client")
	f.DurationVar(&c.FailEvery, "fail-every", c.FailEvery, "time between failures of a site; 0: none fails")
	f.DurationVar(&c.Repair, "repair", c.Repair, "mean time until a failed site is back")
	f.DurationVar(&c.Converge, "converge", c.Converge, "median of the time until a network has another route")
	f.Float64Var(&c.Slow, "slow", c.Slow, "part of the networks that need 30 s to 5 min for that")
	f.DurationVar(&c.KeepAlive, "keep-alive", c.KeepAlive, "keep-alive interval")
	f.Float64Var(&c.Mobile, "mobile", c.Mobile, "part of the clients that change networks")
	f.DurationVar(&c.MoveEvery, "move-every", c.MoveEvery, "mean time between a mobile client's changes")
	f.DurationVar(&c.Renumber, "renumber", c.Renumber, "mean time between new addresses of other clients")
	f.DurationVar(&c.Rebind, "rebind", c.Rebind, "mean time between a translator's forgetting a client")
	f.Float64Var(&c.ShortNAT, "short-nat", c.ShortNAT, "part of the clients whose translator forgets after 30 to 60 s")
	f.Float64Var(&c.Part, "part-time", c.Part, "part of the clients that come and go")
	f.DurationVar(&c.On, "on", c.On, "mean time that those are there")
	f.DurationVar(&c.Off, "off", c.Off, "mean time that they aren't")
	f.Float64Var(&c.Flows, "flows", c.Flows, "times as many flows as usual")
	f.DurationVar(&c.OldSession, "old-session", c.OldSession, "how long a client opens packets of the session before")
	f.DurationVar(&c.Patience, "patience", c.Patience, "a flow without progress for longer is broken")
	f.DurationVar(&c.Delay, "registry-delay", c.Delay, "mean time of a message between servers, beyond that of the way")
	f.DurationVar(&c.Linger, "registry-linger", c.Linger, "what was published so shortly before its server's death is lost")
	f.DurationVar(&c.Partition, "partition", c.Partition, "how long the registry is in parts, from the middle of the day on")
	f.IntVar(&c.Groups, "groups", c.Groups, "number of those parts; 0: every server is alone")
	f.DurationVar(&c.Forget, "forget", c.Forget, "rule: how long a server that misses others takes their word for clients being there")
	f.BoolVar(&c.Own, "own", c.Own, "rule: a server that is asked for what it heard itself says no more than that")
}

func (c *config) check() error {
	switch {
	case c.Servers < 3 || c.Servers > 1<<15:
		return fmt.Errorf("%d servers: must be 3 to %d", c.Servers, 1<<15)
	case c.Clients < 1 || c.Clients > 1<<22-1:
		return fmt.Errorf("%d clients: must be 1 to %d", c.Clients, 1<<22-1)
	case c.Peers < 1:
		return fmt.Errorf("%d peers: must be 1 at least", c.Peers)
	case c.Day < time.Minute || c.KeepAlive < time.Second || c.Forget < 2*seenInterval || c.FlipMin < time.Second || c.FlipMax <= c.FlipMin:
		return fmt.Errorf("a time is too short, or -flip-max not above -flip-min")
	case c.RouteEvery <= 0 || c.MoveEvery <= 0 || c.Renumber <= 0 || c.Rebind <= 0 || c.On <= 0 || c.Off <= 0 ||
		c.Repair <= 0 || c.Converge <= 0 || c.Flows <= 0:
		return fmt.Errorf("mean times and -flows must be above 0")
	}
	return nil
}

func run(args []string, out io.Writer) error {
	c := defaults()
	f := flag.NewFlagSet("scale", flag.ContinueOnError)
	f.SetOutput(out)
	c.flags(f)
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := c.check(); err != nil {
		return err
	}
	w, err := newWorld(c)
	if err != nil {
		return err
	}
	start := time.Now()
	w.run()
	fmt.Fprintf(out, "`go run ./test/simnet/scale %s`", strings.Join(args, " "))
	fmt.Fprintf(out, " (%d events in %.0f s)\n\n", w.events, time.Since(start).Seconds())
	w.report(out)
	return nil
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "scale: error:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}
