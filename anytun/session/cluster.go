package session

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

// DefaultEpoch is how long one epoch's secret makes new sessions.
const DefaultEpoch = 24 * time.Hour

// ErrClusterKey says that a text isn't a cluster's key file.
var ErrClusterKey = errors.New("not a cluster key file")

// Cluster is what all servers of a cluster have in common: the static key pair
// and the secrets of the epochs that are in use (PROTOCOL.md 3.1). Safe for
// concurrent use.
type Cluster struct {
	key    PrivateKey
	public PublicKey
	origin time.Time // start of epoch 0
	length time.Duration

	mu  sync.Mutex // serialises Advance
	set atomic.Pointer[epochSet]
}

// epoch is what one epoch's secret gives.
type epoch struct {
	number uint32
	secret [32]byte
	id     cipher.Block
	cookie [32]byte
}

// epochSet holds the epochs that packets are accepted for: the one before (the
// overlap), the current one, and the next, since another server's clock may be
// ahead.
type epochSet struct {
	root    epoch // the oldest secret that is still kept; the key file has this one
	accept  [3]epoch
	current uint32
}

func newEpoch(n uint32, secret [32]byte) epoch {
	b, err := aes.NewCipher(expand(secret[:], "session id", nil, 16))
	if err != nil {
		panic("session: internal error: " + err.Error()) // the key's length is right
	}
	return epoch{number: n, secret: secret, id: b, cookie: [32]byte(expand(secret[:], "cookie", nil, 32))}
}

// NewCluster makes the keys of a new cluster, whose first epoch starts at now.
func NewCluster(now time.Time) (*Cluster, error) {
	k, err := NewPrivateKey()
	if err != nil {
		return nil, err
	}
	var s [32]byte
	if _, err := rand.Read(s[:]); err != nil {
		return nil, fmt.Errorf("generate secret: %w", err)
	}
	return newCluster(k, now.UTC().Truncate(time.Second), DefaultEpoch, 0, s, now), nil
}

func newCluster(k PrivateKey, origin time.Time, length time.Duration, n uint32, secret [32]byte, now time.Time) *Cluster {
	c := &Cluster{key: k, public: k.Public(), origin: origin, length: length}
	c.set.Store(&epochSet{root: newEpoch(n, secret)})
	c.Advance(now)
	return c
}

// Public returns the key that clients pin.
func (c *Cluster) Public() PublicKey { return c.public }

// RegistryKey is the key with which servers of the cluster prove to each other
// what they say by the registry. It doesn't change with the epochs, as servers
// that start later must know it.
func (c *Cluster) RegistryKey() [32]byte {
	return [32]byte(expand(c.key[:], "registry", nil, 32))
}

// epochAt is the number of the epoch that now lies in; a clock before the
// origin counts as epoch 0.
func (c *Cluster) epochAt(now time.Time) uint32 {
	d := now.Sub(c.origin)
	if d < 0 {
		return 0
	}
	return uint32(d / c.length)
}

// Advance moves to the epoch of now and forgets secrets that have had their
// overlap. It says whether a secret was erased: then the key file should be
// written anew from Marshal. A clock that goes back changes nothing.
func (c *Cluster) Advance(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.set.Load()
	cur := max(c.epochAt(now), old.root.number)
	if cur < old.current || cur == old.current && old.accept[1].id != nil {
		return false
	}
	set := &epochSet{root: old.root, current: cur}
	for set.root.number+1 < cur {
		set.root = newEpoch(set.root.number+1, ratchet(set.root.secret))
	}
	e := set.root
	for {
		if e.number+1 >= cur && e.number <= cur+1 {
			set.accept[e.number+1-cur] = e
		}
		if e.number > cur {
			break
		}
		e = newEpoch(e.number+1, ratchet(e.secret))
	}
	c.set.Store(set)
	return set.root.number != old.root.number
}

// Epoch returns the number of the epoch in which new sessions are made.
func (c *Cluster) Epoch() uint32 { return c.set.Load().current }

func (s *epochSet) byLow(low byte) *epoch {
	for i := range s.accept {
		if e := &s.accept[i]; e.id != nil && byte(e.number) == low {
			return e
		}
	}
	return nil
}

// Session is the server's side of a session: which client it is, and its keys.
type Session struct {
	Client uint32
	Cipher wire.Cipher
	Epoch  uint32
	*Sealer
	*Opener
}

// Identify tells whose session a data header names, from the epoch secret
// alone. The answer isn't authenticated: any 8 bytes name some client.
func (c *Cluster) Identify(h wire.DataHeader) (client uint32, err error) {
	e := c.set.Load().byLow(h.Epoch)
	if e == nil {
		return 0, ErrEpoch
	}
	client, _ = decryptID(e.id, h.SessionID)
	return client, nil
}

// Session derives a session from the header of one of its packets, without
// having seen its handshake. server is the number of this server, the sender of
// what the session's Sealer makes.
func (c *Cluster) Session(h wire.DataHeader, server uint16, now time.Time) (*Session, error) {
	e := c.set.Load().byLow(h.Epoch)
	if e == nil {
		return nil, ErrEpoch
	}
	client, salt := decryptID(e.id, h.SessionID)
	ci := cipherOf(salt)
	secret := sessionSecret(e.secret, client, salt)
	in, err := newAEAD(ci, secret, toServer)
	if err != nil {
		return nil, err
	}
	out, err := newAEAD(ci, secret, toClient)
	if err != nil {
		return nil, err
	}
	oh := wire.DataHeader{Epoch: h.Epoch, Sender: server, SessionID: h.SessionID}
	return &Session{
		Client: client, Cipher: ci, Epoch: e.number,
		Sealer: newSealer(out, oh, now), Opener: newOpener(in, onlyClient),
	}, nil
}

// Valid says whether packets of epoch n are still accepted.
func (c *Cluster) Valid(n uint32) bool {
	s := c.set.Load()
	return n+1 >= s.current && n <= s.current+1
}

// newSession makes a session for a client and writes what the client needs to
// know of it to g.
func (c *Cluster) newSession(g *wire.Grant, now time.Time, salt uint32) {
	e := &c.set.Load().accept[1]
	salt &^= saltCipher
	if g.Cipher == wire.ChaCha20Poly1305 {
		salt |= saltCipher
	}
	g.Epoch = e.number
	g.SessionID = encryptID(e.id, g.Client, salt)
	g.Secret = sessionSecret(e.secret, g.Client, salt)
	end := c.origin.Add(time.Duration(e.number+2) * c.length)
	g.Lifetime = uint32(max(1, end.Sub(now)/time.Second))
	g.Time = uint64(now.UnixNano())
}

// Marshal returns the text of the cluster's key file. It holds the secret of
// the oldest epoch in use; older ones can't be computed from it.
func (c *Cluster) Marshal() []byte {
	r := c.set.Load().root
	var b bytes.Buffer
	fmt.Fprintln(&b, "# anytun cluster key. Keep it secret: whoever has it is a server of this cluster.")
	fmt.Fprintln(&b, "# All servers of the cluster have the same file, and rewrite it when an epoch ends.")
	fmt.Fprintf(&b, "public-key = %s\n", c.public)
	fmt.Fprintf(&b, "private-key = %s\n", c.key.Text())
	fmt.Fprintf(&b, "epoch-origin = %s\n", c.origin.Format(time.RFC3339))
	fmt.Fprintf(&b, "epoch-length = %s\n", c.length)
	fmt.Fprintf(&b, "epoch = %d\n", r.number)
	fmt.Fprintf(&b, "secret = %s\n", base64.StdEncoding.EncodeToString(r.secret[:]))
	return b.Bytes()
}

// minEpoch keeps a mistyped length from making servers ratchet without end.
const minEpoch = time.Minute

// ParseCluster reads a cluster's key file; now decides the current epoch.
func ParseCluster(text []byte, now time.Time) (*Cluster, error) {
	bad := func(format string, a ...any) (*Cluster, error) {
		return nil, fmt.Errorf("%w: "+format, append([]any{ErrClusterKey}, a...)...)
	}
	f := map[string]string{"public-key": "", "private-key": "", "epoch-origin": "", "epoch-length": "", "epoch": "", "secret": ""}
	sc := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		k, v = strings.TrimSpace(k), strings.TrimSpace(v)
		old, known := f[k]
		switch {
		case !ok || v == "":
			return bad("line %d isn't \"name = value\"", n)
		case !known:
			return bad("line %d: unknown name", n)
		case old != "":
			return bad("line %d: %s stands there twice", n, k)
		}
		f[k] = v
	}
	if err := sc.Err(); err != nil {
		return bad("%v", err)
	}
	for _, k := range []string{"private-key", "epoch-origin", "epoch-length", "epoch", "secret"} {
		if f[k] == "" {
			return bad("%s is missing", k)
		}
	}
	key, err := ParsePrivateKey(f["private-key"])
	if err != nil {
		return bad("private-key: %w", err)
	}
	if p := f["public-key"]; p != "" {
		if pub, err := ParsePublicKey(p); err != nil || pub != key.Public() {
			return bad("public-key doesn't belong to private-key")
		}
	}
	origin, err := time.Parse(time.RFC3339, f["epoch-origin"])
	if err != nil {
		return bad("epoch-origin: %w", err)
	}
	length, err := time.ParseDuration(f["epoch-length"])
	if err != nil || length < minEpoch {
		return bad("epoch-length must be a duration of at least %v", minEpoch)
	}
	number, err := strconv.ParseUint(f["epoch"], 10, 32)
	if err != nil {
		return bad("epoch must be a number")
	}
	s, err := base64.StdEncoding.DecodeString(f["secret"])
	if err != nil || len(s) != 32 {
		return bad("secret must be 32 bytes in base64")
	}
	if now.Sub(origin)/length > 1<<24+time.Duration(number) {
		return bad("epoch-origin is too long ago for this epoch-length")
	}
	return newCluster(key, origin, length, uint32(number), [32]byte(s), now), nil
}

// randomSalt draws the part of a session id that differs between a client's
// sessions.
func randomSalt() (uint32, error) {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("random salt: %w", err)
	}
	return binary.BigEndian.Uint32(b[:]), nil
}
