package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
)

// small is a world that takes a fraction of a second, with many failures.
func small() config {
	c := defaults()
	c.Servers, c.Clients, c.Peers, c.Day = 30, 2000, 500, 2*time.Hour
	c.FailEvery = 10 * time.Minute
	return c
}

func simulate(t *testing.T, c config) *world {
	t.Helper()
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	w, err := newWorld(c)
	if err != nil {
		t.Fatal(err)
	}
	w.run()
	return w
}

func text(w *world) string {
	var b bytes.Buffer
	w.report(&b)
	return b.String()
}

func TestSameSeed(t *testing.T) {
	c := small()
	c.Partition = 10 * time.Minute
	first := text(simulate(t, c))
	if again := text(simulate(t, c)); again != first {
		t.Errorf("two runs of one seed differ:\n%s\n%s", first, again)
	}
	c.Seed++
	if text(simulate(t, c)) == first {
		t.Error("another seed makes no difference")
	}
}

// TestNothingBreaks is what the design promises: a server knows what it has to,
// so flows wait for routes at the most, while those of a design that keeps them
// at one server break.
func TestNothingBreaks(t *testing.T) {
	w := simulate(t, small())
	if w.stats.misrouted != 0 {
		t.Errorf("%d return packets for a wrong client", w.stats.misrouted)
	}
	if w.stats.failures < 10 {
		t.Fatalf("only %d sites failed", w.stats.failures)
	}
	for i := range w.stats.causes {
		o, why := &w.stats.causes[i], cause(i)
		switch why {
		case causeSite, causeReturn:
			if o.stalled == 0 {
				t.Errorf("%s: nobody noticed", causeNames[why])
			}
			if o.hard != 0 {
				t.Errorf("%s: %d flows waited for more than %v", causeNames[why], o.hard, linuxPatience)
			}
		case causeAddress:
			// Until the next keep-alive, and then the peer's timer.
			if p99 := o.quantile(0.99); p99 > 2*w.KeepAlive {
				t.Errorf("%s: one in a hundred stood still for %v", causeNames[why], p99)
			}
			fallthrough
		default:
			if o.broken != 0 {
				t.Errorf("%s: %d flows broken, one stood still for %v", causeNames[why], o.broken, o.longest)
			}
		}
	}
	for _, why := range []cause{causeFlip, causeSite, causeAddress} {
		if w.stats.causes[why].conventional == 0 {
			t.Errorf("%s: the conventional design broke nothing", causeNames[why])
		}
	}
	if total := w.total(); total.conventional < 50*total.broken {
		t.Errorf("%d flows broken, %d conventionally", total.broken, total.conventional)
	}
}

// TestOnlyRoutes says that what does break waits for routes: without networks
// that need minutes for that there is nothing.
func TestOnlyRoutes(t *testing.T) {
	c := small()
	c.Slow, c.Converge = 0, time.Second
	w := simulate(t, c)
	if total := w.total(); total.broken != 0 || total.stalled == 0 {
		t.Errorf("%d flows broken, %d stood still", total.broken, total.stalled)
	}
}

// TestPartition has the registry in parts. A server that goes on believing what
// it was told breaks far fewer flows than one that forgets it.
func TestPartition(t *testing.T) {
	c := small()
	c.Partition = 10 * time.Minute
	c.Forget, c.OldSession = 3*seenInterval, 2*time.Minute
	forgets := simulate(t, c).stats.causes[causeCut].broken
	c.Groups = 0
	if n := simulate(t, c).stats.causes[causeCut].broken; n > forgets/4 {
		t.Errorf("%d flows broken where every server is alone, which forgets nobody", n)
	}
	c.Groups, c.Forget = 2, time.Hour
	believes := simulate(t, c).stats.causes[causeCut].broken
	c.OldSession = time.Hour
	opens := simulate(t, c).stats.causes[causeCut].broken
	if forgets < 1000 || believes > forgets/4 || believes == 0 || opens != 0 {
		t.Errorf("broken: %d if servers forget, %d if not, %d if clients open old sessions", forgets, believes, opens)
	}
}

// TestNothingPerFlow has five times as many flows: not one byte more.
func TestNothingPerFlow(t *testing.T) {
	c := small()
	few := simulate(t, c)
	c.Flows = 5
	many := simulate(t, c)
	if a, b := few.stats.hours[0].flows, many.stats.hours[0].flows; b < 4*a {
		t.Fatalf("%d flows, then %d", a, b)
	}
	if few.bus.sorts != many.bus.sorts {
		t.Errorf("bytes: %+v, then %+v", few.bus.sorts, many.bus.sorts)
	}
}

// TestTold compares what is published with what there is to publish.
func TestTold(t *testing.T) {
	w := simulate(t, small())
	// Every client that is there is heard every two minutes, some by two servers.
	once := w.onlineTime / seenInterval.Seconds()
	if n := float64(w.bus.sorts[sortSeen].records); n < 0.95*once || n > 1.1*once {
		t.Errorf("%.0f watermarks, want about %.0f", n, once)
	}
	// New addresses, new sessions, and goodbyes of half of those that came.
	rekeys := w.onlineTime / (rekeyAfter - rekeyJitter/2).Seconds()
	want := float64(w.stats.causes[causeAddress].events) + 1.5*float64(w.stats.causes[causeSession].events) + rekeys
	if n := float64(w.bus.sorts[sortLocation].records); n < 0.9*want || n > 1.1*want {
		t.Errorf("%.0f locations, want about %.0f", n, want)
	}
}

func TestLongKeepAlive(t *testing.T) {
	c := small()
	often := simulate(t, c)
	c.KeepAlive = time.Minute
	seldom := simulate(t, c)
	a, b := &often.stats.causes[causeAddress], &seldom.stats.causes[causeAddress]
	if b.events < 2*a.events || seldom.bus.sorts[sortLocation].bytes < 2*often.bus.sorts[sortLocation].bytes {
		t.Errorf("translators forgot %d, then %d times", a.events, b.events)
	}
}

// TestSizes compares with what a message is made of, and with registry's own
// reading of it.
func TestSizes(t *testing.T) {
	w := simulate(t, small())
	f := w.bus.sorts[sortLocation]
	if want := f.messages * (1 + registry.LocationSize + busNumber + registry.SealOverhead); f.bytes != want || f.messages == 0 {
		t.Errorf("%d locations have %d bytes, want %d", f.messages, f.bytes, want)
	}
	f = w.bus.sorts[sortSeen]
	want := f.messages*(1+busNumber+registry.SealOverhead) + f.records*registry.SeenSize
	if f.bytes != want || f.records < f.messages {
		t.Errorf("%d watermarks in %d messages have %d bytes, want %d", f.records, f.messages, f.bytes, want)
	}
	c := w.client(7)
	w.bus.location(w, c, w.now, false)
	var m registry.Message
	if err := m.Parse(w.bus.buf); err != nil || m.Records() != 1 || m.Locations[0].Client != c.number || m.Locations[0].Endpoint != endpointOf(c) {
		t.Errorf("parsed %+v, %v", m, err)
	}
	sealer, err := registry.NewSealer([]byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(sealer.Seal(nil, append(make([]byte, busNumber), w.bus.buf...), "", time.Now())); n != w.bus.size() {
		t.Errorf("sealed it has %d bytes, counted are %d", n, w.bus.size())
	}
}

// TestKnows is one client seen by three servers: news take their time, and what
// a dying server said last is lost until another one says it.
func TestKnows(t *testing.T) {
	c := small()
	w, err := newWorld(c)
	if err != nil {
		t.Fatal(err)
	}
	x := w.client(1)
	x.online, x.site, x.cut = true, 1, -never
	x.told = [4]version{{at: -time.Hour, seq: 1, endpoint: x.endpoint, session: x.session, by: 1}}
	w.now = time.Minute
	if at := w.knows(2, x, w.now); at != w.now {
		t.Errorf("an old location is known at %v", at)
	}
	x.endpoint++
	if at := w.knows(2, x, w.now); at != never {
		t.Errorf("what nobody told is known at %v", at)
	}
	if !w.hear(x, w.now) || w.hear(x, w.now) {
		t.Error("not told, or told twice")
	}
	if at := w.knows(1, x, w.now); at != w.now {
		t.Errorf("who heard it knows at %v", at)
	}
	if at := w.knows(2, x, w.now); at <= w.now || at > w.now+time.Second {
		t.Errorf("known elsewhere at %v", at-w.now)
	}
	x.told[0].lost = true
	if at := w.knows(2, x, w.now); at != never {
		t.Errorf("a lost location is known at %v", at)
	}
	x.site = 2
	if !w.hear(x, w.now) {
		t.Error("the next server doesn't tell")
	}
	if at := w.knows(3, x, w.now); at == never {
		t.Error("and nobody hears it")
	}
}

func TestRetransmitted(t *testing.T) {
	const trip = 100 * time.Millisecond
	for outage, want := range map[time.Duration]time.Duration{
		0:                      0,
		time.Millisecond:       300 * time.Millisecond,
		301 * time.Millisecond: 900 * time.Millisecond,
		10 * time.Second:       18900 * time.Millisecond,
	} {
		if got := retransmitted(outage, trip); got != want {
			t.Errorf("after %v: %v, want %v", outage, got, want)
		}
	}
}

func TestCommand(t *testing.T) {
	var b bytes.Buffer
	if err := run([]string{"-servers", "10", "-clients", "100", "-peers", "50", "-day", "10m", "-partition", "2m", "-own=false"}, &b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| all |", "B/s", "snapshots, after the partition"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
	for _, wrong := range [][]string{{"-servers", "1"}, {"-clients", "0"}, {"-flip-max", "1s"}, {"-nonsense"}} {
		if err := run(wrong, &b); err == nil {
			t.Errorf("%v was taken", wrong)
		}
	}
}
