package announce

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	anycast4 = "203.0.113.1/32"
	anycast6 = "2001:db8:0:1::/64"
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
	begin := time.Now()
	var end stopped
	s.say("stop", &end)
	t.Logf("route gone %v after the end, Run took %v more", l.deleted(anycast4, begin), end.Took)
	l.await(anycast6, 0)
	if end.Err != "<nil>" {
		t.Errorf("Run: %s", end.Err)
	}
	for _, g := range strings.Split(end.Goroutines, "\n\n") {
		if strings.Contains(g, "gobgp") || strings.Contains(g, "eapache") {
			t.Errorf("left behind: %s", g)
		}
	}
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
	until(t, func() string {
		if st := s.status(); st.Peers[0].BFD != "up" {
			return "bfd is " + st.Peers[0].BFD
		}
		return ""
	})
	begin := s.signal(syscall.SIGSTOP)
	t.Logf("route gone %v after SIGSTOP", l.deleted(anycast4, begin))
	l.await(anycast4, 0)
	begin = s.signal(syscall.SIGCONT)
	l.await(anycast4, 1)
	t.Logf("route back %v after SIGCONT", time.Since(begin))
}
