package server

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestPingSocketsAllowed runs TestEgressPing again in a network namespace that
// lets everybody ping, as many distributions do: what the host of the tests
// forbids is tested all the same.
func TestPingSocketsAllowed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make a network namespace whose ping_group_range differs")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--net", "sh", "-c",
		`ip link set lo up && echo "0 2147483647" >/proc/sys/net/ipv4/ping_group_range && exec "$0" "$@"`,
		exe, "-test.run=^TestEgressPing$", "-test.v", "-test.timeout=1m")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"IPv4_ping_socket", "IPv6_ping_socket"} {
		if !strings.Contains(string(out), "--- PASS: TestEgressPing/"+name) {
			t.Errorf("%s did not run there:\n%s", name, out)
		}
	}
}
