package proxy

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/crypto/bcrypt"
)

const (
	// authFileBytes bounds the auth file: 10,000 users.
	authFileBytes = 1 << 20
	// maxBcryptCost keeps a mistyped hash from making each first login cost minutes: 16 takes seconds.
	maxBcryptCost = 16
	// maxFieldBytes is the longest user name or password RFC 1929 can carry.
	maxFieldBytes = 255
)

// Auth knows who may use the proxy: pairs given in the configuration, and the users of a file that can be read again.
// Safe for concurrent use.
//
// Passwords are compared in constant time, and an unknown user costs as much as a wrong password. A bcrypt hash is
// computed once per user and password: what has been verified is remembered as a keyed hash, under a key that this
// process made for itself, until the file is read again. At most one hash per CPU is computed at a time; who waits for
// that is bounded by the handshake's deadline.
type Auth struct {
	key       [32]byte
	pairs     []string
	file      string
	bcrypts   chan struct{}
	reloading sync.Mutex
	table     atomic.Pointer[authTable]
}

// authTable is never changed after it was made.
type authTable struct {
	users map[string]*credential
	dummy []byte // a bcrypt hash for unknown users; nil when no user has one
}

type credential struct {
	plain    *[sha256.Size]byte // of a pair: the keyed hash of user and password
	hash     []byte             // of a file: bcrypt
	verified atomic.Pointer[[sha256.Size]byte]
}

// NewAuth takes pairs "user:password" and the path of a file of lines "user:bcrypt-hash" (as made by htpasswd -nB),
// where empty lines and lines that begin with # are comments. Either may be missing, but not both. Of a user named
// twice, the pair counts.
func NewAuth(pairs []string, file string) (*Auth, error) {
	if len(pairs) == 0 && file == "" {
		return nil, errors.New("auth: neither a pair nor a file")
	}
	a := &Auth{pairs: pairs, file: file, bcrypts: make(chan struct{}, runtime.GOMAXPROCS(0))}
	if _, err := rand.Read(a.key[:]); err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	if err := a.Reload(); err != nil {
		return nil, err
	}
	return a, nil
}

// Reload reads the file again. On an error the users stay as they were.
func (a *Auth) Reload() error {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	t := &authTable{users: make(map[string]*credential)}
	if a.file != "" {
		f, err := os.Open(a.file)
		if err != nil {
			return fmt.Errorf("auth file: %w", err)
		}
		defer f.Close()
		if err := t.parse(f); err != nil {
			return fmt.Errorf("auth file %s: %w", a.file, err)
		}
	}
	for _, pair := range a.pairs {
		user, password, ok := strings.Cut(pair, ":")
		if !ok || user == "" || password == "" || len(user) > maxFieldBytes || len(password) > maxFieldBytes {
			// The pair itself stays out of the message: it holds a password.
			return errors.New("auth: write user:password, each of 1 to 255 bytes")
		}
		sum := a.mac(user, password)
		t.users[user] = &credential{plain: &sum}
	}
	a.table.Store(t)
	return nil
}

// parse reads an auth file.
func (t *authTable) parse(r io.Reader) error {
	sc := bufio.NewScanner(io.LimitReader(r, authFileBytes+1))
	total := 0
	for line := 1; sc.Scan(); line++ {
		total += len(sc.Bytes()) + 1
		if total > authFileBytes {
			return fmt.Errorf("longer than %d bytes", authFileBytes)
		}
		text := strings.TrimSpace(sc.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(text, ":")
		if !ok || user == "" || len(user) > maxFieldBytes {
			return fmt.Errorf("line %d: write user:bcrypt-hash", line)
		}
		cost, err := bcrypt.Cost([]byte(hash))
		if err != nil || !strings.HasPrefix(hash, "$2") || len(hash) != 60 {
			return fmt.Errorf("line %d: not a bcrypt hash; make one with htpasswd -nB USER", line)
		}
		if cost > maxBcryptCost {
			return fmt.Errorf("line %d: bcrypt cost %d is above %d", line, cost, maxBcryptCost)
		}
		if _, twice := t.users[user]; twice {
			return fmt.Errorf("line %d: this user has a line already", line)
		}
		t.users[user] = &credential{hash: []byte(hash)}
		if t.dummy == nil {
			t.dummy = []byte(hash)
		}
	}
	if err := sc.Err(); err != nil {
		return err
	}
	if len(t.users) == 0 {
		return errors.New("no user in it; write lines user:bcrypt-hash")
	}
	return nil
}

// Verify says whether the user may use the proxy. It gives up, with false, when ctx has ended.
func (a *Auth) Verify(ctx context.Context, user, password string) bool {
	t := a.table.Load()
	sum := a.mac(user, password)
	cred := t.users[user]
	if cred == nil || cred.plain != nil {
		if cred != nil && hmac.Equal(sum[:], cred.plain[:]) {
			return true
		}
		if t.dummy != nil {
			a.compare(ctx, t.dummy, password) // so that the time taken doesn't tell who exists
		}
		return false
	}
	if known := cred.verified.Load(); known != nil && hmac.Equal(sum[:], known[:]) {
		return true
	}
	if !a.compare(ctx, cred.hash, password) {
		return false
	}
	cred.verified.Store(&sum)
	return true
}

func (a *Auth) compare(ctx context.Context, hash []byte, password string) bool {
	select {
	case a.bcrypts <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-a.bcrypts }()
	return bcrypt.CompareHashAndPassword(hash, []byte(password)) == nil
}

// mac is the keyed hash of a user and a password. The length keeps ("a", "bc") and ("ab", "c") apart.
func (a *Auth) mac(user, password string) (sum [sha256.Size]byte) {
	h := hmac.New(sha256.New, a.key[:])
	_, _ = fmt.Fprintf(h, "%d:%s%s", len(user), user, password) // a hash takes everything
	h.Sum(sum[:0])
	return sum
}
