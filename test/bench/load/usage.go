package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of /proc/*/stat, USER_HZ, which is the same on every
// architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// processes are who is measured: sessions (setsid), so that the workers a
// program forks count as well.
type processes struct{ client, server []int }

// sessions reads a list of numbers with commas. Gaps are nothing.
func sessions(list string) ([]int, error) {
	var all []int
	for text := range strings.SplitSeq(list, ",") {
		if text == "" {
			continue
		}
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	return all, nil
}

// A usageAt is the time that was used up until some moment, usage that between
// two of them.
type usageAt struct {
	usage
	when time.Time
}

type usage struct {
	processes      processes     // whose time that was
	client, server time.Duration // CPU time
	busy, idle     time.Duration // of all CPUs of the machine
	wall           time.Duration
}

func (u usage) busyShare() float64 { return float64(u.busy) / float64(max(u.busy+u.idle, 1)) }

// addTo adds what a unit of work cost to figures, where there is somebody to pay.
func (u usage) addTo(f figures, client, server string, units float64) {
	f[figBusy] = u.busyShare()
	if len(u.processes.client) > 0 {
		f[client] = u.client.Seconds() / units
	}
	if len(u.processes.server) > 0 {
		f[server] = u.server.Seconds() / units
	}
}

func (u usageAt) since(v usageAt) usage {
	return usage{
		processes: u.processes, client: u.client - v.client, server: u.server - v.server,
		busy: u.busy - v.busy, idle: u.idle - v.idle, wall: u.when.Sub(v.when),
	}
}

// now is what was used up until now.
func (p processes) now() usageAt {
	u := usageAt{usage: usage{processes: p}, when: time.Now()}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is a good one
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		session, cpu := parseStat(string(b))
		if slices.Contains(p.client, session) {
			u.client += cpu
		}
		if slices.Contains(p.server, session) {
			u.server += cpu
		}
	}
	if b, err := os.ReadFile("/proc/stat"); err == nil {
		u.busy, u.idle = parseMachine(string(b))
	}
	return u
}

// parseStat reads session and CPU time out of /proc/PID/stat.
func parseStat(text string) (session int, cpu time.Duration) {
	// The program's name, in parentheses, may hold spaces and parentheses.
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(f) < 13 {
		return 0, 0
	}
	session, _ = strconv.Atoi(f[3])
	return session, ticks(f[11]) + ticks(f[12])
}

// parseMachine reads the first line of /proc/stat.
func parseMachine(text string) (busy, idle time.Duration) {
	line, _, _ := strings.Cut(text, "\n")
	f := strings.Fields(line)
	for i := 1; i < len(f) && i <= 8; i++ { // guest time, the ninth, is in user time already
		if i == 4 || i == 5 { // idle, waiting for disks
			idle += ticks(f[i])
		} else {
			busy += ticks(f[i])
		}
	}
	return busy, idle
}

// ticks reads a number of clock ticks. The kernel writes nothing but numbers.
func ticks(text string) time.Duration {
	n, _ := strconv.ParseInt(text, 10, 64)
	return time.Duration(n) * clockTick
}

// megabytes is the resident memory of the processes in sessions.
func megabytes(sessions []int) float64 {
	var kb float64
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is a good one
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		if session, _ := parseStat(string(b)); !slices.Contains(sessions, session) {
			continue
		}
		status, err := os.ReadFile(filepath.Join(filepath.Dir(name), "status"))
		if err != nil {
			continue
		}
		kb += residentKB(string(status))
	}
	return kb * 1024 / 1e6
}

// residentKB reads VmRSS out of /proc/PID/status.
func residentKB(status string) float64 {
	for line := range strings.Lines(status) {
		if text, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, _ := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(text), "kB")), 64)
			return kb
		}
	}
	return 0
}

// waitQuiet waits until the machine is less busy than share, and says for how
// many seconds; negative if it never was.
func waitQuiet(share float64, limit time.Duration) float64 {
	const look = 250 * time.Millisecond
	began := time.Now()
	for limit > 0 {
		before := processes{}.now()
		pause(look)
		waited := time.Since(began)
		if u := (processes{}).now().since(before); u.busyShare() < share {
			return waited.Seconds()
		}
		if waited > limit {
			return -waited.Seconds()
		}
	}
	return 0
}

// machine is one line about where this runs.
func machine() string {
	cpu, count := "unknown CPU", 0
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(line, ":")
			switch strings.TrimSpace(key) {
			case "model name":
				cpu = strings.TrimSpace(value)
			case "processor":
				count++
			}
		}
	}
	kernel := "unknown kernel"
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = "Linux " + strings.TrimSpace(string(b))
	}
	return fmt.Sprintf("%d × %s, %s", count, cpu, kernel)
}
