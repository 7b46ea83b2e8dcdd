package proxy

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

func hash(t testing.TB, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

func authFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAuth(t *testing.T) {
	file := authFile(t, "# people\n\nbob:"+hash(t, "builder")+"\n  carol:"+strings.Replace(hash(t, "singer"), "$2a$", "$2y$", 1)+"\r\n")
	a, err := NewAuth([]string{"alice:open:sesame"}, file)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time from what is remembered
		for _, tt := range []struct {
			user, password string
			want           bool
		}{
			{"alice", "open:sesame", true},
			{"alice", "open", false},
			{"alice", "", false},
			{"bob", "builder", true},
			{"bob", "Builder", false},
			{"bob", "builder ", false},
			{"carol", "singer", true},
			{"dave", "builder", false},
			{"", "", false},
			{"bobb", "uilder", false},
		} {
			if got := a.Verify(t.Context(), tt.user, tt.password); got != tt.want {
				t.Errorf("%s with %q: %v, want %v", tt.user, tt.password, got, tt.want)
			}
		}
	}
}

// TestAuthRemembers proves that a hash is computed once: afterwards a verification works with none to be had.
func TestAuthRemembers(t *testing.T) {
	a, err := NewAuth(nil, authFile(t, "bob:"+hash(t, "builder")))
	if err != nil {
		t.Fatal(err)
	}
	if !a.Verify(t.Context(), "bob", "builder") {
		t.Fatal("bob may not")
	}
	for range cap(a.bcrypts) {
		a.bcrypts <- struct{}{}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if !a.Verify(ended, "bob", "builder") {
		t.Error("it was not remembered")
	}
	if a.Verify(ended, "bob", "other") {
		t.Error("another password was taken for it")
	}
}

func TestAuthReload(t *testing.T) {
	path := authFile(t, "bob:"+hash(t, "builder"))
	a, err := NewAuth(nil, path)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Verify(t.Context(), "bob", "builder") {
		t.Fatal("bob may not")
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("bob:" + hash(t, "changed"))
	if err := a.Reload(); err != nil {
		t.Fatal(err)
	}
	if a.Verify(t.Context(), "bob", "builder") || !a.Verify(t.Context(), "bob", "changed") {
		t.Error("the new file does not count")
	}
	write("nonsense")
	if err := a.Reload(); err == nil {
		t.Error("nonsense was read")
	}
	if !a.Verify(t.Context(), "bob", "changed") {
		t.Error("after a failed Reload the users have changed")
	}
}

func TestAuthErrors(t *testing.T) {
	good := hash(t, "x")
	for _, tt := range []struct{ pair, file, want string }{
		{"", "", "neither"},
		{"alice", "", "user:password"},
		{":secretword", "", "user:password"},
		{"alice:", "", "user:password"},
		{"alice:" + strings.Repeat("x", 256), "", "user:password"},
		{"", "bob", "line 1: write user:bcrypt-hash"},
		{"", "#\nbob:secretword", "line 2: not a bcrypt hash"},
		{"", "bob:$apr1$x$y", "not a bcrypt hash"},
		{"", "bob:" + good + "x", "not a bcrypt hash"},
		{"", ":" + good, "user:bcrypt-hash"},
		{"", "bob:" + strings.Replace(good, "$04$", "$17$", 1), "cost 17"},
		{"", "bob:" + good + "\nbob:" + good, "line 2: this user"},
		{"", "# nobody\n", "no user"},
		{"", strings.Repeat("# long\n", 200_000), "longer than"},
		{"", strings.Repeat("x", 100_000), "too long"},
	} {
		var pairs []string
		if tt.pair != "" {
			pairs = []string{tt.pair}
		}
		file := ""
		if tt.file != "" {
			file = authFile(t, tt.file)
		}
		_, err := NewAuth(pairs, file)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q %.20q: %v, want %q", tt.pair, tt.file, err, tt.want)
		} else if strings.Contains(err.Error(), "secretword") {
			t.Errorf("the error has the password in it: %v", err)
		}
	}
	if _, err := NewAuth(nil, filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a missing file is no error")
	}
}

// FuzzAuthFile: what is accepted has users with hashes that bcrypt understands; nothing panics.
func FuzzAuthFile(f *testing.F) {
	good := hash(f, "x")
	for _, seed := range []string{
		"", "#", "bob", "bob:", ":", "bob:" + good, "bob:" + good + "\n#\n\namy:" + good, "bob:$2", "bob:$2a$99$" + good[7:],
		"\x00:\xff", strings.Repeat("a", 70_000),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		table := authTable{users: map[string]*credential{}}
		if table.parse(strings.NewReader(string(text))) != nil {
			return
		}
		if len(table.users) == 0 || table.dummy == nil {
			t.Error("accepted without a user")
		}
		for name, c := range table.users {
			if cost, err := bcrypt.Cost(c.hash); err != nil || cost > maxBcryptCost || name == "" {
				t.Errorf("accepted %q with cost %d, %v", name, cost, err)
			}
		}
	})
}
