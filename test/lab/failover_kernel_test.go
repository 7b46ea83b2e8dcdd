//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/tun"
	"github.com/anytun-go/anytun/anytun/udp"
	message "github.com/anytun-go/anytun/anytun/wire"
)

// kernelDevice is the client's TUN device.
const kernelDevice = "tunnel"

// startKernel gives the client's host a second client of the cluster, whose
// packets are its kernel's: what pings and traces routes. Its ports are any, so
// the cluster has to translate them. Packets to dst and dst2 go that way.
func (c *cluster3) startKernel(t *testing.T) {
	t.Helper()
	invite := c.keys.invite(t, "kernel", netip.AddrPortFrom(c.services.v4, serverPort).String())
	lines, err := os.ReadFile(c.keys.clients)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.keys.clients, []byte(strings.TrimSpace(string(lines))+" any-port\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, s := range c.servers {
		s.daemon.signal(t, syscall.SIGHUP)
	}
	d := c.app.start(c.t, "kernel", helper(t, "kernel", invite, dst4.String(), dst24.String(), dst6.String(), dst26.String())...)
	eventually(t, 40*time.Second, func() error {
		if !strings.Contains(d.printed(), "ready") {
			return fmt.Errorf("the kernel's client isn't connected: %s", d.printed())
		}
		return nil
	})
	// The first answer of any may come to a server before the mapping of its port does.
	eventually(t, 20*time.Second, func() error {
		if r := c.app.try(t, 10*time.Second, "ping", "-c", "3", "-i", "0.2", "-W", "1", dst4.String()); r.code != 0 {
			return fmt.Errorf("no answer through the tunnel: %s", r.stdout)
		}
		return nil
	})
}

// runKernel is the helper "kernel": INVITE DESTINATION... It carries what the
// kernel sends to the destinations through the tunnel.
func runKernel(args []string) error {
	if len(args) < 1 {
		return errors.New("kernel: no invite")
	}
	invite, err := session.ParseInvite(args[0])
	if err != nil {
		return err
	}
	server, err := netip.ParseAddrPort(invite.Address)
	if err != nil {
		return err
	}
	device, err := tun.Open(tun.Config{Name: kernelDevice, Headroom: message.DataHeaderLen, Tailroom: message.TagLen})
	if err != nil {
		return err
	}
	outer, err := udp.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), 0), udp.Options{})
	if err != nil {
		return err
	}
	var once sync.Once
	engine, err := client.New(client.Config{
		Conn: outer, Servers: []netip.AddrPort{server}, ServerKey: invite.ServerKey, Key: invite.Key,
		Input: device.WriteBatch,
		OnSession: func(s client.Session) {
			once.Do(func() {
				if err := configureKernel(s, args[1:]); err != nil {
					fmt.Fprintln(os.Stdout, err)
					return
				}
				fmt.Fprintln(os.Stdout, "ready")
			})
		},
	})
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			pkts, err := device.ReadBatch()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				fmt.Fprintln(os.Stdout, err)
				cancel()
				return
			}
			engine.Output(pkts)
		}
	})
	return errors.Join(engine.Run(ctx), device.Close())
}

// configureKernel gives the device what the cluster granted.
func configureKernel(s client.Session, destinations []string) error {
	commands := []string{
		fmt.Sprintf("address replace %s/32 dev %s", s.Addresses[0], kernelDevice),
		fmt.Sprintf("address replace %s/128 dev %s nodad", s.Addresses[1], kernelDevice),
		fmt.Sprintf("link set %s mtu %d up", kernelDevice, s.MTU),
	}
	for _, d := range destinations {
		from := s.Addresses[0]
		if strings.Contains(d, ":") {
			from = s.Addresses[1]
		}
		commands = append(commands, fmt.Sprintf("route replace %s dev %s src %s", d, kernelDevice, from))
	}
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, out)
		}
	}
	return nil
}
