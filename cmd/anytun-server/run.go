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

	"github.com/anytun-go/anytun/anytun/announce"
	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/tun"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
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
	g := &gateway{config: c, log: logger, directory: server.NewDirectory(c.clients), drainRequest: make(chan struct{}, 1)}
	if c.stale {
		g.saveCluster()
	}
	defer g.close()
	if err := g.open(ctx); err != nil {
		return err
	}
	cmd.ShareCPUs()
	tasks := []cmd.Task{{Name: "server", Run: g.server.Run}}
	if g.numbers != nil {
		tasks = append(tasks, cmd.Task{Name: "server number", Run: g.numbers.run})
	}
	if g.announcer != nil {
		tasks = append(tasks, cmd.Task{Name: "announcer", Run: g.runAnnouncer})
	}
	if c.admin != "" {
		l, err := cmd.ListenAdmin(c.admin, logger)
		if err != nil {
			return err
		}
		admin := g.admin()
		tasks = append(tasks, cmd.Task{Name: "admin", Run: func(ctx context.Context) error { return admin.Serve(ctx, l) }})
		logger.Info("admin pages", "address", l.Addr().String())
	}
	for _, conn := range g.conns {
		logger.Info("listening", "address", conn.LocalAddr().String())
	}
	g.ran = true
	logger.Info("serving", "version", cmd.Version(), "clients", g.directory.Len(),
		"server_number", g.number, "public_key", c.cluster.Public().String(), "egress", s.String("egress"))
	return cmd.Supervision{
		Tasks: tasks, Drain: g.drain, DrainTime: c.drainTime, DrainRequest: g.drainRequest, Reload: g.reload, Logger: logger,
	}.Run(ctx, s.Process)
}

// gateway is a running server with what the engine leaves to the command: its
// files, its sockets, the host's routes and what routers are told.
type gateway struct {
	*config
	log          *slog.Logger
	directory    *server.Directory
	conns        []udp.Conn
	device       *tun.Device
	hostDown     func() error // takes the host's routes away again
	bus          registry.Registry
	numbers      *numberHolder // nil if the number was given
	server       *server.Server
	announcer    *announce.Announcer
	ran          bool // all of it was started
	draining     atomic.Bool
	drainRequest chan struct{}
}

// open opens the sockets and makes the engine. What it has opened is for close,
// also after an error.
func (g *gateway) open(ctx context.Context) error {
	for _, address := range g.listen {
		conn, err := udp.Listen(address, udp.Options{})
		if err != nil && g.fallback && noIPv6(err) {
			conn, err = udp.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), address.Port()), udp.Options{})
		}
		if err != nil {
			return cmd.ListenError("--listen", address.String(), err)
		}
		g.conns = append(g.conns, conn)
	}
	var err error
	if g.bus, err = g.openRegistry(g.log); err != nil {
		return err
	}
	if g.number == 0 && g.registry.alone() {
		g.number = 1
	}
	if g.number == 0 {
		if g.numbers, err = leaseNumber(ctx, g.bus, &g.registry, g.log); err != nil {
			return err
		}
		g.number = uint16(g.numbers.claim.Index)
	}
	settings := server.Config{
		Conns: g.conns, Cluster: g.cluster, Clients: g.directory, Number: g.number, Registry: g.bus,
		KeepAlive: g.keepAlive, MTU: g.mtu,
		DNS: g.dns, AllowLocal: g.allowLocal, MaxFlows: g.maxFlows, MaxFlowsPerClient: g.maxPerClient,
		Rotated: g.saveCluster, Logger: g.log,
	}
	if g.egress.tun {
		if err := g.openTun(ctx); err != nil {
			return err
		}
		settings.Device, settings.Plan = g.device, g.egress.plan
	}
	if g.server, err = server.New(settings); err != nil {
		return err
	}
	if g.announce != nil {
		g.announce.Check, g.announce.Logger = g.server.Check, g.log
		if g.announcer, err = announce.New(*g.announce); err != nil {
			return err
		}
	}
	return nil
}

// openTun makes the device and leads the egress addresses to it.
func (g *gateway) openTun(ctx context.Context) (err error) {
	host := tun.Host{Device: g.egress.device, Egress: g.egress.prefixes, Logger: g.log}
	for _, conn := range g.conns {
		host.Service = append(host.Service, conn.LocalAddr())
	}
	if err := host.Check(); err != nil {
		return cmd.Failure("", "--egress tun: %w", err)
	}
	if g.device, err = tun.Open(tun.Config{
		Name: g.egress.device, MTU: g.mtu, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen,
	}); err != nil {
		return cmd.Failure("run the server as root, or with CAP_NET_ADMIN and /dev/net/tun; or give another name with --tun",
			"--egress tun: %w", err)
	}
	if g.hostDown, err = host.Up(ctx); err != nil {
		return cmd.Failure("", "--egress tun: %w", err)
	}
	return nil
}

// runAnnouncer announces until ctx ends.
func (g *gateway) runAnnouncer(ctx context.Context) error {
	err := g.announcer.Run(ctx)
	if err == nil {
		err = ctx.Err()
	}
	return err
}

func noIPv6(err error) bool {
	return errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

// close gives back what open has opened. The engine has closed its own already
// if it ran.
func (g *gateway) close() {
	for _, conn := range g.conns {
		conn.Close()
	}
	if g.hostDown != nil {
		if err := g.hostDown(); err != nil {
			g.log.Warn("can't take the routes of the TUN device away", "error", err)
		}
	}
	if g.device != nil {
		g.device.Close()
	}
	if g.numbers != nil && !g.ran {
		g.numbers.release()
	}
	if g.bus != nil {
		g.bus.Close()
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

// drain has the routes withdrawn and serves on for the drain time, so that
// packets that are on their way, and routers that are slow, lose nothing. With
// egress by sockets it refuses new flows and waits for the open TCP connections;
// UDP has no end to wait for.
func (g *gateway) drain(ctx context.Context) {
	g.draining.Store(true)
	if g.numbers != nil {
		defer g.numbers.release() // at last: clients take packets of two senders of one number for replays
	}
	if g.announcer != nil {
		g.announcer.Drain() // first, so that new flows go elsewhere rather than to be refused here
		g.server.Drain()
		<-ctx.Done()
	} else {
		g.server.Drain()
	}
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
		Drain: func() {
			select {
			case g.drainRequest <- struct{}{}:
			default: // it is asked already
			}
		},
		Collectors: cmd.Collectors(cmd.ServerMetrics(g.server), cmd.SocketMetrics("server", g.conns...), g.emitCluster),
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
	facts = append(facts,
		cmd.Fact{Name: "clients enrolled", Value: strconv.Itoa(g.directory.Len())},
		cmd.Fact{Name: "clients online", Value: strconv.Itoa(st.Clients)},
		cmd.Fact{Name: "sessions", Value: strconv.Itoa(st.Sessions)},
		cmd.Fact{Name: "flows", Value: strconv.Itoa(egress.Flows)},
	)
	return append(facts, g.clusterFacts()...)
}
