//go:build linux

package lab

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// required turns a skip for want of a program into a failure. The Makefile sets
// it where it could have installed the program: in CI and for root.
func required() bool { return os.Getenv("ANYTUN_REQUIRE") == "1" }

// require skips the test, naming what is missing, unless every program is there.
func require(t *testing.T, programs ...string) {
	t.Helper()
	var missing []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	switch {
	case len(missing) == 0:
	case required():
		t.Fatalf("not installed: %s (test/deps/install.sh installs them)", strings.Join(missing, ", "))
	default:
		t.Skipf("needs %s: as root, test/deps/install.sh installs them", strings.Join(missing, ", "))
	}
}

var errNoNamespaces = errors.New("this machine doesn't let us make network namespaces")

// namespaces tries once whether this machine lets us build hosts.
var namespaces = sync.OnceValue(func() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	name := prefix() + "-probe"
	out, err := exec.Command("ip", "netns", "add", name).CombinedOutput()
	if err != nil {
		return errors.Join(errNoNamespaces, errors.New(strings.TrimSpace(string(out))))
	}
	return exec.Command("ip", "netns", "del", name).Run()
})

// requireNamespaces skips the test where the kernel refuses namespaces; that it
// was asked and refused is the proof that this machine can't run the test.
func requireNamespaces(t *testing.T) {
	t.Helper()
	require(t, "ip", "nft", "sysctl", "setpriv")
	if err := namespaces(); err != nil {
		t.Skip(err)
	}
}
