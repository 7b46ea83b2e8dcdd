package main

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/cmd/cmdtest"
)

var command = cmdtest.Main(run)

func write(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func newKey(t *testing.T) session.PrivateKey {
	t.Helper()
	key, err := session.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// secretOf returns the secret in an invite, as it is written there.
func secretOf(t *testing.T, invite string) string {
	t.Helper()
	u, err := url.Parse(invite)
	if err != nil || u.Query().Get("secret") == "" {
		t.Fatalf("no secret in %s: %v", invite, err)
	}
	return u.Query().Get("secret")
}

func TestWrongUsage(t *testing.T) {
	invite := session.Invite{Address: "192.0.2.1:4444", ServerKey: newKey(t).Public(), Key: newKey(t), Name: "laptop"}
	serverKey := invite.ServerKey.String()
	full, bare := invite.String(), invite.Redacted()
	secret := secretOf(t, full)
	key := write(t, "client.key", string(formatKeyFile(newKey(t))), 0o600)
	open := write(t, "open.key", string(formatKeyFile(newKey(t))), 0o644)
	other := write(t, "other.key", "not a key\n", 0o600)
	two := write(t, "two.key", newKey(t).Text()+"\n"+newKey(t).Text()+"\n", 0o600)
	empty := write(t, "empty.key", "# nothing\n", 0o600)
	openInvite := write(t, "open.invite", full+"\n", 0o640)
	noInvite := write(t, "no.invite", "gw:4444\n", 0o600)
	users := write(t, "users", "alice\n", 0o600)
	config := write(t, "config.toml", "lisen = [\"127.0.0.1:1080\"]\n", 0o600)
	dir := t.TempDir()

	for _, test := range []struct {
		name string
		args []string
		says string
		hint string
	}{
		{"listen without port", []string{"--listen", "127.0.0.1"}, `--listen: "127.0.0.1" is not an address`, "127.0.0.1:1080"},
		{"listen with a large port", []string{"--listen", "127.0.0.1:65536"}, `"127.0.0.1:65536" is not an address`, "127.0.0.1:1080"},
		{"listen with a name", []string{"--listen", "gw:1080"}, `"gw" is not an address of this host in numbers`, "127.0.0.1:1080"},
		{"listen on a relative path", []string{"--listen", "unix://run/proxy"}, "does not begin with a slash", "unix:///path"},
		{"listen on standard input", []string{"--listen", "fd://0"}, `"fd://0" names no inherited socket`, "fd://3"},
		{"listen twice", []string{"--listen", "127.0.0.1:1080", "--listen", "127.0.0.1:1080"}, "stands there twice", "once"},
		{"server key alone", []string{"--server-key", serverKey}, "--server-key is of no use without --server", "--server HOST:PORT"},
		{"key alone", []string{"--key", key}, "--key is of no use without --server", "--server HOST:PORT"},
		{"server without port", []string{"--server", "gw"}, `"gw" is neither an anytun:// URL nor HOST:PORT`, "--server-key and --key"},
		{"server without server key", []string{"--server", "gw:4444", "--key", key}, "--server gw:4444 needs --server-key", "anytun-server keygen"},
		{"server without key", []string{"--server", "gw:4444", "--server-key", serverKey}, "--server gw:4444 needs --key", "made at the first start"},
		{"bad server key", []string{"--server", "gw:4444", "--server-key", "x", "--key", key}, "--server-key: a key is 32 bytes", "anytun-server keygen"},
		{"cut invite", []string{"--server", "anytun://192.0.2.1:4444"}, "--server: not an anytun:// URL", "whole line"},
		{"invite and server key", []string{"--server", full, "--server-key", serverKey}, "contradict each other", "leave --server-key out"},
		{"invite with secret and key", []string{"--server", full, "--key", key}, "contradict each other", "leave --key out"},
		{"invite without secret and no key", []string{"--server", bare}, "holds no secret, so --key is missing", "--key FILE"},
		{"missing invite file", []string{"--server", "@" + dir + "/none"}, "none: no such file", "check the path"},
		{"open invite file", []string{"--server", "@" + openInvite}, "can be read by others (mode 0640)", "chmod 600"},
		{"invite file without URL", []string{"--server", "@" + noInvite}, "no.invite holds no anytun:// URL", "anytun-server invite"},
		{"open key file", []string{"--server", bare, "--key", open}, "can be read by others (mode 0644)", "chmod 600 " + open},
		{"wrong key file", []string{"--server", bare, "--key", other}, "other.key: a key is 32 bytes", "anytun-proxy keygen"},
		{"two keys in the file", []string{"--server", bare, "--key", two}, "more than one line", "anytun-proxy keygen"},
		{"no key in the file", []string{"--server", bare, "--key", empty}, "no key in it", "anytun-proxy keygen"},
		{"key file that is a directory", []string{"--server", bare, "--key", dir}, "is not a file", "ordinary file"},
		{"resolver of another server", []string{"--server", full, "--dns", "192.0.2.53"}, "--server names another", "leave --dns out"},
		{"resolver", []string{"--dns", "dns.example.net"}, `--dns: "dns.example.net"`, "192.0.2.53"},
		{"password missing", []string{"--auth", "alice"}, "user:password", "--auth-file"},
		{"auth file missing", []string{"--auth-file", dir + "/none"}, "none: no such file", "--auth-file"},
		{"auth file broken", []string{"--auth-file", users}, "line 1", "htpasswd -nB"},
		{"mtu", []string{"--mtu", "9001"}, "--mtu: 9001 is out of range", "from 1280 to 9000"},
		{"keep-alive", []string{"--keep-alive", "11m"}, "--keep-alive: 11m0s is out of range", "from 1s to 10m0s"},
		{"connections", []string{"--max-connections", "0"}, "--max-connections: 0 is out of range", "from 1 to"},
		{"drain time", []string{"--drain-time", "2h"}, "--drain-time: 2h0m0s is out of range", "from 0s to 1h"},
		{"admin", []string{"--admin", "localhost"}, `--admin: "localhost" is not an address`, "host:port"},
		{"log format", []string{"--check", "--log-format", "xml"}, `"xml" is not a format`, "text or json"},
		{"configuration key", []string{"--config", config}, `unknown key "lisen"`, "did you mean listen?"},
		{"unknown command", []string{"stauts"}, `unknown command "stauts"`, "anytun-proxy status?"},
		{"unknown flag", []string{"--socks", "x"}, "unknown flag --socks", "anytun-proxy --help"},
		{"keygen over a file", []string{"keygen", "--out", key}, "client.key exists already", "another file with --out"},
		{"keygen nowhere", []string{"keygen", "--out", dir + "/no/dir"}, "write key file", "--out"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := command.Run(t, nil, test.args...)
			r.CheckError(t, "anytun-proxy", cmd.ExitUsage, test.says, test.hint)
			if strings.Contains(r.Errors, secret) {
				t.Errorf("the error repeats a secret: %s", r.Errors)
			}
		})
	}
}

func TestCheckHidesSecrets(t *testing.T) {
	invite := session.Invite{Address: "192.0.2.1:4444", ServerKey: newKey(t).Public(), Key: newKey(t), Name: "laptop"}
	env := map[string]string{"ANYTUN_SERVER": invite.String(), "ANYTUN_AUTH": "bob:swordfish"}
	secret := secretOf(t, invite.String())
	for _, args := range [][]string{
		{"--check", "--auth", "alice:sesame", "--auth", "carol:xyzzy"},
		{"check", "--auth", "alice:sesame", "--auth", "carol:xyzzy"},
	} {
		r := command.Run(t, env, args...)
		if r.Code != cmd.ExitDone || r.Errors != "" {
			t.Fatalf("exit code %d: %s", r.Code, r.Errors)
		}
		for _, want := range []string{"server = \"" + invite.Redacted() + "\"", "# ANYTUN_SERVER", `auth = ["alice:***", "carol:***"]`, `listen = ["127.0.0.1:1080"]`, "mtu = 1400"} {
			if !strings.Contains(r.Out, want) {
				t.Errorf("the output lacks %q:\n%s", want, r.Out)
			}
		}
		for _, never := range []string{"sesame", "xyzzy", "swordfish", "secret=", secret, invite.Key.Text()} {
			if strings.Contains(r.Out, never) {
				t.Errorf("the output holds %q:\n%s", never, r.Out)
			}
		}
	}
}

// A check writes nothing, not even the key file that a start would make.
func TestCheckMakesNoKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "client.key")
	r := command.Run(t, nil, "--check", "--server", "192.0.2.1:4444", "--server-key", newKey(t).Public().String(), "--key", path)
	if r.Code != cmd.ExitDone {
		t.Fatalf("exit code %d: %s", r.Code, r.Errors)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the key file was made: %v", err)
	}
}

func TestKeygen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "client.key")
	r := command.Run(t, nil, "keygen", "--out", path)
	if r.Code != cmd.ExitDone || r.Errors != "" {
		t.Fatalf("exit code %d: %s", r.Code, r.Errors)
	}
	text, err := cmd.ReadSecret(path, "key")
	if err != nil {
		t.Fatal(err) // the mode is checked here
	}
	key, err := parseKeyFile(text)
	if err != nil {
		t.Fatal(err)
	}
	if want := key.Public().String() + "\n"; r.Out != want {
		t.Errorf("printed %q, want %q", r.Out, want)
	}
}

func TestReachableAddresses(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:1080":   false,
		"127.9.9.9:0":      false,
		"[::1]:1080":       false,
		"localhost:1080":   false,
		"unix:///run/x":    false,
		"fd://3":           false,
		":1080":            true,
		"0.0.0.0:1080":     true,
		"[::]:1080":        true,
		"192.0.2.1:1080":   true,
		"[2001:db8::1]:80": true,
	} {
		if got, err := checkListen(address); err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", address, got, err, want)
		}
	}
}

func FuzzParseKeyFile(f *testing.F) {
	f.Add([]byte("# comment\n" + strings.Repeat("A", 43) + "=\n"))
	f.Add([]byte(strings.Repeat("A", 43)))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := parseKeyFile(text)
		if err != nil {
			return
		}
		if again, err := parseKeyFile(formatKeyFile(key)); err != nil || again != key {
			t.Errorf("written and read again: %v", err)
		}
	})
}
