package nats

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/test/loopback"
)

func TestExternalKilled(t *testing.T) {
	t.Parallel()
	engine := helperConfig{Engine: loopback.Addr(t), StoreIn: t.TempDir()}
	c := Config{URL: "nats://" + engine.Engine, Secret: secret, Logger: testLogger(t)}
	// The servers are there before the engine is.
	a, b := start(t, 1, c, nil), start(t, 2, c, nil)
	if err := a.Ready(); !errors.Is(err, registry.ErrUnavailable) {
		t.Error("ready without an engine:", err)
	}
	if _, err := a.Bus.Claim(t.Context(), block(1, 1)); !errors.Is(err, registry.ErrUnavailable) {
		t.Error("claim without an engine:", err)
	}
	a.tell(1, 1)
	p := spawn(t, engine)
	together(t, a, b)
	eventually(t, "what was published before", func() bool { return b.at(1) == 1 })
	if _, err := claims(t, a, block(1, 1)); err != nil {
		t.Fatal(err)
	}

	p.kill()
	eventually(t, "the loss is noticed", func() bool { return a.Ready() != nil && b.Ready() != nil })
	begin := time.Now()
	for counter := range uint64(1000) {
		a.tell(2, counter+1)
		b.tell(3, counter+1)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Error("publishing waited:", took)
	}
	if n := a.Bus.Stats().Pending; n != 1 {
		t.Errorf("%d wait, want the newest alone", n)
	}
	spawn(t, engine)
	eventually(t, "the newest of both", func() bool { return b.at(2) == 1000 && a.at(3) == 1000 })
	if got, err := claims(t, b, block(1, 2)); !errors.Is(err, registry.ErrTaken) || got.Owner != 1 {
		t.Error("the engine's disk forgot:", got, err)
	}
	eventually(t, "both are told of the claim", func() bool { return a.owner("block.1") == 1 && b.owner("block.1") == 1 })
	if s := a.Bus.Stats(); s.Reconnects == 0 {
		t.Errorf("%+v", s)
	}
}

// The connection may break between looking at it and using it.
func TestRefused(t *testing.T) {
	t.Parallel()
	b, err := New(Config{URL: "nats://" + loopback.Addr(t), Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for client := range uint32(maxRecords + 1) {
		b.PublishLocation(location(client, 1, 1))
	}
	b.PublishSeen([]registry.Seen{{Client: 1, Counter: 1}})
	b.PublishMapping(registry.Mapping{Client: 1})
	s := sender{bus: b, subject: b.subject("bus")}
	s.publish()
	if n := b.Stats().Pending; n != maxRecords+3 || s.number != 0 {
		t.Errorf("%d wait, %d were sent", n, s.number)
	}
}

// Two servers want the same at the same moment: one gets it, and both know who.
func TestClaimRace(t *testing.T) {
	t.Parallel()
	c := Config{URL: inside(t), Secret: secret, Logger: testLogger(t)}
	nodes := []*node{start(t, 1, c, nil), start(t, 2, c, nil)}
	for i, n := range nodes { // both find the bucket
		if _, err := claims(t, n, block(100+uint32(i), 1)); err != nil {
			t.Fatal(err)
		}
	}
	kv, err := nodes[0].js.KeyValue(t.Context(), nodes[0].bucket)
	if err != nil {
		t.Fatal(err)
	}
	conclusive := 0 // a machine that is busy enough makes an engine seem gone
	for index := range uint32(50) {
		want := block(1+index, 0)
		if index >= 25 { // somebody had it before
			ended := want
			ended.Owner, ended.Until = 3, time.Now().Add(-time.Second)
			message := registry.Message{Type: registry.TypeClaim, Claims: []registry.Claim{ended}}
			key := claimKey(ended)
			if _, err := kv.Put(t.Context(), key, nodes[0].sealer.Seal(nil, message.Append(nil), key, time.Now())); err != nil {
				t.Fatal(err)
			}
		}
		var owners [2]uint32
		var errs [2]error
		var both sync.WaitGroup
		for i, n := range nodes {
			both.Go(func() {
				mine := want
				mine.Owner = uint32(i + 1)
				got, err := n.Bus.Claim(t.Context(), mine)
				owners[i], errs[i] = got.Owner, err
			})
		}
		both.Wait()
		if errors.Is(errs[0], registry.ErrUnavailable) || errors.Is(errs[1], registry.ErrUnavailable) {
			continue
		}
		conclusive++
		first, second := errs[0] == nil && errors.Is(errs[1], registry.ErrTaken), errs[1] == nil && errors.Is(errs[0], registry.ErrTaken)
		if owners[0] != owners[1] || first == second {
			t.Fatalf("claim %d: %v %v", index, owners, errs)
		}
	}
	if conclusive < 10 {
		t.Errorf("only %d of 50 claims were decided", conclusive)
	}
}

// stranger is somebody else on the bus, who has the engine's password but not the
// cluster's secret.
func stranger(t *testing.T, url string) *nats.Conn {
	t.Helper()
	conn, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	conn.SetClosedHandler(func(*nats.Conn) { close(closed) })
	t.Cleanup(func() { conn.Close(); <-closed })
	return conn
}

// inside runs an external engine within the test.
func inside(t testing.TB) (url string) {
	t.Helper()
	s, err := externalEngine("127.0.0.1:0", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	return s.ClientURL()
}

func TestForged(t *testing.T) {
	t.Parallel()
	c := Config{URL: inside(t), Secret: secret, Logger: testLogger(t)}
	a, b := startHello(t, 1, c, nil, 5*time.Second), startHello(t, 2, c, nil, 5*time.Second)
	together(t, a, b)
	conn := stranger(t, c.URL)
	record, err := conn.SubscribeSync(a.subject("bus"))
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	a.tell(1, 10)
	eventually(t, "the true one", func() bool { return b.at(1) == 10 })
	b.tell(1, 20)

	other, err := registry.NewSealer([]byte("guessed"))
	if err != nil {
		t.Fatal(err)
	}
	moved := registry.Message{Type: registry.TypeLocation, Locations: []registry.Location{location(1, 99, 1)}}
	frame := moved.Append(binary.BigEndian.AppendUint64(nil, 1<<40))
	subject := a.subject("bus")
	drops := func(why registry.Drop) uint64 { return b.Bus.Stats().Drops[why] }
	var forged uint64
	for name, m := range map[string]*nats.Msg{
		"nothing":          {Subject: subject},
		"plain":            {Subject: subject, Data: frame},
		"other secret":     {Subject: subject, Data: other.Seal(nil, frame, subject, time.Now())},
		"other subject":    {Subject: subject, Data: a.sealer.Seal(nil, frame, b.subject("bus"), time.Now())},
		"no peer":          {Subject: a.prefix + "bus.x", Data: a.sealer.Seal(nil, frame, a.prefix+"bus.x", time.Now())},
		"ask in the clear": {Subject: b.subject("ask"), Reply: "_INBOX.x", Data: []byte{byte(registry.TypeAsk)}},
	} {
		before := drops(registry.DropForged)
		if err := conn.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" is counted", func() bool { return drops(registry.DropForged) > before })
		forged++
	}
	if n := drops(registry.DropForged); n != forged {
		t.Errorf("%d of %d counted as forged", n, forged)
	}
	// Authentic, but recorded.
	msg, err := record.NextMsg(10 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Publish(subject, msg.Data); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the recorded one is counted", func() bool { return drops(registry.DropStale) == 1 })
	old := a.sealer.Seal(nil, frame, subject, time.Now().Add(-registry.Fresh-time.Minute))
	if err := conn.Publish(subject, old); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old one is counted", func() bool { return drops(registry.DropStale) == 2 })
	// Authentic, of a later version.
	later := a.sealer.Seal(nil, append(binary.BigEndian.AppendUint64(nil, 1<<40), 200), subject, time.Now())
	if err := conn.Publish(subject, later); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the unknown one is counted", func() bool { return drops(registry.DropMalformed) == 1 })
	if b.at(1) != 20 {
		t.Errorf("moved to %d", b.at(1))
	}
	// What the stranger sees isn't where clients are.
	if strings.Contains(string(msg.Data), string([]byte{192, 0, 2, 1})) {
		t.Error("an endpoint in the clear")
	}

	// Claims.
	if _, err := claims(t, a, block(4, 1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "told", func() bool { return b.owner("block.4") == 1 })
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), a.bucket)
	if err != nil {
		t.Fatal(err)
	}
	claim := registry.Message{Type: registry.TypeClaim, Claims: []registry.Claim{block(4, 66)}}
	elsewhere := registry.Message{Type: registry.TypeClaim, Claims: []registry.Claim{block(5, 66)}}
	for _, value := range [][]byte{
		claim.Append(nil), other.Seal(nil, claim.Append(nil), "block.4", time.Now()),
		a.sealer.Seal(nil, elsewhere.Append(nil), "block.5", time.Now()),
	} {
		before := drops(registry.DropForged)
		if _, err := kv.Put(t.Context(), "block.4", value); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a forged claim is counted", func() bool { return drops(registry.DropForged) > before })
	}
	if b.owner("block.4") != 1 {
		t.Error("told of a forged claim")
	}
	if got, err := claims(t, a, block(4, 1)); err != nil || got.Owner != 1 {
		t.Error("the owner can't write it again:", got, err)
	}
}

// A server that shows up with numbers missing is asked for what it heard itself,
// and one that nobody answers for is given up.
func TestGap(t *testing.T) {
	t.Parallel()
	c := Config{URL: inside(t), Secret: secret, Logger: testLogger(t)}
	a := startHello(t, 1, c, nil, time.Hour) // whoever says little isn't gone
	conn := stranger(t, c.URL)
	const id = 0xabc
	subject := a.peerSubject("bus", id)
	asks, err := conn.SubscribeSync(a.peerSubject("ask", id))
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	say := func(number uint64) {
		m := registry.Message{Type: registry.TypeHello, Hello: registry.Hello{Peer: id, Age: 100}}
		data := a.sealer.Seal(nil, m.Append(binary.BigEndian.AppendUint64(nil, number)), subject, time.Now())
		if err := conn.Publish(subject, data); err != nil {
			t.Fatal(err)
		}
	}
	answer := func(want registry.Type, client uint32) {
		t.Helper()
		ask, err := asks.NextMsg(20 * time.Second)
		if err != nil {
			t.Fatal("not asked:", err)
		}
		plain, _, err := a.sealer.Open(nil, ask.Data, askContext(ask.Subject, ask.Reply))
		if err != nil || len(plain) != 1 || registry.Type(plain[0]) != want {
			t.Fatalf("asked for %v, %v; want %v", plain, err, want)
		}
		for _, m := range []registry.Message{
			{Type: registry.TypeLocation, Locations: []registry.Location{location(client, 5, 9)}}, {Type: registry.TypeDone},
		} {
			// A forged step in between changes nothing.
			if err := conn.Publish(ask.Reply, []byte("forged")); err != nil {
				t.Fatal(err)
			}
			data := a.sealer.Seal(nil, m.Append(nil), ask.Reply, time.Now())
			if err := conn.PublishRequest(ask.Reply, conn.NewInbox(), data); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the answer is known", func() bool { return a.at(client) == 5 })
	}
	say(1)
	answer(registry.TypeAsk, 1) // the first other server knows all
	eventually(t, "the snapshot is whole", func() bool { return a.Bus.Stats().Snapshots == 1 })
	say(2)
	say(4)
	answer(registry.TypeAskOwn, 2)
	eventually(t, "the second is whole", func() bool { return a.Bus.Stats().Snapshots == 2 })
	say(5)
	say(4)
	eventually(t, "a number twice is counted", func() bool { return a.Bus.Stats().Drops[registry.DropStale] == 1 })
	if msg, err := asks.NextMsg(time.Millisecond); err == nil {
		t.Errorf("asked without a gap: %v", msg)
	}
}

// Neither a handler that hangs nor an engine that does stops publishers.
func TestNothingWaits(t *testing.T) {
	t.Parallel()
	c := Config{URL: inside(t), Secret: secret, Logger: testLogger(t)}
	slow := newMemory()
	slow.block = make(chan struct{})
	release := func() { close(slow.block) }
	a := start(t, 1, c, nil)
	b := start(t, 2, c, slow)
	together(t, a, b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range uint64(20_000) {
			a.PublishLocation(location(uint32(i), i, 1))
			b.PublishLocation(location(uint32(i), i, 2))
			if i%100 == 0 {
				a.PublishSeen([]registry.Seen{{Client: uint32(i), Counter: i}})
				a.PublishMapping(registry.Mapping{Client: uint32(i)})
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(45 * time.Second):
		t.Error("publishers wait")
	}
	release()
	a.tell(300_000, 7)
	eventually(t, "the newest", func() bool { return slow.at(300_000) == 7 })
}

func BenchmarkPublishLocation(b *testing.B) {
	c := Config{URL: inside(b), Secret: secret}
	sender, receiver := start(b, 1, c, nil), start(b, 2, c, nil)
	together(b, sender, receiver)
	counter := uint64(0)
	for b.Loop() {
		counter++
		sender.PublishLocation(location(uint32(counter%1000), counter, 1))
	}
	eventually(b, "the last one", func() bool { return receiver.at(uint32(counter%1000)) == counter })
	s := sender.Bus.Stats().Out[registry.TypeLocation]
	b.ReportMetric(float64(s.Bytes)/float64(s.Records), "B/record")
	b.ReportMetric(float64(s.Records)/float64(s.Messages), "records/message")
}

// BenchmarkStart is a server that starts beside one that knows 100,000 clients.
func BenchmarkStart(b *testing.B) {
	c := Config{URL: inside(b), Secret: secret}
	knowing := start(b, 1, c, nil)
	const clients = 100_000
	for client := range uint32(clients) {
		knowing.memory.Location(location(client, 1, 1))
	}
	for b.Loop() {
		n := start(b, 2, c, nil)
		eventually(b, "all clients", func() bool { return n.count() == clients })
		n.stop()
	}
	b.ReportMetric(clients, "clients")
}

// BenchmarkClaim is one by one, as servers do.
func BenchmarkClaim(b *testing.B) {
	c := Config{URL: inside(b), Secret: secret}
	n := start(b, 1, c, nil)
	if _, err := claims(b, n, block(0, 1)); err != nil {
		b.Fatal(err)
	}
	index := uint32(0)
	for b.Loop() {
		index++
		if _, err := n.Bus.Claim(b.Context(), block(index, 1)); err != nil {
			b.Fatal(fmt.Errorf("claim %d: %w", index, err))
		}
	}
}
