package main

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A column of the main table: one figure of one test, or two that are read
// together.
type column struct {
	head    string
	test    string
	figures []string
	lower   bool // less is better
}

var columns = []column{
	{"1 ↓ MB/s", "down1", []string{figMBps}, false},
	{"1 ↑", "up1", []string{figMBps}, false},
	{"8 ↓", "down8", []string{figMBps}, false},
	{"8 ↑", "up8", []string{figMBps}, false},
	{"64 ↓", "down64", []string{figMBps}, false},
	{"64 ↑", "up64", []string{figMBps}, false},
	{"CPU s/GB 1 ↓ client, server", "down1", []string{figClientCPU, figServerCPU}, true},
	{"1 ↑ client, server", "up1", []string{figClientCPU, figServerCPU}, true},
	{"conn/s ×32", "conn32", []string{figPerSecond}, false},
	{"GET p50 µs", "keep1", []string{figP50}, true},
	{"UDP echo ×64 /s", "echo64", []string{figPerSecond}, false},
	{"UDP 1200 B ↑ /s", "udpup1200", []string{figPerSecond}, false},
	{"UDP 1200 B ↓ /s", "udpdown1200", []string{figPerSecond}, false},
	{"client MB at 1,000", "mem", []string{figClientMB}, true},
	{"KB per further", "mem", []string{figClientKBEach}, true},
}

// reportMain prints tables out of the files it is given.
func reportMain(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("report", flag.ContinueOnError)
	if err := fs.Parse(args); err != nil {
		return err
	}
	var all results
	for i, name := range fs.Args() {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		records, err := readRecords(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, r := range records {
			r.Round += i << 16 // rounds of two files are different rounds
			all = append(all, r)
		}
	}
	if len(all) == 0 {
		return fmt.Errorf("no results")
	}
	var b strings.Builder
	all.report(&b)
	fmt.Fprintf(&b, "%s\n", machine())
	_, err := io.WriteString(out, b.String())
	return err
}

// results are the records of one report.
type results []record

// A section is what belongs into one table.
type section struct{ mode, path string }

func (s section) title() string {
	text := map[string]string{
		"super": "Super-packets of up to 64 KiB cross the virtual wires",
		"wire":  "Every packet on the virtual wires has the size of the MTU",
	}[s.mode]
	text = cmp.Or(text, s.mode)
	if s.path != "" {
		text += ", " + s.path
	}
	return text
}

// report prints everything there is.
func (all results) report(b *strings.Builder) {
	var sections []section
	for _, r := range all {
		if s := (section{r.Mode, r.Path}); !slices.Contains(sections, s) {
			sections = append(sections, s)
		}
	}
	// The table with most columns first, whatever was measured first.
	slices.SortStableFunc(sections, func(x, y section) int {
		return cmp.Or(cmp.Compare(len(x.path), len(y.path)), cmp.Compare(len(all.measured(y)), len(all.measured(x))))
	})
	for _, s := range sections {
		all.mainTable(b, s)
	}
	all.sprayTable(b)
	all.growthTable(b)
	all.errors(b)
}

// measured are the columns that have a value in a section.
func (all results) measured(s section) []column {
	return slices.DeleteFunc(slices.Clone(columns), func(c column) bool {
		return !slices.ContainsFunc(all, func(r record) bool {
			_, ok := r.Figures[c.figures[0]]
			if len(c.figures) > 1 && !ok {
				_, ok = r.Figures[c.figures[1]]
			}
			return ok && r.Mode == s.mode && r.Path == s.path && r.Test == c.test
		})
	})
}

// values are what a contestant reached in a test, by round.
func (all results) values(s section, name, test, figure string) map[int]float64 {
	v := make(map[int]float64)
	for _, r := range all {
		if r.Mode != s.mode || r.Path != s.path || r.Name != name || r.Test != test {
			continue
		}
		if f, ok := r.Figures[figure]; ok {
			v[r.Round] = f
		}
	}
	return v
}

func (all results) median(s section, name string, c column, figure string) float64 {
	return medianOf(all.values(s, name, c.test, figure))
}

// ratio is the median of the ratios within each round.
func (all results) ratio(s section, name, to, test, figure string) float64 {
	return ratioOf(all.values(s, name, test, figure), all.values(s, to, test, figure))
}

// ratioOf is the median of the ratios of those values that have a partner.
func ratioOf(values, to map[int]float64) float64 {
	ratios := make(map[int]float64)
	for round, v := range values {
		if w, ok := to[round]; ok && w != 0 {
			ratios[round] = v / w
		}
	}
	return medianOf(ratios)
}

// names are the contestants of a section in the order of their classes.
func (all results) names(s section, classes ...string) []string {
	var names []string
	for _, class := range classes {
		for _, r := range all {
			if r.Mode == s.mode && r.Path == s.path && r.Class == class && !slices.Contains(names, r.Name) {
				names = append(names, r.Name)
			}
		}
	}
	return names
}

// best is the peer with the best median.
func (all results) best(s section, c column, figure string) (name string) {
	best := math.NaN()
	for _, peer := range all.names(s, classPeer) {
		v := all.median(s, peer, c, figure)
		if !math.IsNaN(v) && (math.IsNaN(best) || (v < best) == c.lower) {
			name, best = peer, v
		}
	}
	return name
}

// mainTable prints medians, and the ratios of what is ours to raw and to the
// best peer of each column.
func (all results) mainTable(b *strings.Builder, s section) {
	cols := all.measured(s)
	if len(cols) == 0 {
		return
	}
	fmt.Fprintf(b, "**%s**\n\n|", s.title())
	for _, c := range cols {
		fmt.Fprintf(b, " | %s", c.head)
	}
	b.WriteString(" |\n|---|" + strings.Repeat("---:|", len(cols)) + "\n")
	row := func(name string, cell func(c column, figure string) string) {
		fmt.Fprintf(b, "| %s", name)
		for _, c := range cols {
			var cells []string
			for _, f := range c.figures {
				cells = append(cells, cell(c, f))
			}
			if text := strings.Join(cells, ", "); strings.Trim(text, "–, ") != "" {
				fmt.Fprintf(b, " | %s", text)
			} else {
				b.WriteString(" | –")
			}
		}
		b.WriteString(" |\n")
	}
	for _, name := range all.names(s, classes...) {
		row(name, func(c column, f string) string { return number(all.median(s, name, c, f)) })
	}
	peers := all.names(s, classPeer)
	if len(peers) > 0 {
		row("*best peer*", func(c column, f string) string { return cmp.Or(all.best(s, c, f), "–") })
	}
	for _, name := range all.names(s, classOurs) {
		for _, to := range all.names(s, classRaw, classVariant) {
			if to != twoServers {
				row("*"+name+" ÷ "+to+"*", func(c column, f string) string { return number(all.ratio(s, name, to, c.test, f)) })
			}
		}
		if len(peers) > 0 {
			row("*"+name+" ÷ best peer*", func(c column, f string) string {
				return number(all.ratio(s, name, all.best(s, c, f), c.test, f))
			})
		}
	}
	fmt.Fprintf(b, "\nMedians of %s. ÷: the median of the ratios within each round", plural(all.rounds(s), "round"))
	if slices.ContainsFunc(cols, func(c column) bool { return c.lower }) {
		b.WriteString("; in the columns of CPU, GET and memory less is better")
	}
	b.WriteString(".\n\n")
}

// rounds is how many values the medians of a section are of, at most.
func (all results) rounds(s section) int {
	cells := make(map[[2]string]int)
	most := 1
	for _, r := range all {
		if r.Mode == s.mode && r.Path == s.path && r.Error == "" {
			cells[[2]string{r.Name, r.Test}]++
			most = max(most, cells[[2]string{r.Name, r.Test}])
		}
	}
	return most
}

// plural is a number with its noun.
func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return strconv.Itoa(n) + " " + noun
}

// The contestants of sprayTable.
const (
	oneServer  = "anytun"
	twoServers = "anytun-sprayed"
)

// sprayTable prints what is left when each packet takes a random one of two
// servers.
func (all results) sprayTable(b *strings.Builder) {
	var lines []string
	for _, mode := range []string{"super", "wire"} {
		s := section{mode: mode}
		var cells []string
		any := false
		for _, test := range []string{"down1", "up1", "down8", "up8"} {
			one, two := medianOf(all.values(s, oneServer, test, figMBps)), medianOf(all.values(s, twoServers, test, figMBps))
			ratio := all.ratio(s, twoServers, oneServer, test, figMBps)
			if math.IsNaN(ratio) {
				cells = append(cells, "–")
				continue
			}
			any = true
			cells = append(cells, fmt.Sprintf("%s, %s: %s", number(one), number(two), number(ratio)))
		}
		if any {
			lines = append(lines, fmt.Sprintf("| %s | %s |\n", mode, strings.Join(cells, " | ")))
		}
	}
	if len(lines) == 0 {
		return
	}
	b.WriteString("**Two servers, each packet to a random one: MB/s with one, with two: ratio**\n\n" +
		"| | 1 ↓ | 1 ↑ | 8 ↓ | 8 ↑ |\n|---|---:|---:|---:|---:|\n" + strings.Join(lines, "") + "\n")
}

// growthTable prints what the same streams reach among few and among many open
// connections.
func (all results) growthTable(b *strings.Builder) {
	const few, many = "open10", "open10000"
	var lines []string
	for _, mode := range []string{"super", "wire"} {
		s := section{mode: mode, path: ""}
		for _, name := range all.names(s, classes...) {
			if len(all.values(s, name, few, figMBps)) == 0 {
				continue
			}
			line := fmt.Sprintf("| %s | %s", name, mode)
			for _, figure := range []string{figMBps, figClientCPU, figServerCPU} {
				a, b := all.values(s, name, few, figure), all.values(s, name, many, figure)
				line += fmt.Sprintf(" | %s, %s: %s", number(medianOf(a)), number(medianOf(b)), number(ratioOf(b, a)))
			}
			lines = append(lines, line+" |\n")
		}
	}
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "**%d streams ↓ among 10 open connections, among 10,000: ratio**\n\n", busyStreams)
	b.WriteString("| | | MB/s | client CPU s/GB | server CPU s/GB |\n|---|---|---:|---:|---:|\n" + strings.Join(lines, "") + "\n")
}

// errors prints what went wrong: a gap in a table has its reason here.
func (all results) errors(b *strings.Builder) {
	any := false
	for _, r := range all {
		if r.Error != "" {
			fmt.Fprintf(b, "- %s, %s, round %d, %s: %s\n", r.Name, section{r.Mode, r.Path}.title(), r.Round&0xffff, r.Test,
				strings.ReplaceAll(r.Error, "\n", "; "))
			any = true
		}
	}
	if any {
		b.WriteString("\n")
	}
}

// medianOf is the median of the values, NaN if there are none.
func medianOf(values map[int]float64) float64 {
	var sorted []float64
	for _, v := range values {
		sorted = append(sorted, v)
	}
	slices.Sort(sorted)
	n := len(sorted)
	if n == 0 {
		return math.NaN()
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// percentile is the smallest value that so many percent of them don't exceed,
// NaN if there are none. It sorts them.
func percentile(values []float64, percent float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	slices.Sort(values)
	i := int(math.Ceil(percent / 100 * float64(len(values))))
	return values[min(max(i, 1), len(values))-1]
}

// number prints three digits, or all before the point.
func number(v float64) string {
	digits := 2
	switch a := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case a >= 1000:
		return thousands(int(math.Round(v)))
	case a >= 100:
		digits = 0
	case a >= 10:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// thousands prints a number with a comma before every three digits.
func thousands(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
