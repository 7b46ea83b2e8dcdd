package main

import (
	"os"
	"reflect"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	// As Linux 6.18 writes it; the name is of a program that wants to be misread.
	const text = "4711 (a) S 99 (b)) S 1 4711 4700 0 -1 4194560 1500 0 3 0 250 31 0 0 20 0 8 0 55 1268158464 9000"
	if session, cpu := parseStat(text); session != 4700 || cpu != 2810*time.Millisecond {
		t.Errorf("session %d, %v; want 4700, 2.81s", session, cpu)
	}
	if session, cpu := parseStat("4711 (short) S 1"); session != 0 || cpu != 0 {
		t.Errorf("a short line is session %d, %v", session, cpu)
	}
}

func TestParseMachine(t *testing.T) {
	busy, idle := parseMachine("cpu  10 1 5 100 20 2 3 4 10 1\ncpu0 1 1 1 1\n")
	if busy != 250*time.Millisecond || idle != 1200*time.Millisecond {
		t.Errorf("busy %v, idle %v; want 250ms, 1.2s", busy, idle)
	}
	if share := (usage{busy: busy, idle: 3 * busy}).busyShare(); share != 0.25 {
		t.Errorf("share %v", share)
	}
}

func TestResidentKB(t *testing.T) {
	if kb := residentKB("Name:\tx\nVmHWM:\t   99999 kB\nVmRSS:\t   20488 kB\nRssAnon: 1 kB\n"); kb != 20488 {
		t.Errorf("%v kB", kb)
	}
}

func TestSessions(t *testing.T) {
	if got, err := sessions(",12,,345"); err != nil || !reflect.DeepEqual(got, []int{12, 345}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := sessions("12 345"); err == nil {
		t.Error("two numbers with a space are a number")
	}
}

// This process is in some session, has used time, and has memory.
func TestNow(t *testing.T) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Skip("no /proc:", err)
	}
	own, _ := parseStat(string(b))
	p := processes{client: []int{own}}
	before := p.now()
	for end := before.client + 2*clockTick; p.now().client < end; { // looking takes some
	}
	used := p.now().since(before)
	if used.client < 2*clockTick || used.server != 0 || used.busy+used.idle <= 0 {
		t.Errorf("used %+v", used)
	}
	if mb := megabytes(p.client); mb < 1 {
		t.Errorf("%v MB", mb)
	}
}
