package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
)

func TestKeygen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cluster.key")
	r := command.Run(t, nil, "keygen", "--out", path)
	if r.Code != cmd.ExitDone || r.Errors != "" {
		t.Fatalf("exit code %d: %s", r.Code, r.Errors)
	}
	public, err := session.ParsePublicKey(r.Out)
	if err != nil {
		t.Fatalf("printed %q: %v", r.Out, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := session.ParseCluster(text, time.Now())
	if err != nil || cluster.Public() != public {
		t.Errorf("the file holds the key pair of %v, printed was %v; %v", cluster.Public(), public, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// inviteOf runs invite and returns the URL it printed.
func inviteOf(t *testing.T, dir string, args ...string) session.Invite {
	t.Helper()
	r := command.Run(t, nil, append([]string{"invite", "--state-dir", dir, "--address", "[2001:db8::1]:4444"}, args...)...)
	if r.Code != cmd.ExitDone {
		t.Fatalf("exit code %d: %s", r.Code, r.Errors)
	}
	url, ok := strings.CutSuffix(r.Out, "\n")
	if !ok || strings.Contains(url, "\n") {
		t.Fatalf("printed %q, want one line", r.Out)
	}
	in, err := session.ParseInvite(url)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func TestInvite(t *testing.T) {
	dir := files(t)
	clients := filepath.Join(dir, "clients.txt")
	if err := os.Remove(clients); err != nil {
		t.Fatal(err)
	}
	first := inviteOf(t, dir, "--name", "laptop")
	if info, err := os.Stat(clients); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// The administrator lets a group read the file, and forgets the last end of line.
	text, err := os.ReadFile(clients)
	if err != nil {
		t.Fatal(err)
	}
	write(t, clients, strings.TrimSpace(string(text)), 0o600)
	if err := os.Chmod(clients, 0o640); err != nil {
		t.Fatal(err)
	}
	second := inviteOf(t, dir, "--name", "phone")
	own, err := session.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	third := inviteOf(t, dir, "--name", "tablet", "--public-key", own.Public().String())
	if third.Key != (session.PrivateKey{}) {
		t.Error("the invite of a client with its own key holds a secret")
	}
	if first.Address != "[2001:db8::1]:4444" || first.Name != "laptop" {
		t.Errorf("invite for %q at %q", first.Name, first.Address)
	}
	list, err := server.LoadClients(clients)
	want := []server.Enrolment{
		{Key: first.Key.Public(), Name: "laptop", Number: 1},
		{Key: second.Key.Public(), Name: "phone", Number: 2},
		{Key: own.Public(), Name: "tablet", Number: 3},
	}
	if err != nil || !slices.Equal(list, want) {
		t.Errorf("got %v, %v\nwant %v", list, err, want)
	}
	text, err = os.ReadFile(clients)
	if err != nil || strings.Contains(string(text), first.Key.Text()) {
		t.Errorf("the clients file holds a secret: %s, %v", text, err)
	}
	if info, err := os.Stat(clients); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the mode became %v, %v", info.Mode(), err)
	}
	r := command.Run(t, nil, "invite", "--state-dir", dir, "--address", "gw:4444", "--name", "tablet2", "--public-key", own.Public().String())
	r.CheckError(t, "anytun-server", cmd.ExitUsage, "has this key already, for tablet", "another key")
}

func TestConcurrentInvites(t *testing.T) {
	dir := files(t)
	const n = 16
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { inviteOf(t, dir, "--name", "client"+string(rune('a'+i))) })
	}
	wg.Wait()
	list, err := server.LoadClients(filepath.Join(dir, "clients.txt"))
	if err != nil || len(list) != n+1 {
		t.Fatalf("%d clients, %v; want %d", len(list), err, n+1)
	}
	for i, e := range list {
		if e.Number != uint32(i+1) {
			t.Errorf("line %d has number %d", i+1, e.Number)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("files are left behind: %v, %v", entries, err)
	}
}
