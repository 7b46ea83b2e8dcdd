//go:build linux

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// standEnv makes TestStand run.
const standEnv = "ANYTUN_LAB_STAND"

// TestStand is no test: it builds the cluster, prints a map, and obeys a person
// until Ctrl-C, "quit" or SIGTERM. make lab runs it.
func TestStand(t *testing.T) {
	if os.Getenv(standEnv) == "" {
		t.Skip("for people: make lab")
	}
	fmt.Fprintln(os.Stdout, "building the cluster: ten hosts, three servers, one client ...")
	began := time.Now()
	s := &stand{
		cluster3: newCluster3(t, cluster3Options{
			StandIns:    os.Getenv(standEnv) == "network",
			NoServers:   os.Getenv(standEnv) == "hosts",
			SameAddress: os.Getenv(standEnv) == "same-address",
		}),
		signals: make(chan os.Signal, 1),
	}
	signal.Notify(s.signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(s.signals)
	fmt.Fprintf(os.Stdout, "it stands, after %.1f s\n", time.Since(began).Seconds())
	s.script(t)
	s.printMap()
	s.obey(t)
	fmt.Fprintln(os.Stdout, "taking it down ...")
}

// A stand is a cluster that a person plays with.
type stand struct {
	*cluster3
	signals chan os.Signal
	on      string // path of the program that runs commands on hosts
}

// script writes the program "on".
func (s *stand) script(t *testing.T) {
	t.Helper()
	s.on = filepath.Join(work, "on")
	var b strings.Builder
	b.WriteString("#!/bin/sh\n# usage: on HOST COMMAND [ARGUMENT]...\nhost=$1; shift\ncase $host in\n")
	for _, name := range s.names() {
		fmt.Fprintf(&b, "%s) exec ip netns exec %s \"$@\";;\n", name, s.host(name).ns)
	}
	b.WriteString("esac\necho \"no host is called $host\" >&2; exit 2\n")
	if err := os.WriteFile(s.on, []byte(b.String()), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (s *stand) printMap() {
	fmt.Fprintf(os.Stdout, `
                ┌─ wan ──┐                 ┌─ s1      service address  %v and %v, UDP port %d
  app ── nat ───┤        ├ access ── core ─┼─ s2      egress address   %v and %v
    │           └─ wan2 ─┘   │         │ │ └─ s3 ─┐   all three servers announce both by BGP
    └──────── mobile ────────┘       dst └─ edge ─┘
                                             └─ dst2

`, s.services.v4, s.services.v6, serverPort, s.egress.v4, s.egress.v6)
	fmt.Fprintf(os.Stdout, "%-8s %-12s %-8s %-22s %-22s to\n", "host", "cable", "device", "IPv4", "IPv6")
	for _, name := range s.names() {
		shown := name
		for _, k := range clusterCables {
			for _, ends := range [][2]port{{k.a, k.b}, {k.b, k.a}} {
				if ends[0].host == name {
					fmt.Fprintf(os.Stdout, "%-8s %-12s %-8s %-22s %-22s %s\n", shown, k.name, ends[0].device, ends[0].v4, ends[0].v6, ends[1].host)
					shown = ""
				}
			}
		}
	}
	web := fmt.Sprintf("http://%s:%d/who", dst4, httpPort)
	fmt.Fprintf(os.Stdout, `
From any terminal, as root (dst and dst2 have nginx at %[3]d, iperf3 at 5201, a resolver that knows %[4]s):

  %[1]s app curl %[2]s                      the way without a tunnel: the address of app's NAT
  %[1]s app curl -x socks5h://%[5]s %[2]s   through the cluster: its egress address
  %[1]s core ip route                       and: on core birdc -s %[6]s show protocols
  %[1]s s1 %[7]s status
  %[1]s app bash

Here:
`, s.on, web, httpPort, webName, proxyAddr, birdControl(s.core), s.ours("anytun-server"))
	s.printHelp()
}

// ours is the path of a program of ours, if it has been built.
func (s *stand) ours(name string) string {
	if s.options.StandIns {
		return name
	}
	return program(s.t, name)
}

func (s *stand) printHelp() {
	fmt.Fprint(os.Stdout, `  kill N | stop N | cont N | drain N | start N [FLAG...]   the server's process: -9, SIGSTOP, SIGCONT, SIGTERM, again
  cut N | heal N                    what the server's cables carry: nothing, everything
  route N                           everything to server N; 0: as BGP says
  service N | egress N              the same for clients' packets, for packets from outside
  spray                             every packet to a random server; route 0 ends it
  roam wan|wan2|mobile              the client's uplink
  shape CABLE [rate=20m] [queue=50ms] [loss=0.01] [delay=20ms] [jitter=2ms] [late=1ms] [share=0.02]   nothing: good again
  on HOST COMMAND...                runs a command; Ctrl-C ends it
  counts | routes | log N|proxy | map | help | quit
`)
}

// obey reads commands until there is a reason to end. Without a terminal or a
// file to read from, the cluster stands until a signal comes.
func (s *stand) obey(t *testing.T) {
	lines := make(chan string)
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			select {
			case lines <- in.Text():
			case <-ended:
				return
			}
		}
	}()
	for {
		fmt.Fprint(os.Stdout, "lab> ")
		select {
		case <-s.signals:
			fmt.Fprintln(os.Stdout)
			return
		case line, ok := <-lines:
			if !ok {
				fmt.Fprintln(os.Stdout, "no more input: standing until Ctrl-C")
				lines = nil
				continue
			}
			fields := strings.Fields(line)
			if len(fields) == 0 {
				continue
			}
			if fields[0] == "quit" || fields[0] == "exit" {
				return
			}
			// A subtest: what fails ends the command, not the lab.
			t.Run(line, func(t *testing.T) {
				if err := s.command(t, fields[0], fields[1:]); err != nil {
					fmt.Fprintln(os.Stdout, err)
				}
			})
		}
	}
}

var errUsage = errors.New("not understood; help shows what is")

// command does what one line says.
func (s *stand) command(t *testing.T, name string, args []string) error {
	began := time.Now()
	switch name {
	case "help":
		s.printHelp()
	case "map":
		s.printMap()
	case "spray":
		s.spray(t)
	case "routes":
		fmt.Fprintln(os.Stdout, "core:", strings.ReplaceAll(s.atCore.describe(s.cluster3), "; ", "\n      "))
		fmt.Fprintln(os.Stdout, "edge:", strings.ReplaceAll(s.atEdge.describe(s.cluster3), "; ", "\n      "))
	case "counts":
		for i, n := range s.counts(t) {
			fmt.Fprintf(os.Stdout, "%s: %d packets from clients, %d to egress addresses\n", serverName(i+1), n.Service, n.Egress)
		}
	case "roam":
		if len(args) != 1 || !slices.Contains([]string{"wan", "wan2", "mobile"}, args[0]) {
			return errUsage
		}
		s.roam(t, args[0])
	case "shape":
		return s.shapeCommand(t, args)
	case "log":
		return s.printLog(args)
	case "on":
		return s.runOn(args)
	default:
		if len(args) == 0 {
			return errUsage
		}
		number, err := strconv.Atoi(args[0])
		if err != nil || number < 0 || number > clusterServers {
			return errUsage
		}
		return s.toServer(t, name, number, args[1:], began)
	}
	return nil
}

// toServer does what is done to one server.
func (s *stand) toServer(t *testing.T, name string, number int, args []string, began time.Time) error {
	steer := map[string]func(*testing.T, int){"route": s.route, "service": s.routeService, "egress": s.routeEgress}
	if f := steer[name]; f != nil {
		f(t, number)
		return nil
	}
	if number == 0 {
		return errUsage
	}
	withdraws := map[string]func(*testing.T, int){"kill": s.kill, "stop": s.stop, "drain": s.drain, "cut": s.cut}
	announces := map[string]func(*testing.T, int){"cont": s.cont, "heal": s.heal, "start": func(t *testing.T, n int) { s.start(t, n, args...) }}
	switch {
	case withdraws[name] != nil:
		withdraws[name](t, number)
		fmt.Fprintf(os.Stdout, "no router sends to %s any more, after %v\n", serverName(number), s.withdrawn(t, number, began).Round(100*time.Microsecond))
	case announces[name] != nil:
		announces[name](t, number)
		s.announced(t, number)
		fmt.Fprintf(os.Stdout, "the routers send to %s again, after %v\n", serverName(number), time.Since(began).Round(10*time.Millisecond))
	default:
		return errUsage
	}
	return nil
}

// shapeCommand is "shape CABLE key=value...".
func (s *stand) shapeCommand(t *testing.T, args []string) error {
	if len(args) == 0 || !slices.ContainsFunc(clusterCables, func(k cable) bool { return k.name == args[0] }) {
		return errUsage
	}
	var sh shape
	for _, a := range args[1:] {
		key, value, _ := strings.Cut(a, "=")
		durations := map[string]*time.Duration{"queue": &sh.Queue, "delay": &sh.Delay, "jitter": &sh.Jitter, "late": &sh.Late}
		shares := map[string]*float64{"loss": &sh.Loss, "share": &sh.LateShare}
		var err error
		switch {
		case durations[key] != nil:
			*durations[key], err = time.ParseDuration(value)
		case shares[key] != nil:
			*shares[key], err = strconv.ParseFloat(value, 64)
		case key == "rate":
			factor := 1
			for suffix, f := range map[string]int{"k": 1e3, "m": 1e6, "g": 1e9} {
				if rest, ok := strings.CutSuffix(value, suffix); ok {
					value, factor = rest, f
				}
			}
			sh.Rate, err = strconv.Atoi(value)
			sh.Rate *= factor
		default:
			return errUsage
		}
		if err != nil {
			return err
		}
	}
	s.shape(t, args[0], sh)
	return nil
}

func (s *stand) printLog(args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	d := s.proxy
	if number, err := strconv.Atoi(args[0]); err == nil && number >= 1 && number <= clusterServers {
		d = s.server(number).daemon
	} else if args[0] != "proxy" || d == nil {
		return errUsage
	}
	fmt.Fprintln(os.Stdout, tail(d.printed(), 40))
	return nil
}

// runOn runs a command on a host until it ends or a signal ends it.
func (s *stand) runOn(args []string) error {
	if len(args) < 2 || s.hosts[args[0]] == nil {
		return errUsage
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := s.host(args[0]).command(ctx, "sh", "-c", strings.Join(args[1:], " "))
	cmd.Stdout, cmd.Stderr = io.Writer(os.Stdout), os.Stderr
	if err := start(cmd); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	var err error
	select {
	case err = <-done:
	case <-s.signals:
		cancel()
		<-done
		return nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("exit status %d", exit.ExitCode())
	}
	return err
}
