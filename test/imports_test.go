// Package test holds the tests of the module as a whole.
package test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/anytun-go/anytun/"

// mayImport is the whole architecture: for every package of the module, the
// packages of the module it may import outside its tests. A package that is
// not listed here fails the test, so a new package starts with a decision.
var mayImport = map[string][]string{
	"anytun":               {}, // the package comment with the map, no code
	"anytun/wire":          {},
	"anytun/packet":        {},
	"anytun/portblock":     {},
	"anytun/nowait":        {},
	"anytun/udp":           {"anytun/nowait"},
	"anytun/session":       {"anytun/wire"},
	"anytun/nat":           {"anytun/packet"},
	"anytun/tun":           {"anytun/nowait"},
	"anytun/registry":      {},
	"anytun/registry/nats": {"anytun/registry"},
	"anytun/announce":      {},
	"anytun/client":        {"anytun/wire", "anytun/session", "anytun/udp"},
	"anytun/server": {
		"anytun/wire", "anytun/session", "anytun/packet", "anytun/portblock", "anytun/nat", "anytun/registry",
		"anytun/udp", "anytun/nowait", "netstack", "netstack/deep", "netstack/splice",
	},
	"netstack":        {"netstack/deep"},
	"netstack/deep":   {},
	"netstack/splice": {"anytun/nowait"},
	"proxy":           {"netstack/deep", "netstack/splice"},
	"proxy/socks5":    {"proxy", "netstack/splice"},
	"proxy/httpproxy": {"proxy"},
	// What both programs do alike: settings, signals, the admin page, and its
	// counters, which are those of the engines.
	"cmd":         {"anytun/server", "anytun/udp", "netstack"},
	"cmd/cmdtest": {"cmd"}, // runs a program inside its tests
	"cmd/anytun-proxy": {
		"cmd", "proxy", "proxy/socks5", "proxy/httpproxy", "netstack",
		"anytun/wire", "anytun/session", "anytun/client", "anytun/udp",
		"anytun/server", // the server embedded where none is named
	},
	"cmd/anytun-server": {
		"cmd", "anytun/wire", "anytun/session", "anytun/server", "anytun/udp", "anytun/portblock", "anytun/tun",
		"anytun/registry", "anytun/registry/nats", "anytun/announce", // the cluster is a server's alone
	},
	"test/simnet":       {"anytun/udp"},
	"test/simnet/scale": {"anytun/registry", "anytun/portblock"}, // a simulation with the project's own arithmetic
	"test/bench/load":   {},
	"test/bench/delay":  {},
	"test/loopback":     {},
	"test/e2e":          {}, // test files only, here and below: they may import anything
	"test/gateway":      {},
	"test/lab":          {},
}

// pure are the packages that see nothing but the standard library, so that a
// stranger can read or reuse them alone.
var pure = []string{"anytun/wire", "anytun/packet", "anytun/portblock"}

// onlyImporter names the one package that may import a module, or a part of one.
var onlyImporter = map[string]string{
	"gvisor.dev/gvisor":              "netstack",
	"github.com/things-go/go-socks5": "proxy/socks5",
	"github.com/flynn/noise":         "anytun/session",
	"github.com/osrg/gobgp":          "anytun/announce",
	"github.com/nats-io":             "anytun/registry/nats",
	"github.com/vishvananda/netlink": "anytun/tun",
}

// mustNotLink names what a binary must not pull in, even indirectly, and why.
var mustNotLink = map[string]map[string]string{
	"cmd/anytun-proxy": {
		"testing": "test helpers leaked into production code",
		"github.com/nats-io/nats-server/v2/server": "only a server may form a cluster, and it weighs 12 MB",
		"github.com/osrg/gobgp/v4/pkg/server":      "only a server announces routes, and it weighs 12 MB",
	},
	"cmd/anytun-server": {
		"testing": "test helpers leaked into production code",
	},
}

type pkg struct {
	ImportPath    string
	Imports, Deps []string
}

func list(t *testing.T) map[string]pkg {
	t.Helper()
	// go test caches by the files a test opens, and it cannot see what the go
	// list child reads. Reading the directories here keeps a pass from being
	// replayed after an import was added.
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == ".git" {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	pkgs := make(map[string]pkg)
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		if name, ok := strings.CutPrefix(p.ImportPath, module); ok && name != "test" {
			pkgs[name] = p
		}
	}
}

func TestImports(t *testing.T) {
	pkgs := list(t)
	for name, p := range pkgs {
		allowed, known := mayImport[name]
		if !known {
			t.Errorf("%s is not in mayImport: decide what it may see", name)
			continue
		}
		for _, imp := range p.Imports {
			if in, ok := strings.CutPrefix(imp, module); ok && !slices.Contains(allowed, in) {
				t.Errorf("%s imports %s", name, in)
			}
		}
	}
	for name, p := range pkgs {
		for _, imp := range p.Imports {
			for owned, owner := range onlyImporter {
				if (imp == owned || strings.HasPrefix(imp, owned+"/")) && name != owner {
					t.Errorf("%s imports %s: only %s may", name, imp, owner)
				}
			}
			if first, _, _ := strings.Cut(imp, "/"); strings.Contains(first, ".") && slices.Contains(pure, name) {
				t.Errorf("%s imports %s: it may see the standard library alone", name, imp)
			}
		}
	}
	for name, banned := range mustNotLink {
		if _, ok := pkgs[name]; !ok {
			t.Errorf("mustNotLink lists %s, which is gone", name)
		}
		for dep, why := range banned {
			if slices.Contains(pkgs[name].Deps, dep) {
				t.Errorf("%s links %s: %s", name, dep, why)
			}
		}
	}
	for name := range mayImport {
		if _, ok := pkgs[name]; !ok {
			t.Errorf("mayImport lists %s, which is gone", name)
		}
	}
}
