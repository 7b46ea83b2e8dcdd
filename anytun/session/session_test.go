package session

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newTestCluster(t testing.TB) *Cluster {
	t.Helper()
	c, err := NewCluster(start)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// reopen is another server with the same key file.
func reopen(t testing.TB, c *Cluster, now time.Time) *Cluster {
	t.Helper()
	d, err := ParseCluster(c.Marshal(), now)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newKey(t testing.TB) PrivateKey {
	t.Helper()
	k, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func grantFor(client uint32) wire.Grant {
	return wire.Grant{Client: client, Server: 1, KeepAlive: 20, MTU: 1400, FirstPort: 1024, LastPort: 65535}
}

// establish runs a whole handshake with the cluster.
func establish(t testing.TB, c *Cluster, key PrivateKey, o wire.Offer, client uint32, now time.Time) *Granted {
	t.Helper()
	i, err := NewInitiator(c.Public(), key, o, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	m, err := wire.ParseInitiation(i.Message())
	if err != nil {
		t.Fatal(err)
	}
	if !c.Verifier().MAC1(m) {
		t.Fatal("mac1 is wrong")
	}
	a, err := c.Accept(m)
	if err != nil {
		t.Fatal(err)
	}
	if a.Client != key.Public() {
		t.Fatalf("client is %v", a.Client)
	}
	r, err := a.Respond(grantFor(client), o.FastAES, now)
	if err != nil {
		t.Fatal(err)
	}
	if len(r) > len(i.Message()) {
		t.Errorf("a response of %d bytes amplifies", len(r))
	}
	g, err := i.Finish(r, now)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

var bothCiphers = wire.Offer{Ciphers: 3, FastAES: true}

func message(packet []byte) []byte {
	b := make([]byte, wire.Overhead+len(packet))
	copy(b[wire.DataHeaderLen:], packet)
	return b
}

func sealed(s *Sealer, packet string) []byte {
	b := message([]byte(packet))
	s.Seal([][]byte{b})
	return b
}

func header(t testing.TB, b []byte) wire.DataHeader {
	t.Helper()
	h, err := wire.ParseData(b)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Any server of the cluster opens packets of a session whose handshake it never
// saw, and answers.
func TestAnyServerOpens(t *testing.T) {
	for _, o := range []wire.Offer{bothCiphers, {Ciphers: 3}, {Ciphers: 1}, {Ciphers: 2, FastAES: true}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			one := newTestCluster(t)
			g := establish(t, one, newKey(t), o, 4711, start)
			two := reopen(t, one, start.Add(time.Hour))
			for n, c := range []*Cluster{one, two} {
				b := sealed(g.Sealer, "to a server")
				h := header(t, b)
				if id, err := c.Identify(h); err != nil || id != 4711 {
					t.Fatalf("client %d, %v", id, err)
				}
				s, err := c.Session(h, uint16(n+1), start.Add(time.Hour))
				if err != nil {
					t.Fatal(err)
				}
				if p, err := s.Open(b, h); err != nil || string(p) != "to a server" {
					t.Fatalf("%q, %v", p, err)
				}
				r := sealed(s.Sealer, "to the client")
				if p, err := g.Open(r, header(t, r)); err != nil || string(p) != "to the client" {
					t.Fatalf("%q, %v", p, err)
				}
			}
			want := wire.AES128GCM
			if o.Ciphers&2 != 0 && (o.Ciphers&1 == 0 || !o.FastAES) {
				want = wire.ChaCha20Poly1305
			}
			if g.Grant.Cipher != want {
				t.Errorf("cipher %v, want %v", g.Grant.Cipher, want)
			}
		})
	}
	if _, err := chooseCipher(wire.Offer{Ciphers: 4}, true); !errors.Is(err, ErrCipher) {
		t.Errorf("no common cipher: %v", err)
	}
}

func TestForgedAndReplayed(t *testing.T) {
	c := newTestCluster(t)
	g := establish(t, c, newKey(t), bothCiphers, 1, start)
	first := sealed(g.Sealer, "one")
	s, err := c.Session(header(t, first), 1, start)
	if err != nil {
		t.Fatal(err)
	}
	// Every byte of a message is authenticated.
	for i := range first {
		b := bytes.Clone(first)
		b[i] ^= 0x40
		h, err := wire.ParseData(b)
		if err != nil {
			continue // the type
		}
		if _, err := s.Open(b, h); err == nil {
			t.Fatalf("byte %d changed, still accepted", i)
		}
	}
	again := bytes.Clone(first)
	if _, err := s.Open(first, header(t, first)); err != nil {
		t.Fatalf("forgeries left a trace: %v", err)
	}
	if _, err := s.Open(again, header(t, again)); !errors.Is(err, ErrReplay) {
		t.Fatalf("replay: %v", err)
	}
	// A packet of the server sent back to it: another sender, another key.
	r := sealed(s.Sealer, "mine")
	if _, err := s.Open(r, header(t, r)); !errors.Is(err, ErrSender) {
		t.Fatalf("reflected: %v", err)
	}
	// A client's packet sent back to the client.
	b := sealed(g.Sealer, "mine")
	if _, err := g.Open(b, header(t, b)); !errors.Is(err, ErrSender) {
		t.Fatalf("reflected: %v", err)
	}
}

func TestCountersAndNonces(t *testing.T) {
	c := newTestCluster(t)
	g := establish(t, c, newKey(t), bothCiphers, 1, start)
	batch := [][]byte{message([]byte("a")), message([]byte("b")), message([]byte("c"))}
	g.Seal(batch)
	want := uint64(start.UnixNano())
	for i, b := range batch {
		if got := header(t, b).Counter; got != want+uint64(i)+1 {
			t.Errorf("counter %d of %d", got-want, i)
		}
	}
	if n := g.Used(g.Made); n != 3 {
		t.Errorf("%d used", n)
	}
	var n [12]byte
	putNonce(&n, 0x0102, 0x030405060708090a)
	if n != [12]byte{1, 2, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10} {
		t.Errorf("nonce %x", n)
	}
	// A server that starts again goes on above what it used.
	h := header(t, batch[0])
	s1, _ := c.Session(h, 7, start.Add(time.Second))
	last := header(t, sealed(s1.Sealer, "x")).Counter
	s2, _ := c.Session(h, 7, start.Add(2*time.Second))
	if next := header(t, sealed(s2.Sealer, "x")).Counter; next <= last {
		t.Errorf("counter %d after %d", next, last)
	}
}

// Server numbers keep replay windows apart, and forgetting one for lack of room
// doesn't open it to replays.
func TestReplayWindowPerSender(t *testing.T) {
	c := newTestCluster(t)
	g := establish(t, c, newKey(t), bothCiphers, 1, start)
	h := header(t, sealed(g.Sealer, "x"))
	var kept [][]byte
	for n := range maxSenders + 10 {
		s, err := c.Session(h, uint16(n+1), start)
		if err != nil {
			t.Fatal(err)
		}
		b := sealed(s.Sealer, "x")
		kept = append(kept, bytes.Clone(b))
		if n >= maxSenders {
			continue // same counters as the others: refused once windows are evicted, below
		}
		if _, err := g.Open(b, header(t, b)); err != nil {
			t.Fatalf("server %d: %v", n+1, err)
		}
	}
	for n, b := range kept[:maxSenders] {
		if _, err := g.Open(bytes.Clone(b), header(t, b)); !errors.Is(err, ErrReplay) {
			t.Fatalf("replay of server %d: %v", n+1, err)
		}
	}
	late, _ := c.Session(h, 999, start.Add(time.Second))
	b := sealed(late.Sealer, "x")
	if _, err := g.Open(b, header(t, b)); err != nil {
		t.Fatalf("new server: %v", err)
	}
	for n, b := range kept[:maxSenders] { // one of them has lost its window
		if _, err := g.Open(bytes.Clone(b), header(t, b)); !errors.Is(err, ErrReplay) {
			t.Fatalf("replay of server %d after eviction: %v", n+1, err)
		}
	}
}

func TestNote(t *testing.T) {
	c := newTestCluster(t)
	g := establish(t, c, newKey(t), bothCiphers, 1, start)
	b := sealed(g.Sealer, "x")
	h := header(t, b)
	s, _ := c.Session(h, 1, start)
	if !s.Note(h) || s.Note(h) {
		t.Fatal("a packet is new once")
	}
	if _, err := s.Open(b, h); !errors.Is(err, ErrReplay) {
		t.Fatalf("noted packet: %v", err)
	}
}

// twin is the slow, obvious replay window.
type twin struct {
	top  uint64
	seen map[uint64]bool
}

func (w *twin) accept(c uint64) bool {
	if w.seen[c] || w.top >= WindowLen && c <= w.top-WindowLen {
		return false
	}
	w.seen[c] = true
	w.top = max(w.top, c)
	return true
}

func TestWindowAgainstTwin(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		var w Window
		slow := twin{seen: map[uint64]bool{}}
		base := r.Uint64N(1 << 62)
		if seed%4 == 0 {
			base = 0
		}
		at := base + 1
		for n := range 60000 {
			var c uint64
			switch r.IntN(12) {
			case 0:
				c = at + r.Uint64N(3*WindowLen)
			case 1, 2, 3:
				c = at - min(at, r.Uint64N(2*WindowLen))
			case 4:
				c = at - min(at, WindowLen-2+r.Uint64N(4)) // the edge
			default:
				c = at + 1
			}
			c = max(c, base+1)
			at = max(at, c)
			want := slow.accept(c)
			got := w.Fresh(c)
			if got {
				w.Mark(c)
			}
			if got != want {
				t.Fatalf("seed %d, step %d: counter %d (top-%d) fresh=%v, want %v", seed, n, c, w.top-c, got, want)
			}
		}
	}
}

func TestEpochs(t *testing.T) {
	c := newTestCluster(t)
	g := establish(t, c, newKey(t), bothCiphers, 5, start)
	open := func(c *Cluster) error {
		b := sealed(g.Sealer, "x")
		s, err := c.Session(header(t, b), 1, start)
		if err != nil {
			return err
		}
		_, err = s.Open(b, header(t, b))
		return err
	}
	if got, want := time.Duration(g.Lifetime)*time.Second, 2*DefaultEpoch; got > want || got < want-time.Minute {
		t.Errorf("lifetime %v", got)
	}
	old := c.Marshal()
	if c.Advance(start.Add(DefaultEpoch - time.Second)) {
		t.Error("a secret was erased within the first epoch")
	}
	if e := c.Epoch(); e != 0 {
		t.Errorf("epoch %d", e)
	}
	if c.Advance(start.Add(DefaultEpoch)) || c.Epoch() != 1 {
		t.Errorf("epoch %d, or a secret lost its overlap", c.Epoch())
	}
	if err := open(c); err != nil {
		t.Errorf("overlap: %v", err)
	}
	if !bytes.Equal(old, c.Marshal()) {
		t.Error("the key file changed within the overlap")
	}
	if !c.Advance(start.Add(2*DefaultEpoch)) || c.Epoch() != 2 {
		t.Errorf("epoch %d, or the secret was kept", c.Epoch())
	}
	if err := open(c); !errors.Is(err, ErrEpoch) {
		t.Errorf("after the overlap: %v", err)
	}
	if c.Advance(start) || c.Epoch() != 2 {
		t.Error("a clock that goes back must change nothing")
	}
	// What is on disk now can't open old traffic, even with the clock set back.
	if err := open(reopen(t, c, start)); !errors.Is(err, ErrEpoch) {
		t.Errorf("from the new key file: %v", err)
	}
	// A server with an old key file ratchets to the same secrets.
	late, err := ParseCluster(old, start.Add(2*DefaultEpoch))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(late.Marshal(), c.Marshal()) {
		t.Error("two ways to epoch 2 differ")
	}
	// A server whose clock is behind accepts sessions of the next epoch.
	g2 := establish(t, c, newKey(t), bothCiphers, 6, start.Add(2*DefaultEpoch))
	behind := reopen(t, c, start.Add(2*DefaultEpoch-time.Minute))
	b := sealed(g2.Sealer, "x")
	if s, err := behind.Session(header(t, b), 1, start); err != nil {
		t.Errorf("clock behind: %v", err)
	} else if _, err := s.Open(b, header(t, b)); err != nil {
		t.Errorf("clock behind: %v", err)
	}
	if !behind.Valid(1) || !behind.Valid(2) || behind.Valid(5) {
		t.Error("valid epochs are wrong")
	}
}

func TestSessionIDs(t *testing.T) {
	c := newTestCluster(t)
	e := &c.set.Load().accept[1]
	seen := map[uint64]bool{}
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		client, salt := r.Uint32(), r.Uint32()
		id := encryptID(e.id, client, salt)
		if a, b := decryptID(e.id, id); a != client || b != salt {
			t.Fatalf("(%d, %d) came back as (%d, %d)", client, salt, a, b)
		}
		seen[id] = true
	}
	if len(seen) != 2000 {
		t.Errorf("%d distinct ids of 2000", len(seen))
	}
	// One changed bit of the salt changes about half of the id's bits: sessions
	// of one client can't be told from those of two.
	var flipped int
	for i := range 32 {
		x := encryptID(e.id, 7, 0) ^ encryptID(e.id, 7, 1<<i)
		for ; x != 0; x &= x - 1 {
			flipped++
		}
	}
	if avg := float64(flipped) / 32; avg < 24 || avg > 40 {
		t.Errorf("%.1f of 64 bits change", avg)
	}
}

func TestStrangersAndCookies(t *testing.T) {
	c := newTestCluster(t)
	key := newKey(t)
	v := c.Verifier()
	from := netip.MustParseAddrPort("192.0.2.1:1000")

	stranger, err := NewInitiator(newKey(t).Public(), key, bothCiphers, nil, start)
	if err != nil {
		t.Fatal(err)
	}
	m, _ := wire.ParseInitiation(stranger.Message())
	if v.MAC1(m) {
		t.Error("mac1 of another key is accepted")
	}
	if _, err := c.Accept(m); !errors.Is(err, ErrHandshake) {
		t.Errorf("handshake with another key: %v", err)
	}

	i, err := NewInitiator(c.Public(), key, bothCiphers, nil, start)
	if err != nil {
		t.Fatal(err)
	}
	m, _ = wire.ParseInitiation(i.Message())
	if v.MAC2(m, from, start) {
		t.Error("mac2 without a cookie is accepted")
	}
	b, err := v.AppendCookie(nil, m, from, start)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(b)
	bad[len(bad)-1] ^= 1
	if _, err := i.Cookie(bad, start); !errors.Is(err, ErrHandshake) {
		t.Errorf("forged cookie: %v", err)
	}
	cookie, err := i.Cookie(b, start)
	if err != nil {
		t.Fatal(err)
	}
	m, _ = wire.ParseInitiation(i.Message())
	other := reopen(t, c, start).Verifier()
	for name, v := range map[string]*Verifier{"the server": v, "another server": other} {
		if !v.MAC2(m, from, start.Add(time.Minute)) {
			t.Errorf("%s refuses the cookie", name)
		}
		if v.MAC2(m, netip.MustParseAddrPort("192.0.2.1:1001"), start) {
			t.Errorf("%s accepts the cookie from another port", name)
		}
		if v.MAC2(m, from, start.Add(3*cookieSlot)) {
			t.Errorf("%s accepts an old cookie", name)
		}
	}
	if _, err := c.Accept(m); err != nil {
		t.Errorf("initiation with a cookie: %v", err)
	}
	// The cookie serves the next attempt, but not another cluster.
	next, _ := NewInitiator(c.Public(), key, bothCiphers, cookie, start.Add(time.Second))
	if m, _ := wire.ParseInitiation(next.Message()); !v.MAC2(m, from, start.Add(time.Second)) {
		t.Error("the cookie doesn't serve the next attempt")
	}
	foreign, _ := NewInitiator(newKey(t).Public(), key, bothCiphers, cookie, start)
	if m, _ := wire.ParseInitiation(foreign.Message()); !bytes.Equal(m.MAC2, make([]byte, wire.MACLen)) {
		t.Error("a cookie was shown to another cluster")
	}
}

// A response that was tampered with, or that answers another attempt, leaves
// the attempt able to take the right one.
func TestFinishRefusesForeign(t *testing.T) {
	c := newTestCluster(t)
	key := newKey(t)
	i, _ := NewInitiator(c.Public(), key, bothCiphers, nil, start)
	m, _ := wire.ParseInitiation(i.Message())
	a, err := c.Accept(m)
	if err != nil {
		t.Fatal(err)
	}
	r, err := a.Respond(grantFor(1), true, start)
	if err != nil {
		t.Fatal(err)
	}
	j, _ := NewInitiator(c.Public(), key, bothCiphers, nil, start)
	if _, err := j.Finish(r, start); !errors.Is(err, ErrExchange) {
		t.Errorf("another attempt: %v", err)
	}
	bad := bytes.Clone(r)
	bad[len(bad)-1] ^= 1
	if _, err := i.Finish(bad, start); !errors.Is(err, ErrHandshake) {
		t.Errorf("tampered: %v", err)
	}
	g, err := i.Finish(r, start)
	if err != nil {
		t.Fatalf("after a tampered one: %v", err)
	}
	if g.Secret != [32]byte{} {
		t.Error("the session secret outlives its use")
	}
}

func TestBucket(t *testing.T) {
	var b Bucket
	now := start
	for n := range 5 {
		if !b.Take(now, 2, 5) {
			t.Fatalf("burst ends after %d", n)
		}
	}
	if b.Take(now, 2, 5) {
		t.Error("a sixth token")
	}
	if now = now.Add(500 * time.Millisecond); !b.Take(now, 2, 5) || b.Take(now, 2, 5) {
		t.Error("half a second gives one token")
	}
	if b.Full(now, 2, 5) || !b.Full(now.Add(3*time.Second), 2, 5) {
		t.Error("full at the wrong time")
	}
}

func TestInnerAddresses(t *testing.T) {
	in := NewInner(newKey(t).Public())
	if a := in.IPv4(0); a != netip.MustParseAddr("100.64.0.0") {
		t.Errorf("gateway %v", a)
	}
	if a := in.IPv4(258); a != netip.MustParseAddr("100.64.1.2") {
		t.Errorf("client 258 %v", a)
	}
	for _, n := range []uint32{0, 1, 255, 65536, MaxClient} {
		for _, a := range []netip.Addr{in.IPv4(n), in.IPv6(n)} {
			if got, ok := in.Client(a); !ok || got != n {
				t.Errorf("%v is client %d, %v; want %d", a, got, ok, n)
			}
			if p := in.Prefixes(); !p[0].Contains(a) && !p[1].Contains(a) {
				t.Errorf("%v lies outside %v", a, p)
			}
		}
		if !in.IPv6(n).IsPrivate() {
			t.Errorf("%v is no ULA", in.IPv6(n))
		}
	}
	for _, s := range []string{"100.63.255.255", "100.128.0.0", "10.0.0.1", "fd00::1", "2001:db8::1"} {
		if n, ok := in.Client(netip.MustParseAddr(s)); ok {
			t.Errorf("%s is client %d", s, n)
		}
	}
	if _, ok := in.Client(in.IPv6(3).Next()); ok {
		t.Error("host ::2 is nobody's")
	}
}

func TestKeysDontPrint(t *testing.T) {
	k := newKey(t)
	for _, f := range []string{"%v", "%s", "%x", "%d", "%#v", "%+v", "%q"} {
		if s := fmt.Sprintf(f, k); s != "redacted" {
			t.Errorf("%s prints %q", f, s)
		}
		if s := fmt.Sprintf(f, struct{ K PrivateKey }{k}); !strings.Contains(s, "redacted") {
			t.Errorf("%s of a struct prints %q", f, s)
		}
	}
	if got, err := ParsePrivateKey(k.Text()); err != nil || got != k {
		t.Errorf("text doesn't come back: %v", err)
	}
	for _, bad := range []string{"", "abc", k.Text()[:40], k.Text() + "AAAA", strings.Repeat("!", 44)} {
		if _, err := ParsePublicKey(bad); !errors.Is(err, ErrKey) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestInvite(t *testing.T) {
	in := Invite{Address: "[2001:db8::1]:4444", ServerKey: newKey(t).Public(), Key: newKey(t), Name: "my laptop"}
	got, err := ParseInvite(in.String())
	if err != nil || got != in {
		t.Fatalf("%+v, %v", got, err)
	}
	if strings.Contains(in.Redacted(), "secret") {
		t.Error("the redacted form has the secret")
	}
	for _, bad := range []string{
		"", "http://h:1?key=x", "anytun://h", "anytun://h:0?key=" + in.ServerKey.String(), "anytun://h:1", "anytun://h:1?key=short",
		strings.Replace(in.String(), "anytun://", "anytun://user@", 1), in.String() + "&colour=red", in.String() + "#x",
		strings.Replace(in.String(), "?", "/path?", 1), "anytun:h:1",
	} {
		if _, err := ParseInvite(bad); !errors.Is(err, ErrInvite) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestClusterFile(t *testing.T) {
	c := newTestCluster(t)
	text := string(c.Marshal())
	if d := reopen(t, c, start); d.Public() != c.Public() || string(d.Marshal()) != text {
		t.Error("the file doesn't come back")
	}
	for name, spoil := range map[string]func(string) string{
		"empty":        func(string) string { return "" },
		"unknown name": func(s string) string { return s + "colour = red\n" },
		"twice":        func(s string) string { return s + "epoch = 3\n" },
		"no value":     func(s string) string { return strings.Replace(s, "epoch = 0", "epoch =", 1) },
		"missing":      func(s string) string { return strings.Replace(s, "epoch = 0\n", "", 1) },
		"bad number":   func(s string) string { return strings.Replace(s, "epoch = 0", "epoch = -1", 1) },
		"bad length":   func(s string) string { return strings.Replace(s, "24h0m0s", "1s", 1) },
		"bad secret":   func(s string) string { return strings.Replace(s, "secret = ", "secret = A", 1) },
		"bad origin":   func(s string) string { return strings.Replace(s, "2026-03", "2026-13", 1) },
		"other key": func(s string) string {
			return strings.Replace(s, c.Public().String(), PublicKey{9}.String(), 1)
		},
		"ages ago": func(s string) string {
			return strings.Replace(strings.Replace(s, "2026-03-01", "0001-01-01", 1), "24h0m0s", "1m0s", 1)
		},
	} {
		if _, err := ParseCluster([]byte(spoil(text)), start); !errors.Is(err, ErrClusterKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSealOpenAllocateNothing(t *testing.T) {
	for _, o := range []wire.Offer{bothCiphers, {Ciphers: 2}} {
		c := newTestCluster(t)
		g := establish(t, c, newKey(t), o, 1, start)
		batch := make([][]byte, 32)
		for i := range batch {
			batch[i] = message(make([]byte, 1400))
		}
		g.Seal(batch)
		s, _ := c.Session(header(t, batch[0]), 1, start)
		if n := testing.AllocsPerRun(50, func() {
			g.Seal(batch)
			for _, b := range batch {
				h, _ := wire.ParseData(b)
				if _, err := s.Open(b, h); err != nil {
					t.Fatal(err)
				}
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations for a batch", g.Grant.Cipher, n)
		}
	}
}

func FuzzClusterFile(f *testing.F) {
	c := newTestCluster(f)
	f.Add(c.Marshal())
	f.Add([]byte("epoch = 1\nsecret"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseCluster(b, start)
		if err != nil {
			return
		}
		d, err := ParseCluster(c.Marshal(), start)
		if err != nil || !bytes.Equal(d.Marshal(), c.Marshal()) {
			t.Errorf("%q: the file doesn't come back: %v", b, err)
		}
	})
}

func FuzzInvite(f *testing.F) {
	f.Add("anytun://h:1?key=" + PublicKey{1}.String())
	f.Add(Invite{Address: "h:1", ServerKey: PublicKey{1}, Key: PrivateKey{2}, Name: "n"}.String())
	f.Fuzz(func(t *testing.T, s string) {
		in, err := ParseInvite(s)
		if err != nil {
			return
		}
		if again, err := ParseInvite(in.String()); err != nil || again != in {
			t.Errorf("%q became %q: %v", s, in.String(), err)
		}
	})
}

// FuzzServerInput is what a stranger can send to a server: it never opens.
func FuzzServerInput(f *testing.F) {
	c := newTestCluster(f)
	g := establish(f, c, newKey(f), bothCiphers, 1, start)
	f.Add(sealed(g.Sealer, "packet")[:40])
	i, _ := NewInitiator(c.Public(), newKey(f), bothCiphers, nil, start)
	bad := bytes.Clone(i.Message())
	bad[100] ^= 1
	f.Add(bad)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := wire.ParseData(b); err == nil {
			s, err := c.Session(h, 1, start)
			if err != nil {
				return
			}
			if _, err := s.Open(b, h); err == nil {
				t.Errorf("%x opened", b)
			}
		}
		if m, err := wire.ParseInitiation(b); err == nil {
			if c.Verifier().MAC1(m) {
				return // made by us: a seed
			}
			if _, err := c.Accept(m); err == nil {
				t.Errorf("%x accepted", b)
			}
		}
	})
}

func BenchmarkSeal(b *testing.B) { benchmarkCrypto(b, false) }
func BenchmarkOpen(b *testing.B) { benchmarkCrypto(b, true) }

func benchmarkCrypto(b *testing.B, open bool) {
	for _, o := range []wire.Offer{{Ciphers: 1, FastAES: true}, {Ciphers: 2}} {
		c := newTestCluster(b)
		g := establish(b, c, newKey(b), o, 1, start)
		buf := message(make([]byte, 1400))
		g.Seal([][]byte{buf})
		s, err := c.Session(header(b, buf), 1, start)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(g.Grant.Cipher.String(), func(b *testing.B) {
			b.SetBytes(1400)
			b.ReportAllocs()
			list := [][]byte{buf}
			for b.Loop() {
				g.Seal(list)
				if open {
					h, _ := wire.ParseData(buf)
					if _, err := s.Open(buf, h); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func TestRaise(t *testing.T) {
	o := newOpener(nil, onlyClient)
	h := wire.DataHeader{Counter: 3 * WindowLen}
	o.Raise(h.Counter)
	for _, c := range []struct {
		counter uint64
		fresh   bool
	}{{2 * WindowLen, false}, {2*WindowLen - 1, false}, {2*WindowLen + 1, true}, {4 * WindowLen, true}} {
		if got := o.fresh(nil, c.counter); got != c.fresh {
			t.Errorf("counter %d: fresh %v", c.counter, got)
		}
	}
	// What is below stays old although the sender's own window would reach there.
	h.Counter = 2*WindowLen + 1
	if !o.Note(h) {
		t.Fatal("a fresh counter was refused")
	}
	for _, c := range []uint64{WindowLen + 5, 2 * WindowLen, h.Counter} {
		if o.Note(wire.DataHeader{Counter: c}) {
			t.Errorf("counter %d was taken", c)
		}
	}
	o.Raise(5) // never back
	if o.fresh(nil, 2*WindowLen) {
		t.Error("a lower word made old counters fresh")
	}
}
