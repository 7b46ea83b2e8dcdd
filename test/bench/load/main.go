// Command load measures one path, direct or through a SOCKS5 proxy, and makes
// the tables of test/bench out of many such measurements.
//
//	load sink                       answer tests; runs at the destination
//	load wait  -dst IP -socks A     until one request is answered
//	load run   -test down1 ...      run one test, print one line of JSON
//	load report FILE...             tables in Markdown out of those lines
//
// It knows nothing of namespaces or of who is measured; test/bench/bench does.
//
// The road:
//
//	main.go      flags
//	path.go      TCP and UDP to the destination, through SOCKS5 where there is a proxy
//	sink.go      the destination
//	bulk.go      down1, up8, ...: throughput of so many streams; open10000: of 8 among so many
//	requests.go  conn32: each GET on a new connection; keep1: on a kept one
//	datagram.go  echo64, udpup1200, udpdown1200
//	memory.go    mem: resident memory of the proxies while connections are open
//	usage.go     CPU time and memory of processes, and of the machine
//	record.go    what a test writes
//	report.go    columns, medians, ratios
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "load: error:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

// run is main with its output handed in.
func run(args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("which of sink, wait, run, report?")
	}
	switch name, args := args[0], args[1:]; name {
	case "sink":
		return newSink().serve()
	case "wait":
		return waitMain(args)
	case "run":
		return runMain(args, out)
	case "report":
		return reportMain(args, out)
	default:
		return fmt.Errorf("%q is none of sink, wait, run, report", name)
	}
}

// pathFlags are the flags that say which path is meant.
func pathFlags(fs *flag.FlagSet) *path {
	p := &path{timeout: 5 * time.Second}
	fs.StringVar(&p.dst, "dst", "10.71.3.2", "IPv4 `ADDRESS` of the destination, where the sink runs")
	fs.StringVar(&p.socks, "socks", "", "`ADDRESS` of the SOCKS5 proxy; none: the direct path")
	return p
}

// waitMain waits until one request is answered.
func waitMain(args []string) error {
	fs := flag.NewFlagSet("wait", flag.ContinueOnError)
	p := pathFlags(fs)
	limit := fs.Duration("for", 10*time.Second, "give up after this `TIME`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	p.timeout = time.Second
	for end := time.Now().Add(*limit); ; pause(100 * time.Millisecond) {
		err := p.tryOnce()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("no answer within %v: %w", *limit, err)
		}
	}
}

// runMain runs one test. A test that fails is a result too: its line says why.
func runMain(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	p := pathFlags(fs)
	var r record
	fs.StringVar(&r.Test, "test", "down1", "`NAME` of the test")
	fs.StringVar(&r.Name, "name", "", "`NAME` of who is measured, for the record, as all that follow")
	fs.StringVar(&r.Class, "class", classPeer, strings.Join(classes, ", "))
	fs.StringVar(&r.Mode, "mode", "", "super or wire")
	fs.StringVar(&r.Path, "path", "", "what is special about the path")
	fs.IntVar(&r.Round, "round", 1, "`NUMBER` of the round")
	control := fs.String("control", "", "`ADDRESS` at which the sink is reached directly; default -dst")
	warm := fs.Duration("warm", 500*time.Millisecond, "`TIME` before counting")
	dur := fs.Duration("dur", 2*time.Second, "`TIME` counted")
	client := fs.String("client", "", "`SESSIONS` of the client's processes, with commas")
	server := fs.String("server", "", "`SESSIONS` of the server's processes")
	quiet := fs.Float64("quiet", 0.12, "begin when the machine is less busy than this `SHARE`")
	quietFor := fs.Duration("quiet-for", 0, "wait for that no longer than this `TIME`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *control == "" {
		*control = p.dst
	}
	t := test{path: p, direct: &path{dst: *control, timeout: p.timeout}, warm: *warm, dur: *dur}
	var err error
	if t.procs.client, err = sessions(*client); err != nil {
		return err
	}
	if t.procs.server, err = sessions(*server); err != nil {
		return err
	}
	f, err := t.byName(r.Test)
	if err != nil {
		return err
	}
	r.Waited = waitQuiet(*quiet, *quietFor)
	if r.Figures, err = f(); err != nil {
		r.Error = err.Error()
	}
	r.When = time.Now().Format(time.RFC3339)
	fmt.Fprintf(os.Stderr, "%-5s %-8s #%d %-11s %-16s %s\n", r.Mode, r.Path, r.Round, r.Test, r.Name, r.brief())
	return json.NewEncoder(out).Encode(r)
}

// A test is what every test needs to know.
type test struct {
	path, direct *path // through who is measured; to the sink's counters
	procs        processes
	warm, dur    time.Duration
}

// byName finds the test that a name like down8 means.
func (t test) byName(name string) (func() (figures, error), error) {
	kind := strings.TrimRight(name, "0123456789")
	n, err := strconv.Atoi(name[len(kind):])
	if kind == "mem" && kind == name {
		return t.memory, nil
	}
	if err != nil || n < 1 {
		return nil, fmt.Errorf("no test is called %q", name)
	}
	switch kind {
	case "down", "up":
		return func() (figures, error) { return t.bulk(kind == "up", n) }, nil
	case "open":
		return func() (figures, error) { return t.bulkAmong(n) }, nil
	case "conn", "keep":
		return func() (figures, error) { return t.requests(n, kind == "conn") }, nil
	case "echo":
		return func() (figures, error) { return t.echo(n) }, nil
	case "udpup":
		return func() (figures, error) { return t.datagramsUp(n) }, nil
	case "udpdown":
		return func() (figures, error) { return t.datagramsDown(n) }, nil
	default:
		return nil, fmt.Errorf("no test is called %q", name)
	}
}

// pause waits. Nothing else happens meanwhile in whatever calls it.
func pause(d time.Duration) { <-time.NewTimer(d).C }
