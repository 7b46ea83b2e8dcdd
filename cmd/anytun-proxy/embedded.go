package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/cmd"
)

// openEmbedded makes a server in this process, with a cluster key that lives as
// long as the process and one client, and the tunnel to it. Packets between the
// two are sealed and go over a UDP socket like any others.
func (g *gateway) openEmbedded() error {
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		return err
	}
	key, err := session.NewPrivateKey()
	if err != nil {
		return err
	}
	loopback := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	if g.inside, err = udp.Listen(loopback, udp.Options{}); err != nil {
		return cmd.Failure("check that this host has the address 127.0.0.1", "open the embedded server's socket: %w", err)
	}
	g.embedded, err = server.New(server.Config{
		Conns:     []udp.Conn{g.inside},
		Cluster:   cluster,
		Clients:   server.NewDirectory([]server.Enrolment{{Key: key.Public(), Name: "embedded", Number: 1}}),
		KeepAlive: g.keepAlive,
		MTU:       g.mtu,
		DNS:       g.dns,
		// The applications are on this host: they reach it without us.
		AllowLocal: true,
		// One client has all of the flows.
		MaxFlowsPerClient: server.DefaultMaxFlows,
		Logger:            cmd.Quieter(g.log).With("part", "embedded server"),
	})
	if err != nil {
		return err
	}
	g.log.Info("no --server given: using an embedded server, traffic leaves as sockets of this host",
		"version", cmd.Version(), "server", g.inside.LocalAddr().String())
	return g.openTunnel([]netip.AddrPort{g.inside.LocalAddr()}, cluster.Public(), key, loopback)
}

// runEmbedded runs the server that openEmbedded made.
func (g *gateway) runEmbedded(ctx context.Context) error {
	if err := g.embedded.Run(ctx); err != nil {
		return err
	}
	return ctx.Err()
}
