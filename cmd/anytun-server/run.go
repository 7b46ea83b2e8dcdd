package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/cmd"
)

// drainPoll is how often a drain looks whether flows are left.
const drainPoll = 100 * time.Millisecond

// serve runs a server until it is told to end.
func serve(ctx context.Context, s *cmd.Settings) error {
	if s.Bool("check") {
		return check(ctx, s)
	}
	c, err := parseConfig(s, time.Now())
	if err != nil {
		return err
	}
	logger, err := cmd.NewLogger(s.Process.Stderr, s)
	if err != nil {
		return err
	}
	g := &gateway{config: c, log: logger, directory: server.NewDirectory(c.clients)}
	if c.stale {
		g.saveCluster()
	}
	if err := g.open(); err != nil {
		return err
	}
	cmd.ShareCPUs()
	tasks := []cmd.Task{{Name: "server", Run: g.server.Run}}
	if c.admin != "" {
		l, err := cmd.ListenAdmin(c.admin, logger)
		if err != nil {
			g.close()
			return err
		}
		admin := g.admin()
		tasks = append(tasks, cmd.Task{Name: "admin", Run: func(ctx context.Context) error { return admin.Serve(ctx, l) }})
		logger.Info("admin pages", "address", l.Addr().String())
	}
	for _, conn := range g.conns {
		logger.Info("listening", "address", conn.LocalAddr().String())
	}
	logger.Info("serving", "version", cmd.Version(), "clients", g.directory.Len(),
		"server_number", c.number, "public_key", c.cluster.Public().String(), "egress", "sockets")
	return cmd.Supervision{
		Tasks: tasks, Drain: g.drain, DrainTime: c.drainTime, Reload: g.reload, Logger: logger,
	}.Run(ctx, s.Process)
}

// gateway is a running server with what the engine leaves to the command: its
// files and its sockets.
type gateway struct {
	*config
	log       *slog.Logger
	directory *server.Directory
	conns     []udp.Conn
	server    *server.Server
	draining  atomic.Bool
}

// open opens the sockets and makes the engine. On an error nothing stays open.
func (g *gateway) open() error {
	for _, address := range g.listen {
		conn, err := udp.Listen(address, udp.Options{})
		if err != nil && g.fallback && noIPv6(err) {
			conn, err = udp.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), address.Port()), udp.Options{})
		}
		if err != nil {
			g.close()
			return cmd.ListenError("--listen", address.String(), err)
		}
		g.conns = append(g.conns, conn)
	}
	engine, err := server.New(server.Config{
		Conns: g.conns, Cluster: g.cluster, Clients: g.directory, Number: g.number,
		KeepAlive: g.keepAlive, MTU: g.mtu,
		DNS: g.dns, AllowLocal: g.allowLocal, MaxFlows: g.maxFlows, MaxFlowsPerClient: g.maxPerClient,
		Rotated: g.saveCluster, Logger: g.log,
	})
	if err != nil {
		g.close()
		return err
	}
	g.server = engine
	return nil
}

func noIPv6(err error) bool {
	return errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

func (g *gateway) close() {
	for _, conn := range g.conns {
		conn.Close()
	}
}

// saveCluster writes the cluster's key file without the secrets that are past
// their time. Failing leaves packets alone, but old traffic can be opened with
// the file for as long as it holds them.
func (g *gateway) saveCluster() {
	if err := cmd.ReplaceFile(g.clusterFile, g.cluster.Marshal(), 0o600); err != nil {
		g.log.Warn("the cluster key file still holds an old epoch's secret; let the server write to its directory", "error", err)
		return
	}
	g.log.Info("erased an old epoch's secret", "file", g.clusterFile)
}

// reload reads the clients file again.
func (g *gateway) reload() {
	gone, err := g.directory.Reload(g.clientsFile)
	if err != nil {
		g.log.Error("the clients stay as they were; correct the file and send SIGHUP again", "error", err)
		return
	}
	g.server.Reload()
	g.log.Info("read the clients file", "clients", g.directory.Len(), "gone", len(gone))
}

// drain refuses new flows and waits for the open TCP connections. UDP has no
// end to wait for.
func (g *gateway) drain(ctx context.Context) {
	g.draining.Store(true)
	g.server.Drain()
	ticker := time.NewTicker(drainPoll)
	defer ticker.Stop()
	for g.server.Egress().FlowsTCP > 0 {
		select {
		case <-ctx.Done():
			g.log.Warn("drain time is over", "connections", g.server.Egress().FlowsTCP)
			return
		case <-ticker.C:
		}
	}
}

func (g *gateway) admin() *cmd.Admin {
	return &cmd.Admin{
		Program: "anytun-server", Ready: g.ready, Facts: g.facts, Logger: g.log,
		Collectors: cmd.Collectors(cmd.ServerMetrics(g.server), cmd.SocketMetrics("server", g.conns...)),
	}
}

func (g *gateway) ready() error {
	if g.draining.Load() {
		return errors.New("draining")
	}
	return nil
}

func (g *gateway) facts() []cmd.Fact {
	st, egress := g.server.Stats(), g.server.Egress()
	facts := []cmd.Fact{
		{Name: "public key", Value: g.cluster.Public().String()},
		{Name: "server number", Value: strconv.Itoa(int(g.number))},
		{Name: "epoch", Value: strconv.FormatUint(uint64(g.cluster.Epoch()), 10)},
	}
	for _, conn := range g.conns {
		facts = append(facts, cmd.Fact{Name: "listening", Value: net.UDPAddrFromAddrPort(conn.LocalAddr()).String()})
	}
	return append(facts,
		cmd.Fact{Name: "clients enrolled", Value: strconv.Itoa(g.directory.Len())},
		cmd.Fact{Name: "clients online", Value: strconv.Itoa(st.Clients)},
		cmd.Fact{Name: "sessions", Value: strconv.Itoa(st.Sessions)},
		cmd.Fact{Name: "flows", Value: strconv.Itoa(egress.Flows)},
	)
}
