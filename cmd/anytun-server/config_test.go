package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/cmd/cmdtest"
)

var command = cmdtest.Main(run)

// files makes a state directory with a cluster key and one client.
func files(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "cluster.key"), string(cluster.Marshal()), 0o600)
	write(t, filepath.Join(dir, "clients.txt"), cluster.Public().String()+" laptop 1\n", 0o600)
	return dir
}

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// testClients are the lines of n clients.
func testClients(t *testing.T, n int) string {
	t.Helper()
	var b strings.Builder
	for i := range n {
		key, err := session.NewPrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s laptop%d %d\n", key.Public(), i+1, i+1)
	}
	return b.String()
}

func TestWrongUsage(t *testing.T) {
	good := files(t)
	key := filepath.Join(good, "cluster.key")
	clients := filepath.Join(good, "clients.txt")
	bad := t.TempDir()
	open := write(t, filepath.Join(bad, "open.key"), "x", 0o644)
	other := write(t, filepath.Join(bad, "other.key"), "AAAA\n", 0o600)
	broken := write(t, filepath.Join(bad, "broken.txt"), "# clients\nlaptop 1\n", 0o600)
	many := write(t, filepath.Join(bad, "many.txt"), testClients(t, 2), 0o600)
	config := write(t, filepath.Join(bad, "config.toml"), "state-dri = \"x\"\n", 0o600)

	serve := func(args ...string) []string { return append([]string{"--state-dir", good}, args...) }
	invite := func(args ...string) []string { return append([]string{"invite", "--state-dir", good}, args...) }
	for _, test := range []struct {
		name string
		args []string
		says string
		hint string
	}{
		{"no key", nil, "--cluster-key is missing", "anytun-server keygen --out cluster.key"},
		{"no clients", []string{"--cluster-key", key}, "--clients is missing", "anytun-server invite"},
		{"key that does not exist", []string{"--state-dir", bad}, "cluster.key: no such file", "anytun-server keygen --out " + filepath.Join(bad, "cluster.key")},
		{"key that others can read", []string{"--cluster-key", open, "--clients", clients}, "can be read by others (mode 0644)", "chmod 600 " + open},
		{"another file as key", []string{"--cluster-key", other, "--clients", clients}, "other.key: not a cluster key file", "anytun-server keygen wrote"},
		{"clients file that does not exist", []string{"--cluster-key", key, "--clients", filepath.Join(bad, "none")}, "none: no such file", "anytun-server invite --clients"},
		{"clients file that is a directory", []string{"--cluster-key", key, "--clients", bad}, "is not a file", "--clients"},
		{"broken clients file", []string{"--cluster-key", key, "--clients", broken}, "broken.txt: line 2: ", "public key, a name and a number"},
		{"listen without port", serve("--listen", "0.0.0.0"), `--listen: "0.0.0.0" is not the address`, "0.0.0.0:4444"},
		{"listen with a name", serve("--listen", "localhost:4444"), `"localhost:4444" is not the address`, "0.0.0.0:4444"},
		{"listen twice", serve("--listen", "127.0.0.1:1", "--listen", "127.0.0.1:1"), "stands there twice", "once"},
		{"resolver", serve("--dns", "dns.example.net"), `--dns: "dns.example.net"`, "192.0.2.53"},
		{"egress unknown", serve("--egress", "none"), `--egress: "none" is not a kind`, "--egress sockets"},
		{"egress address without tun", serve("--egress-address", "198.51.100.1"), "--egress-address is for --egress tun", "--egress tun"},
		{"tun without address", serve("--egress", "tun"), "--egress-address is missing", "--egress-address 198.51.100.1"},
		{"tun with a long name", serve("--egress", "tun", "--tun", "anytun-0123456789"), "can't be the name of a device", "at most 15"},
		{"egress address that is none", serve("--egress", "tun", "--egress-address", "here"), `"here" is not an egress address`, "such as 198.51.100.1"},
		{"egress prefix of IPv4", serve("--egress", "tun", "--egress-address", "198.51.100.0/24"), `"198.51.100.0/24" is not`, "single IPv4 addresses"},
		{"egress prefix too small", serve("--egress", "tun", "--egress-address", "2001:db8::/112"), `"2001:db8::/112" is not`, "2001:db8:1::/64"},
		{"egress address twice", serve("--egress", "tun", "--egress-address", "198.51.100.1", "--egress-address", "198.51.100.1/32"), "stands there twice", "each address once"},
		{"egress addresses too few", serve("--egress", "tun", "--egress-address", "198.51.100.1", "--ports-per-client", "64512", "--clients", many), "laptop2 has the number 2, but the egress addresses have port blocks for 1 client", "more --egress-address"},
		{"no ports", serve("--ports-per-client", "0"), "--ports-per-client: 0 is out of range", "from 1 to 64512"},
		{"server number below 0", serve("--server-number", "-1"), "--server-number: -1 is out of range", "from 0 to 65535"},
		{"registry unknown", serve("--registry", "redis://host"), `"redis://host" is neither memory`, "nats://192.0.2.10:4222"},
		{"registry twice", serve("--registry", "nats://host", "--cluster-listen", "127.0.0.1:6222"), "are both there", "one of the two"},
		{"cluster without a port", serve("--cluster-listen", "127.0.0.1"), `"127.0.0.1" is not an address with a port`, "192.0.2.11:6222"},
		{"join alone", serve("--cluster-join", "127.0.0.1:6222"), "--cluster-join needs --cluster-listen", "add --cluster-listen"},
		{"join nobody", serve("--cluster-listen", "127.0.0.1:6222", "--cluster-join", "host"), "--cluster-join host: the port is missing", "192.0.2.12:6222"},
		{"announce to nobody", serve("--announce", "198.51.100.1/32"), "nobody to announce to", "--bgp-peer"},
		{"announce what", serve("--announce-hook", "true"), "--announce is missing", "--announce 198.51.100.1/32"},
		{"announce nonsense", serve("--announce-hook", "true", "--announce", "x"), `"x" is not a prefix`, "198.51.100.1/32"},
		{"peer without AS", serve("--bgp-as", "64512", "--bgp-peer", "192.0.2.1"), `"192.0.2.1" is not a peer`, "192.0.2.1@64512"},
		{"peer with nonsense", serve("--bgp-as", "64512", "--bgp-peer", "192.0.2.1@1,fast"), "is not a peer", "192.0.2.1@64512"},
		{"no AS", serve("--bgp-peer", "192.0.2.1@64512", "--announce", "198.51.100.1"), "--bgp-as: 0 is not an AS number", "--bgp-as 64512"},
		{"router id", serve("--bgp-as", "1", "--bgp-peer", "192.0.2.1@64512", "--bgp-router-id", "::1"), `"::1" is not an IPv4 address`, "IPv4 address"},
		{"hold time", serve("--announce-hook", "true", "--bgp-hold-time", "1s"), "--bgp-hold-time: 1s is out of range", "from 3s"},
		{"BGP password that others can read", serve("--bgp-as", "1", "--bgp-peer", "192.0.2.1@1", "--bgp-password-file", open), "can be read by others", "chmod 600"},
		{"mtu", serve("--mtu", "576"), "--mtu: 576 is out of range", "from 1280 to 9000"},
		{"keep-alive", serve("--keep-alive", "1ms"), "--keep-alive: 1ms is out of range", "from 1s to 10m0s"},
		{"flows", serve("--max-flows", "10", "--max-flows-per-client", "11"), "--max-flows-per-client (11) is larger than --max-flows (10)", "raise --max-flows"},
		{"drain time", serve("--drain-time", "-1s"), "--drain-time: -1s is out of range", "from 0s to 1h"},
		{"admin", serve("--admin", "9444"), `--admin: "9444" is not an address`, "host:port"},
		{"log level", serve("--check", "--log-level", "all"), `"all" is not a level`, "debug, info"},
		{"configuration key", []string{"--config", config}, `unknown key "state-dri"`, "did you mean state-dir?"},
		{"unknown command", []string{"invte"}, `unknown command "invte"`, "anytun-server invite?"},
		{"keygen over a file", []string{"keygen", "--out", key}, "cluster.key exists already", "another file with --out"},
		{"keygen nowhere", []string{"keygen", "--out", filepath.Join(bad, "no", "dir")}, "write cluster key", "--out"},
		{"invite without name", invite("--address", "gw:4444"), "--name is missing", "--name laptop"},
		{"invite with two words", invite("--name", "my laptop", "--address", "gw:4444"), "one word of printable", "one word"},
		{"invite without address", invite("--name", "phone"), "--address is missing", "--address gw.example.net:4444"},
		{"invite without port", invite("--name", "phone", "--address", "gw"), "the port is missing", "host:port"},
		{"invite with port 0", invite("--name", "phone", "--address", "gw:0"), `"0" is not a port`, "host:port"},
		{"invite with a bad key", invite("--name", "phone", "--address", "gw:4444", "--public-key", "x"), "--public-key: a key is 32 bytes", "anytun-proxy keygen"},
		{"invite of a name that is taken", invite("--name", "laptop", "--address", "gw:4444"), "has a client named laptop already", "another name"},
		{"invite into a broken file", []string{"invite", "--cluster-key", key, "--clients", broken, "--name", "phone", "--address", "gw:4444"}, "line 2", "public key, a name and a number"},
		{"invite with an open key", []string{"invite", "--cluster-key", open, "--clients", clients, "--name", "phone", "--address", "gw:4444"}, "can be read by others", "chmod 600"},
	} {
		t.Run(test.name, func(t *testing.T) {
			command.Run(t, nil, test.args...).CheckError(t, "anytun-server", cmd.ExitUsage, test.says, test.hint)
		})
	}
}

func TestCheck(t *testing.T) {
	dir := files(t)
	secret, err := os.ReadFile(filepath.Join(dir, "cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--check", "--state-dir", dir, "--mtu", "1350"},
		{"check", "--state-dir", dir, "--mtu", "1350"},
	} {
		r := command.Run(t, map[string]string{"ANYTUN_SERVER_NUMBER": "7"}, args...)
		if r.Code != cmd.ExitDone || r.Errors != "" {
			t.Fatalf("exit code %d: %s", r.Code, r.Errors)
		}
		for _, want := range []string{"mtu = 1350 ", "server-number = 7 ", "# ANYTUN_SERVER_NUMBER", `listen = ["[::]:4444"]`, `drain-time = "10s"`} {
			if !strings.Contains(r.Out, want) {
				t.Errorf("%v: the output lacks %q:\n%s", args, want, r.Out)
			}
		}
		for line := range strings.Lines(string(secret)) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), " = "); ok && (name == "secret" || name == "private-key") && strings.Contains(r.Out, value) {
				t.Errorf("%v prints the cluster's %s", args, name)
			}
		}
	}
}
