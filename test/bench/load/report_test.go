package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values map[int]float64
		want   string
	}{
		{nil, "–"},
		{map[int]float64{1: 5}, "5.00"},
		{map[int]float64{1: 9, 2: 1}, "5.00"},
		{map[int]float64{1: 9, 2: 1, 3: 3}, "3.00"},
	} {
		if got := number(medianOf(c.values)); got != c.want {
			t.Errorf("median of %v is %s, want %s", c.values, got, c.want)
		}
	}
}

func TestPercentile(t *testing.T) {
	ten := []float64{10, 9, 8, 7, 6, 5, 4, 3, 2, 1}
	for percent, want := range map[float64]float64{0: 1, 1: 1, 10: 1, 11: 2, 50: 5, 99: 10, 100: 10} {
		if got := percentile(ten, percent); got != want {
			t.Errorf("percentile %v is %v, want %v", percent, got, want)
		}
	}
	if got := percentile(nil, 50); !math.IsNaN(got) {
		t.Errorf("percentile of nothing is %v", got)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0.00", 0.123: "0.12", 1.005: "1.00", 12.34: "12.3", 999.4: "999", 1234.4: "1,234",
		1234567: "1,234,567", -1000: "-1,000", -123456: "-123,456", math.Inf(1): "–",
	} {
		if got := number(v); got != want {
			t.Errorf("%v is %s, want %s", v, got, want)
		}
	}
}

func TestRatioOf(t *testing.T) {
	// The ratio of the medians, 3/1, is another one: round 3 has no partner.
	values, to := map[int]float64{1: 1, 2: 3, 3: 100}, map[int]float64{1: 1, 2: 1, 4: 1}
	if got := ratioOf(values, to); got != 2 {
		t.Errorf("ratio %v, want 2", got)
	}
	if got := ratioOf(values, map[int]float64{1: 0}); !math.IsNaN(got) {
		t.Errorf("ratio to nothing is %v", got)
	}
}

// lines are results of two rounds, in which the machine was twice as fast in the
// second.
func lines(t *testing.T) results {
	t.Helper()
	var all results
	add := func(class, name, mode, path, test string, f figures) {
		for round := 1; round <= 2; round++ {
			scaled := make(figures)
			for k, v := range f {
				scaled[k] = v
				if k == figMBps {
					scaled[k] = v * float64(round)
				}
			}
			all = append(all, record{Class: class, Name: name, Mode: mode, Path: path, Test: test, Round: round, Figures: scaled})
		}
	}
	add(classPeer, "slow", "super", "", "down1", figures{figMBps: 100, figClientCPU: 4, figServerCPU: 1})
	add(classPeer, "fast", "super", "", "down1", figures{figMBps: 200, figClientCPU: 3, figServerCPU: 2})
	add(classRelay, "relay", "super", "", "down1", figures{figMBps: 900, figServerCPU: 0.5})
	add(classRaw, "raw", "super", "", "down1", figures{figMBps: 1000})
	add(classOurs, "anytun", "super", "", "down1", figures{figMBps: 400, figClientCPU: 1, figServerCPU: 1})
	add(classOurs, "anytun", "super", "", "keep1", figures{figP50: 50})
	add(classPeer, "fast", "super", "", "keep1", figures{figP50: 100})
	add(classVariant, "anytun-sprayed", "super", "", "down1", figures{figMBps: 300})
	add(classOurs, "anytun", "super", "slow path", "down1", figures{figMBps: 70})
	add(classRaw, "raw", "super", "slow path", "down1", figures{figMBps: 140})
	add(classOurs, "anytun", "super", "", "open10", figures{figMBps: 400, figClientCPU: 1, figServerCPU: 1})
	add(classOurs, "anytun", "super", "", "open10000", figures{figMBps: 300, figClientCPU: 1.5, figServerCPU: 1})
	all = append(all, record{Class: classPeer, Name: "slow", Mode: "super", Test: "keep1", Round: 2, Error: "no\nanswer"})
	return all
}

func TestReport(t *testing.T) {
	const want = `**Super-packets of up to 64 KiB cross the virtual wires**

| | 1 ↓ MB/s | CPU s/GB 1 ↓ client, server | GET p50 µs |
|---|---:|---:|---:|
| raw | 1,500 | – | – |
| anytun | 600 | 1.00, 1.00 | 50.0 |
| anytun-sprayed | 450 | – | – |
| slow | 150 | 4.00, 1.00 | – |
| fast | 300 | 3.00, 2.00 | 100 |
| relay | 1,350 | –, 0.50 | – |
| *best peer* | fast | fast, slow | fast |
| *anytun ÷ raw* | 0.40 | – | – |
| *anytun ÷ best peer* | 2.00 | 0.33, 1.00 | 0.50 |

Medians of 2 rounds. ÷: the median of the ratios within each round; in the columns of CPU, GET and memory less is better.

**Super-packets of up to 64 KiB cross the virtual wires, slow path**

| | 1 ↓ MB/s |
|---|---:|
| raw | 210 |
| anytun | 105 |
| *anytun ÷ raw* | 0.50 |

Medians of 2 rounds. ÷: the median of the ratios within each round.

**Two servers, each packet to a random one: MB/s with one, with two: ratio**

| | 1 ↓ | 1 ↑ | 8 ↓ | 8 ↑ |
|---|---:|---:|---:|---:|
| super | 600, 450: 0.75 | – | – | – |

**8 streams ↓ among 10 open connections, among 10,000: ratio**

| | | MB/s | client CPU s/GB | server CPU s/GB |
|---|---|---:|---:|---:|
| anytun | super | 600, 450: 0.75 | 1.00, 1.50: 1.50 | 1.00, 1.00: 1.00 |

- slow, Super-packets of up to 64 KiB cross the virtual wires, round 2, keep1: no; answer

`
	var b strings.Builder
	lines(t).report(&b)
	if got := b.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestReadRecords(t *testing.T) {
	var text strings.Builder
	all := lines(t)
	for _, r := range all {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(append(b, '\n'))
	}
	got, err := readRecords(strings.NewReader(text.String()))
	if err != nil || len(got) != len(all) || got[0].Figures[figMBps] != 100 || got[len(got)-1].Error != "no\nanswer" {
		t.Errorf("%d of %d records, %v", len(got), len(all), err)
	}
	if _, err := readRecords(strings.NewReader(text.String()[:text.Len()/2])); err == nil {
		t.Error("half a line passes")
	}
}
