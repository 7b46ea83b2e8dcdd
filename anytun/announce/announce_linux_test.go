package announce

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// config announces both prefixes from server i to the core.
func config(i byte, v6 bool) Config {
	core := netip.AddrFrom4([4]byte{10, 9, i, 1})
	if v6 {
		core = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x09, 3: i, 15: 1})
	}
	return Config{
		RouterID: netip.AddrFrom4([4]byte{10, 9, i, 2}), AS: 65001,
		Peers:    []Peer{{Addr: core, AS: 65000}},
		Prefixes: []netip.Prefix{netip.MustParsePrefix(anycast4), netip.MustParsePrefix(anycast6)},
	}
}

func TestAnnounceAndWithdraw(t *testing.T) {
	for _, tt := range []struct {
		name         string
		v6           bool
		hop          string
		want4, want6 string
	}{
		{"IPv4Session", false, "", "10.9.1.2", "fd09:1::2"},
		{"IPv6Session", true, "", "10.9.1.2", "fd09:1::2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, 1, "")
			begin := time.Now()
			s := l.speaker(1, helperConfig{Config: config(1, tt.v6), Sick: true})
			until(t, func() string {
				if st := s.status(); st.Peers[0].State != "established" {
					return "no session: " + st.Peers[0].State
				}
				return ""
			})
			t.Logf("session after %v", time.Since(begin))
			if got := l.routes(anycast4); len(got) > 0 {
				t.Errorf("announced while sick: %v", got)
			}

			s.say("well", &struct{}{})
			if got := l.await(anycast4, 1); got[0] != tt.want4 {
				t.Errorf("next hop %v, want %v", got, tt.want4)
			}
			if got := l.await(anycast6, 1); got[0] != tt.want6 {
				t.Errorf("next hop %v, want %v", got, tt.want6)
			}
			if st := s.status(); !st.Announcing || !st.Healthy || st.Peers[0].Announced != 2 || st.Why != "" {
				t.Errorf("status while announcing: %+v", st)
			}

			begin = time.Now()
			s.say("sick", &struct{}{})
			t.Logf("route gone %v after the check began to fail", l.deleted(anycast4, begin))
			l.await(anycast4, 0)
			l.await(anycast6, 0)
			if st := s.status(); st.Announcing || st.Healthy || st.Why != "sick" || st.Peers[0].State != "established" {
				t.Errorf("status while sick: %+v", st)
			}
			s.say("well", &struct{}{})
			l.await(anycast4, 1)
			l.await(anycast6, 1)

			begin = time.Now()
			s.say("drain", &struct{}{})
			t.Logf("route gone %v after Drain", l.deleted(anycast4, begin))
			l.await(anycast4, 0)
			l.await(anycast6, 0)
			if st := s.status(); st.Announcing || !st.Draining || !st.Healthy || st.Peers[0].State != "established" {
				t.Errorf("status while draining: %+v", st)
			}
		})
	}
}

func TestEndWithdraws(t *testing.T) {
	l := newLab(t, 1, "bfd on;")
	c := config(1, false)
	c.Peers[0].BFD = true
	s := l.speaker(1, helperConfig{Config: c})
	l.await(anycast4, 1)
	l.await(anycast6, 1)
	s.awaitBFD("up")
	if ports := s.listening(); len(ports) > 0 {
		t.Errorf("listens on TCP %v, without being asked", ports)
	}
	begin := time.Now()
	var end stopped
	s.say("stop", &end)
	t.Logf("route gone %v after the end, Run took %v more", l.deleted(anycast4, begin), end.Took)
	l.await(anycast6, 0)
	end.check(t)
}

// A killed program's sessions are closed by the kernel.
func TestKilled(t *testing.T) {
	l := newLab(t, 1, "")
	s := l.speaker(1, helperConfig{Config: config(1, false)})
	l.await(anycast4, 1)
	l.await(anycast6, 1)
	begin := s.signal(syscall.SIGKILL)
	t.Logf("IPv4 route gone %v after SIGKILL, IPv6 %v", l.deleted(anycast4, begin), l.deleted(anycast6, begin))
}

// A stopped program's session stays open; BFD notices.
func TestStopped(t *testing.T) {
	l := newLab(t, 1, "bfd on;")
	c := config(1, false)
	c.Peers[0].BFD = true
	s := l.speaker(1, helperConfig{Config: c})
	l.await(anycast4, 1)
	s.awaitBFD("up")
	begin := s.signal(syscall.SIGSTOP)
	t.Logf("route gone %v after SIGSTOP", l.deleted(anycast4, begin))
	l.await(anycast4, 0)
	begin = s.signal(syscall.SIGCONT)
	l.await(anycast4, 1)
	t.Logf("route back %v after SIGCONT", time.Since(begin))
	s.awaitBFD("up")
	if d := l.deletions(anycast4, begin); len(d) > 0 {
		t.Errorf("the route went again after SIGCONT: %v", d)
	}
}

// Three servers share the load, and what is left of them does when one dies.
func TestThreeServers(t *testing.T) {
	l := newLab(t, 3, "")
	var servers [4]*speaker
	for i := 1; i <= 3; i++ {
		servers[i] = l.speaker(i, helperConfig{Config: config(byte(i), false)})
	}
	for prefix, want := range map[string][]string{
		anycast4: {"10.9.1.2", "10.9.2.2", "10.9.3.2"},
		anycast6: {"fd09:1::2", "fd09:2::2", "fd09:3::2"},
	} {
		got := l.await(prefix, 3)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s by %v, want %v", prefix, got, want)
		}
	}
	begin := servers[2].signal(syscall.SIGKILL)
	got := l.await(anycast4, 2)
	t.Logf("two routes at most %v after SIGKILL", time.Since(begin))
	slices.Sort(got)
	if want := []string{"10.9.1.2", "10.9.3.2"}; !slices.Equal(got, want) {
		t.Errorf("after server 2 died: %v, want %v", got, want)
	}
	l.await(anycast6, 2)
	l.speaker(2, helperConfig{Config: config(2, false)})
	l.await(anycast4, 3)
	l.await(anycast6, 3)
}

// A router that dies and comes back is told again, and once is enough.
func TestRouterRestarts(t *testing.T) {
	l := newLab(t, 1, "bfd on;")
	c := config(1, false)
	c.Peers[0].BFD = true
	s := l.speaker(1, helperConfig{Config: c})
	l.await(anycast4, 1)
	s.awaitBFD("up")
	if err := l.router.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, func() string {
		if st := s.status(); st.Peers[0].State == "established" {
			return "the session outlives the router"
		}
		return ""
	})
	// A killed BIRD leaves its routes in the kernel.
	begin := time.Now()
	run(t, "ip", "-n", l.core, "route", "flush", "proto", "bird")
	run(t, "ip", "-n", l.core, "-6", "route", "flush", "proto", "bird")
	l.deleted(anycast4, begin)
	begin = time.Now()
	l.bird()
	l.await(anycast4, 1)
	t.Logf("route back %v after the router", time.Since(begin))
	s.awaitBFD("up")
	if d := l.deletions(anycast4, begin); len(d) > 0 {
		t.Errorf("the route went again: %v", d)
	}
}

func TestPassword(t *testing.T) {
	const secret = "no-one-may-read-this"
	l := newLab(t, 1, `password "`+secret+`";`)
	c := config(1, false)
	s := l.speaker(1, helperConfig{Config: c, Password: secret})
	l.await(anycast4, 1)
	if log := s.read(); strings.Contains(log, secret) {
		t.Errorf("the password is in the log:\n%s", log)
	} else if !strings.Contains(log, "bgp: peer up") {
		t.Errorf("the log doesn't tell that the peer is up:\n%s", log)
	}
	var end stopped
	s.say("stop", &end)

	s = l.speaker(1, helperConfig{Config: c, Password: "wrong"})
	time.Sleep(4 * time.Second) // two attempts
	if st := s.status(); st.Peers[0].State == "established" {
		t.Error("a session with the wrong password")
	}
	s.say("stop", &end)
	end.check(t) // it was about to connect
}

// The peer opens the session.
func TestListen(t *testing.T) {
	l := newLab(t, 1, "")
	c := config(1, false)
	c.ListenPort = 179
	c.Peers[0].Port = 1 // nobody is there
	s := l.speaker(1, helperConfig{Config: c})
	l.await(anycast4, 1)
	if got := s.listening(); !slices.Equal(got, []string{"179", "179"}) {
		t.Errorf("listens on TCP %v, want 179 for each family", got)
	}
}

// A peer to which there is no way yet, and a port that is taken, are tried again.
func TestWaits(t *testing.T) {
	l := newLab(t, 1, "")
	ns := l.server(1)
	run(t, "ip", "-n", ns, "link", "set", "core", "down")
	c := config(1, false)
	c.RouterID = netip.Addr{}
	s := l.speaker(1, helperConfig{Config: c})
	until(t, func() string {
		st := s.status()
		if !st.Announcing || st.Peers[0].State != "waiting" || !strings.Contains(st.Why, "no way to 10.9.1.1") {
			return fmt.Sprintf("%+v", st)
		}
		return ""
	})
	run(t, "ip", "-n", ns, "link", "set", "core", "up")
	run(t, "ip", "-n", ns, "addr", "replace", "fd09:1::2/64", "dev", "core", "nodad")
	l.await(anycast4, 1)
	l.await(anycast6, 1)
	if st := s.status(); st.Why != "" {
		t.Errorf("still says %q", st.Why)
	}
}
