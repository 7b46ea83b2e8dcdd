//go:build linux

package lab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// endLimit is how long streams may take to end in good order: one that needs
// longer is stuck, hence broken.
const endLimit = 90 * time.Second

// A loadConfig says what the load consists of.
type loadConfig struct {
	Proxy string         // SOCKS5, or empty: straight to the sink
	Sink  netip.AddrPort // TCP and UDP
	Ping  netip.Addr     // for echo requests from the load's host; none if not valid

	Up, Down, Pings, Idle int // connections of each kind
	Rate                  int // of a bulk stream, bytes a second; 0: as fast as it goes
	Tick                  time.Duration
	Every                 time.Duration // between two messages of a ping-pong
	UDP                   bool
}

// A third bulk in each direction, the rest idle or ping-pong.
func (c loadConfig) connections(n int) loadConfig {
	c.Up, c.Down = n/3, n/3
	c.Pings = (n - 2*(n/3)) / 2
	c.Idle = n - c.Up - c.Down - c.Pings
	return c
}

// A load is many connections to a sink, and flows of single packets.
type load struct {
	cfg   loadConfig
	seed  uint64
	stop  chan struct{}
	wg    sync.WaitGroup
	flows []*flow

	mu      sync.Mutex
	streams []*stream
}

// A streamReport is about one connection since the last mark.
type streamReport struct {
	ID    uint32
	Kind  string
	Bytes uint64        // in all
	Stall time.Duration // longest time without progress
	From  string        // whose connection it is, as the sink sees it
	Error string
}

// newLoad opens everything; it goes on until end.
func newLoad(cfg loadConfig) (*load, error) {
	if cfg.Tick == 0 {
		cfg.Tick = 50 * time.Millisecond
	}
	if cfg.Every == 0 {
		cfg.Every = 100 * time.Millisecond
	}
	l := &load{cfg: cfg, seed: rand.Uint64(), stop: make(chan struct{})}
	var kinds []byte
	for kind, n := range map[byte]int{kindUp: cfg.Up, kindDown: cfg.Down, kindPing: cfg.Pings, kindIdle: cfg.Idle} {
		kinds = append(kinds, strings.Repeat(string(rune(kind)), n)...)
	}
	if err := l.open(kinds); err != nil {
		l.giveUp()
		return nil, err
	}
	if cfg.UDP {
		f, err := udpFlow(cfg.Proxy, cfg.Sink)
		if err != nil {
			l.giveUp()
			return nil, fmt.Errorf("udp: %w", err)
		}
		l.flows = append(l.flows, f)
	}
	if cfg.Ping.IsValid() {
		f, err := pingFlow(cfg.Ping)
		if err != nil {
			l.giveUp()
			return nil, fmt.Errorf("ping: %w", err)
		}
		l.flows = append(l.flows, f)
	}
	for _, f := range l.flows {
		f.start(l.seed)
	}
	return l, nil
}

// open opens connections, all of which must succeed, and starts them.
func (l *load) open(kinds []byte) error {
	l.mu.Lock()
	first := len(l.streams)
	fresh := make([]*stream, len(kinds))
	for i := range fresh {
		fresh[i] = &stream{header: header{
			kind: kinds[i], id: uint32(first + i), seed: l.seed, rate: uint32(l.cfg.Rate), tick: l.cfg.Tick,
		}}
	}
	l.streams = append(l.streams, fresh...)
	l.mu.Unlock()
	return each(make([]net.Conn, len(fresh)), func(i int) error {
		s := fresh[i]
		if err := l.dial(s); err != nil {
			s.fail(err)
			return err
		}
		l.wg.Go(func() { s.fail(s.run(l.stop, l.cfg.Every)) })
		return nil
	})
}

func (l *load) dial(s *stream) error {
	var c net.Conn
	var err error
	if l.cfg.Proxy == "" {
		c, err = net.DialTimeout("tcp", l.cfg.Sink.String(), time.Minute)
	} else {
		c, _, err = socksRequest(l.cfg.Proxy, socksConnect, l.cfg.Sink)
	}
	if err != nil {
		return err
	}
	s.conn = c.(*net.TCPConn)
	if err := s.conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return err
	}
	return s.conn.SetDeadline(time.Time{})
}

// giveUp closes what an unsuccessful beginning has opened.
func (l *load) giveUp() {
	close(l.stop)
	for _, f := range l.flows {
		f.close()
	}
	l.mu.Lock()
	for _, s := range l.streams {
		if s.conn != nil {
			s.conn.Close()
		}
	}
	l.mu.Unlock()
	l.wg.Wait()
}

// mark begins a new measurement.
func (l *load) mark() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.streams {
		s.meter.mark()
	}
	for _, f := range l.flows {
		f.mark()
	}
}

// end ends all connections in good order, each of them checked to its last
// byte, and the flows.
func (l *load) end() {
	l.mu.Lock()
	limit := time.Now().Add(endLimit)
	for _, s := range l.streams {
		if s.conn != nil {
			_ = s.conn.SetDeadline(limit)
		}
	}
	l.mu.Unlock()
	close(l.stop)
	l.wg.Wait()
	for _, f := range l.flows {
		f.end()
	}
}

func (l *load) report() ([]streamReport, []flowReport) {
	l.mu.Lock()
	defer l.mu.Unlock()
	streams := make([]streamReport, 0, len(l.streams))
	for _, s := range l.streams {
		r := streamReport{ID: s.id, Kind: kindNames[s.kind]}
		r.Bytes, r.Stall = s.meter.read()
		s.mu.Lock()
		if s.err != nil {
			r.Error = s.err.Error()
			if errors.Is(s.err, os.ErrDeadlineExceeded) {
				r.Error = "stuck"
			}
		}
		s.mu.Unlock()
		streams = append(streams, r)
	}
	var flows []flowReport
	for _, f := range l.flows {
		flows = append(flows, f.report())
	}
	return streams, flows
}

// The load and the sink as programs of their own, on hosts of their own, are
// spoken to line by line:
//
//	mark     begin a new measurement; "marked"
//	report   a line of JSON for each stream and flow, and "reported"
//	more N   open N more connections; "more" and nothing, or what went wrong
//	end      end everything in good order, then as for report; ends the program
//
// When it is ready, either prints "ready" first.

// runLoad is the helper "load".
func runLoad(config string) error {
	var cfg loadConfig
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	l, err := newLoad(cfg)
	if err != nil {
		return err
	}
	return converse(l.mark, func(out *json.Encoder) error {
		streams, flows := l.report()
		return errors.Join(encode(out, streams), encode(out, flows))
	}, func(n int) error { return l.open([]byte(strings.Repeat(string(rune(kindPing)), n))) }, l.end)
}

// runSink is the helper "sink".
func runSink(at string) error {
	address, err := netip.ParseAddrPort(at)
	if err != nil {
		return err
	}
	s, err := newSink(address)
	if err != nil {
		return err
	}
	return converse(s.mark, func(out *json.Encoder) error { return encode(out, s.report()) }, nil, s.close)
}

func encode[T any](out *json.Encoder, rows []T) error {
	for _, r := range rows {
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

func converse(mark func(), report func(*json.Encoder) error, more func(int) error, end func()) error {
	out := bufio.NewWriter(os.Stdout)
	say := func(line string) error {
		fmt.Fprintln(out, line)
		return out.Flush()
	}
	if err := say("ready"); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		word, rest, _ := strings.Cut(in.Text(), " ")
		var err error
		switch word {
		case "mark":
			mark()
			err = say("marked")
		case "more":
			var n int
			if _, err := fmt.Sscan(rest, &n); err != nil {
				return err
			}
			result := "more"
			if err := more(n); err != nil {
				result += " " + err.Error()
			}
			err = say(result)
		case "report", "end":
			if word == "end" {
				end()
			}
			if err = report(json.NewEncoder(out)); err == nil {
				err = say("reported")
			}
		default:
			err = fmt.Errorf("what is %q?", word)
		}
		if err != nil || word == "end" {
			return err
		}
	}
	return io.ErrUnexpectedEOF
}
