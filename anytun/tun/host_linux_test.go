package tun

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	service4, service6 = "203.0.113.1", "2001:db8:113::1"
	servicePort        = 4444

	helperEnv = "ANYTUN_TUN_HELPER"
)

// TestMain can also be a server that a test kills.
func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	m.Run()
}

// helper takes the host up, says so, and throws the packets away that come.
func helper() error {
	d, err := Open(Config{Name: "tun0"})
	if err != nil {
		return err
	}
	h := testHost()
	if _, err := h.Up(context.Background()); err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("up\n"); err != nil {
		return err
	}
	for {
		if _, err := d.ReadBatch(); err != nil {
			return err
		}
	}
}

func testHost() Host {
	return Host{
		Device: "tun0",
		Egress: []netip.Prefix{
			prefix(single(service4)), prefix(single(service6)),
			prefix("198.51.100.0/28"), prefix("198.51.100.1/28"), prefix("2001:db8:51::/64"),
		},
		Service: []netip.AddrPort{service(service4), service(service6)},
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func service(a string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(a), servicePort) }

func TestCheck(t *testing.T) {
	s := newSpace(t)
	h := testHost()
	check := func() (err error) {
		s.do(func() error { err = h.Check(); return nil })
		return err
	}
	s.run("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0")
	err := check()
	if err == nil {
		t.Fatal("a host that doesn't forward passes")
	}
	for line := range strings.Lines(err.Error()) {
		_, command, ok := strings.Cut(strings.TrimSpace(line), "run: ")
		if !ok {
			t.Fatalf("no command in %q", line)
		}
		s.run(command)
	}
	if err := check(); err != nil {
		t.Errorf("after the commands: %v", err)
	}
	for _, bad := range []string{"0.0.0.0/0", "127.0.0.1/32", "224.0.0.0/4", "fe80::1/128", "::/0", "::ffff:192.0.2.1/128"} {
		if (Host{Egress: []netip.Prefix{prefix(bad)}}).Check() == nil {
			t.Errorf("%s passes", bad)
		}
	}
}

// TestSharedAddress has an egress address that is the service's, too.
func TestSharedAddress(t *testing.T) {
	for _, filter := range []string{"0", "1", "2"} { // reverse path filter: off, strict, loose
		t.Run("rp_filter="+filter, func(t *testing.T) {
			if filter == "0" {
				t.Run("IPv6", func(t *testing.T) { sharedAddress(t, dst6, service6, filter) })
			}
			t.Run("IPv4", func(t *testing.T) { sharedAddress(t, dst4, service4, filter) })
		})
	}
}

func sharedAddress(t *testing.T, dst, egress, filter string) {
	w := newWorld(t, []string{single(egress)}, []netip.AddrPort{service(egress)})
	w.server.run("for f in all default wan tun0; do sysctl -qw net.ipv4.conf.$f.rp_filter=" + filter + "; done")

	outer := w.server.listenUDP(service(egress).String())
	go echoUDP(outer)
	outside := w.dst.dialUDP(service(egress).String())
	hello := func() {
		t.Helper()
		b := []byte("hello")
		if _, err := outside.Write(b); err != nil {
			t.Fatal(err)
		}
		if n, err := outside.Read(b); err != nil || n != 5 {
			t.Fatalf("service: %d bytes, %v", n, err)
		}
	}
	hello()

	const size = 8 << 20
	l := w.dst.listen(net.JoinHostPort(dst, "80"))
	c := w.client.dial(l.Addr().String())
	s := accept(t, l)
	transfer(t, c, s, size)
	hello()
	transfer(t, s, c, size)

	// The client listens on the shared address; the service's port in TCP is its, too.
	for _, port := range []string{"8080", "4444"} {
		l := w.client.listen(net.JoinHostPort(egress, port))
		a := w.dst.dial(l.Addr().String())
		transfer(t, a, accept(t, l), 100000)
	}
	inner := w.client.listenUDP(net.JoinHostPort(egress, "5000"))
	go echoUDP(inner)
	u := w.dst.dialUDP(inner.LocalAddr().String())
	if _, err := u.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Read(make([]byte, 9)); err != nil {
		t.Error(err)
	}
	for _, to := range []struct {
		from *space
		addr string
	}{{w.client, dst}, {w.dst, egress}} {
		out := to.from.run("ping -n -c 2 -i 0.2 -W 20 " + to.addr)
		if !strings.Contains(out, " 0% packet loss") {
			t.Errorf("ping %s:\n%s", to.addr, out)
		}
	}
	hello()
	w.drops()
}

// TestDown compares the host before Up and after down.
func TestDown(t *testing.T) {
	for name, prepare := range map[string]string{
		"plain": "true",
		"rules": "ip rule add pref 1 from 10.0.0.0/8 lookup 99; ip rule add pref 5 lookup 98; ip -6 rule add pref 1 lookup 97",
		"moved": `ip rule add pref 100 lookup local; ip rule del pref 0
			ip -6 rule add pref 100 lookup local; ip -6 rule del pref 0`,
		"stands ready": "ip tuntap add tun0 mode tun vnet_hdr; sysctl -qw net.ipv4.conf.tun0.forwarding=0 net.ipv6.conf.tun0.disable_ipv6=1",
	} {
		t.Run(name, func(t *testing.T) {
			s := hostSpace(t)
			s.run(prepare)
			sysctls := func() string {
				return s.run("sysctl -a 2>/dev/null | grep conf.tun0 | grep -vE 'mtu|addr_gen_mode|stable_secret' || true")
			}
			before, values := s.settled(), sysctls()
			for _, closeFirst := range []bool{false, true} {
				d := s.open(Config{Name: "tun0"})
				opened := s.settled()
				down := s.up(testHost())
				if up := s.rules(); up == opened {
					t.Error("Up does nothing")
				} else if closeFirst {
					t.Log(s.run("ip rule; ip -6 rule; ip route show table all proto 141; ip -6 route show table all proto 141"))
				}
				if closeFirst {
					d.Close()
					down()
				} else {
					down()
					if after := s.settled(); after != opened {
						t.Errorf("before:\n%s\nafter:\n%s", opened, after)
					}
					d.Close()
				}
				if name == "stands ready" {
					s.run("ip link set tun0 down")
				}
				if after := s.settled(); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				if name == "stands ready" && !closeFirst {
					if after := sysctls(); after != values {
						t.Errorf("before:\n%s\nafter:\n%s", values, after)
					}
				}
			}
		})
	}
}

// hostSpace is a namespace with the addresses of testHost's service.
func hostSpace(t *testing.T) *space {
	t.Helper()
	s := newSpace(t)
	s.addr(prefix(single(service4)), "lo")
	s.addr(prefix(single(service6)), "lo")
	return s
}

// TestUpRefuses leaves nothing behind.
func TestUpRefuses(t *testing.T) {
	s := hostSpace(t)
	s.open(Config{Name: "tun0"})
	s.run("ip route add unreachable 198.51.100.0/28 metric 1")
	before := s.settled()
	for name, h := range map[string]Host{
		"no device":   {Device: "tun9"},
		"bad address": {Device: "tun0", Egress: []netip.Prefix{prefix("127.0.0.1/32")}},
		"other route": {Device: "tun0", Egress: []netip.Prefix{prefix("198.51.100.16/28"), prefix("198.51.100.0/28")}},
	} {
		s.do(func() error {
			if _, err := h.Up(t.Context()); err == nil {
				t.Errorf("%s: no error", name)
			} else {
				t.Logf("%s: %v", name, err)
			}
			return nil
		})
	}
	if after := s.settled(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	s.run("ip route del unreachable 198.51.100.0/28")
	// Another's rule behind rule 0, which can't be moved over it.
	s.run("ip rule add pref 0 from 10.0.0.0/8 lookup 99")
	before = s.settled()
	s.do(func() error {
		if _, err := testHost().Up(t.Context()); err == nil || !strings.Contains(err.Error(), "another program") {
			t.Errorf("another's rule: %v", err)
		}
		return nil
	})
	if after := s.settled(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestKilled kills a server without warning. Its host must stay silent to the
// clients' peers, and the next server find its way.
func TestKilled(t *testing.T) {
	s, dst := hostSpace(t), newSpace(t)
	s.join("wan", dst, "eth0")
	s.run("ip addr add 192.0.2.1/24 dev wan; ip addr add 2001:db8:2::1/64 dev wan nodad; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	dst.run(`ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8:2::2/64 dev eth0 nodad
		ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:2::1`)
	dst.reach("192.0.2.1", "2001:db8:2::1")
	before := s.settled()

	// silent fails if a connection attempt is answered; only the tunnel may.
	silent := func(when string) {
		t.Helper()
		for _, a := range []string{service4, service6, "198.51.100.3", "2001:db8:51::3"} {
			dst.do(func() error {
				d := net.Dialer{Timeout: 300 * time.Millisecond}
				c, err := d.Dial("tcp", net.JoinHostPort(a, "81"))
				if err == nil {
					c.Close()
				}
				var ne net.Error
				if !errors.As(err, &ne) || !ne.Timeout() {
					t.Errorf("%s: connection to %s: %v", when, a, err)
				}
				return nil
			})
		}
	}
	var rules string
	for round := range 2 {
		kill := s.helper()
		silent("alive")
		if round == 0 {
			rules = s.run("ip rule; ip -6 rule")
		} else if now := s.run("ip rule; ip -6 rule"); now != rules {
			t.Errorf("second server made:\n%s\nafter the first one's:\n%s", now, rules)
		}
		kill()
		silent("killed")
		s.reach("127.0.0.1", "::1", "192.0.2.2") // the host itself lives
	}

	// A successor with other settings, also of one that died while it moved rule 0.
	s.open(Config{Name: "tun0"})
	h := testHost()
	h.Egress = h.Egress[:2]
	var down func()
	for _, port := range []uint16{5555, 6666} {
		h.Service[0] = netip.AddrPortFrom(h.Service[0].Addr(), port)
		down = s.up(h)
		now := s.run("ip rule; ip route show table all")
		if strings.Contains(now, "198.51.100") || strings.Contains(now, "dport 4444") || strings.Count(now, "dport") != 1 ||
			!strings.Contains(now, fmt.Sprintf("dport %d lookup", port)) {
			t.Errorf("rules and routes with port %d:\n%s", port, now)
		}
		if port == 5555 {
			s.run("ip rule add pref 1 lookup local proto 141; ip rule del pref 0 lookup local; ip rule del pref 0 proto 141")
		}
	}
	down()
	s.run("ip link del tun0")
	if after := s.settled(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// helper starts a server in a process of its own and waits until it is up.
func (s *space) helper() (kill func()) {
	s.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.do(cmd.Start)
	line, err := bufio.NewReader(out).ReadString('\n')
	kill = func() {
		_ = cmd.Process.Signal(unix.SIGKILL)
		_ = cmd.Wait()
	}
	if err != nil || line != "up\n" {
		_, _ = io.Copy(os.Stderr, out)
		kill()
		s.t.Fatalf("helper says %q: %v", line, err)
	}
	return kill
}
