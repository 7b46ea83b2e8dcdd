package session

import (
	"encoding/hex"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

// vectors reads testdata/vectors.txt: blocks of "name value" lines.
func vectors(t *testing.T) []map[string]string {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []map[string]string
	for block := range strings.SplitSeq(string(b), "\n\n") {
		v := map[string]string{}
		for line := range strings.Lines(block) {
			if k, x, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k != "#" {
				v[k] = x
			}
		}
		if len(v) > 0 {
			all = append(all, v)
		}
	}
	return all
}

func TestVectors(t *testing.T) {
	key := newKey(t)
	var messages, addresses int
	for _, v := range vectors(t) {
		num := func(name string) uint32 {
			n, err := strconv.ParseUint(v[name], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			return uint32(n)
		}
		bin := func(name string) []byte {
			b, err := hex.DecodeString(v[name])
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		if v["inner6"] != "" {
			in := NewInner(PublicKey(bin("cluster")))
			if a := in.IPv6(num("client")).As16(); string(a[:]) != string(bin("inner6")) {
				t.Errorf("inner address %x, want %s", a, v["inner6"])
			}
			addresses++
			continue
		}
		var root [32]byte
		for i := range root {
			root[i] = byte(i)
		}
		now := start.Add(time.Duration(num("epoch")) * DefaultEpoch)
		c := newCluster(key, start, DefaultEpoch, 0, root, now)
		e := c.set.Load().accept[1]
		if string(e.secret[:]) != string(bin("epoch-secret")) {
			t.Errorf("epoch secret %x, want %s", e.secret, v["epoch-secret"])
		}
		if s := sessionSecret(e.secret, num("client"), num("salt")); string(s[:]) != string(bin("session-secret")) {
			t.Errorf("session secret %x, want %s", s, v["session-secret"])
		}
		m := bin("message")
		h := header(t, m)
		if id := encryptID(e.id, num("client"), num("salt")); id != h.SessionID {
			t.Errorf("session id %x, want %x", id, h.SessionID)
		}
		secret := sessionSecret(e.secret, num("client"), num("salt"))
		dir, allow := toServer, onlyClient
		if h.Sender != wire.ClientSender {
			dir, allow = toClient, onlyServer
		}
		aead, err := newAEAD(cipherOf(num("salt")), secret, dir)
		if err != nil {
			t.Fatal(err)
		}
		b := message(bin("plaintext"))
		s := &Sealer{aead: aead, header: h}
		s.counter.Store(h.Counter - 1)
		s.Seal([][]byte{b})
		if string(b) != string(m) {
			t.Errorf("message\n%x, want\n%x", b, m)
		}
		if p, err := newOpener(aead, allow).Open(m, h); err != nil || string(p) != string(bin("plaintext")) {
			t.Errorf("opened %q, %v", p, err)
		}
		messages++
	}
	if messages != 4 || addresses != 1 {
		t.Errorf("read %d messages and %d addresses", messages, addresses)
	}
}
