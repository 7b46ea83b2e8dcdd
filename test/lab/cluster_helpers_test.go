//go:build linux

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// clusterHelpers are what this test binary can be on the cluster's hosts, to try
// the network itself.
var clusterHelpers = map[string]func(args []string) error{
	"wire":   runWire,
	"answer": runAnswer,
	"ask":    runAsk,
	"pace":   runPace,
}

// runAnswer is the helper "answer": ADDRESS NAME. It answers every datagram with
// its name, the address that asked, and what it got.
func runAnswer(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("answer: %d arguments", len(args))
	}
	conn, err := net.ListenPacket("udp", args[0])
	if err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		reply := fmt.Appendf(nil, "%s %s ", args[1], from)
		_, _ = conn.WriteTo(append(reply, buf[:n]...), from)
	}
}

// An answer is what runAnswer said: who it was and whom it saw.
type answer struct {
	server string
	seen   netip.Addr
	text   string
}

func parseAnswer(b []byte) (answer, error) {
	fields := strings.SplitN(string(b), " ", 3)
	if len(fields) != 3 {
		return answer{}, fmt.Errorf("answer %q", b)
	}
	from, err := netip.ParseAddrPort(fields[1])
	return answer{fields[0], from.Addr(), fields[2]}, err
}

// runAsk is the helper "ask": ADDRESS COUNT. It asks from as many sockets, one
// after the other, and prints for each who answered and whom that saw.
func runAsk(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("ask: %d arguments", len(args))
	}
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	for range count {
		a, err := askOnce(args[0])
		if err != nil {
			a.server = "nobody"
		}
		fmt.Fprintln(os.Stdout, a.server, a.seen)
	}
	return nil
}

func askOnce(address string) (answer, error) {
	conn, err := net.Dial("udp", address)
	if err != nil {
		return answer{}, err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("?")); err != nil {
		return answer{}, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return answer{}, err
	}
	buf := make([]byte, 2048)
	n, err := conn.Read(buf)
	if err != nil {
		return answer{}, err
	}
	return parseAnswer(buf[:n])
}

// asked are the answers to runAsk, counted by server and by address seen.
func (h *host) asked(t *testing.T, to netip.Addr, count int) (servers, seen map[string]int) {
	t.Helper()
	out := h.run(t, time.Minute, helper(t, "ask", netip.AddrPortFrom(to, serverPort).String(), strconv.Itoa(count))...)
	servers, seen = make(map[string]int), make(map[string]int)
	for line := range strings.Lines(out) {
		server, address, _ := strings.Cut(strings.TrimSpace(line), " ")
		servers[server]++
		seen[address]++
	}
	return servers, seen
}

// A pacing is what became of the datagrams of one flow.
type pacing struct {
	Sent, Answered   int
	Overtaken        int // answers that came after the answer to a later datagram
	Fastest, Slowest time.Duration
	Servers          map[string]int
}

// runPace is the helper "pace": ADDRESS COUNT GAP. It sends numbered datagrams
// from one socket and prints what became of them.
func runPace(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("pace: %d arguments", len(args))
	}
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	gap, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	conn, err := net.Dial("udp", args[0])
	if err != nil {
		return err
	}
	defer conn.Close()
	begin := time.Now()
	sender := make(chan error, 1)
	go func() {
		for n := range count {
			time.Sleep(time.Until(begin.Add(time.Duration(n) * gap)))
			// A refusal of an earlier one doesn't matter.
			_, _ = fmt.Fprintf(conn, "%d %d", n, time.Since(begin))
		}
		sender <- conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	}()
	p := pacing{Sent: count, Servers: make(map[string]int)}
	buf, highest := make([]byte, 2048), -1
	for {
		size, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			continue
		}
		a, err := parseAnswer(buf[:size])
		if err != nil {
			return err
		}
		var n int
		var sent time.Duration
		if _, err := fmt.Sscan(a.text, &n, &sent); err != nil {
			return err
		}
		took := time.Since(begin) - sent
		if p.Answered == 0 || took < p.Fastest {
			p.Fastest = took
		}
		p.Slowest = max(p.Slowest, took)
		p.Answered++
		p.Servers[a.server]++
		if n < highest {
			p.Overtaken++
		}
		highest = max(highest, n)
	}
	if err := <-sender; err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(p)
}

// paced runs runPace.
func (h *host) paced(t *testing.T, to netip.Addr, count int, gap time.Duration) pacing {
	t.Helper()
	out := h.run(t, time.Minute, helper(t, "pace", netip.AddrPortFrom(to, serverPort).String(), strconv.Itoa(count), gap.String())...)
	var p pacing
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatalf("pace: %v: %q", err, out)
	}
	return p
}
