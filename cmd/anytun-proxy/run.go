package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/httpproxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// The wiring. A byte's road out:
//
//	proxy.Server → tunnel (network.go) → netstack → client engine → UDP
//
// and, with no --server, through a server engine in the same process, over UDP
// on loopback, to sockets of this host (embedded.go).

const (
	// patience is how long a server may be silent before the log says so.
	patience = 3 * time.Second
	// resolveTimeout bounds the look-up of the server's name.
	resolveTimeout = 10 * time.Second
)

// gateway is everything that runs.
type gateway struct {
	*config
	log       *slog.Logger
	embedded  *server.Server // nil with --server
	inside    udp.Conn       // its socket
	outer     udp.Conn
	tunnel    *tunnel
	client    *client.Client
	proxy     *proxy.Server
	listeners []net.Listener
	draining  atomic.Bool
}

// serve runs the proxy until it is told to end.
func serve(ctx context.Context, s *cmd.Settings) error {
	if s.Bool("check") {
		return check(ctx, s)
	}
	c, err := parseConfig(s)
	if err != nil {
		return err
	}
	logger, err := cmd.NewLogger(s.Process.Stderr, s)
	if err != nil {
		return err
	}
	g := &gateway{config: c, log: logger}
	tasks, err := g.open(ctx)
	if err != nil {
		g.close()
		return err
	}
	return cmd.Supervision{
		Tasks: tasks, Drain: g.drain, DrainTime: c.drainTime, Reload: g.reload, Logger: logger,
	}.Run(ctx, s.Process)
}

// open makes the parts, outermost socket first, so that what can't work is said
// before anything runs. On an error close ends what was opened.
func (g *gateway) open(ctx context.Context) ([]cmd.Task, error) {
	for _, address := range g.listen {
		l, err := proxy.Listen(ctx, address)
		if err != nil {
			return nil, cmd.ListenError("--listen", address, err)
		}
		g.listeners = append(g.listeners, l)
	}
	var tasks []cmd.Task
	var err error
	if g.server == nil {
		err = g.openEmbedded()
		tasks = append(tasks, cmd.Task{Name: "embedded server", Run: g.runEmbedded})
	} else {
		cmd.ShareCPUs() // with the server inside there is work for all of them
		err = g.openRemote(ctx)
	}
	if err != nil {
		return nil, err
	}
	if g.proxy, err = proxy.New(proxy.Config{
		Network:          g.tunnel,
		SOCKS:            socks5.New(socks5.Config{UDPIdleTimeout: g.udpTimeout, MaxAssociations: g.maxUDP, ListenUDP: listenApp}),
		HTTP:             httpproxy.New(httpproxy.Config{}),
		Auth:             g.auth,
		MaxConns:         g.maxConns,
		HandshakeTimeout: g.handshake,
		DialTimeout:      g.dialTimeout,
		IdleTimeout:      g.idle,
		Logger:           g.log,
	}); err != nil {
		return nil, err
	}
	tasks = append(tasks,
		cmd.Task{Name: "tunnel", Run: g.runTunnel},
		cmd.Task{Name: "proxy", Run: g.runProxy},
	)
	if g.admin != "" {
		l, err := cmd.ListenAdmin(g.admin, g.log)
		if err != nil {
			return nil, err
		}
		admin := g.adminPages()
		tasks = append(tasks, cmd.Task{Name: "admin", Run: func(ctx context.Context) error { return admin.Serve(ctx, l) }})
		g.log.Info("admin pages", "address", l.Addr().String())
	}
	if g.auth == nil {
		for _, address := range g.reachable {
			g.log.Warn("everybody who reaches this address can use the proxy; add --auth or listen on loopback", "address", address)
		}
	}
	for _, l := range g.listeners {
		g.log.Info("listening", "address", l.Addr().String())
	}
	return tasks, nil
}

// close ends what open has opened when nothing runs yet.
func (g *gateway) close() {
	for _, l := range g.listeners {
		l.Close()
	}
	for _, conn := range []udp.Conn{g.inside, g.outer} {
		if conn != nil {
			conn.Close()
		}
	}
}

// openRemote makes the tunnel to a server elsewhere.
func (g *gateway) openRemote(ctx context.Context) error {
	r := g.server
	if r.key == (session.PrivateKey{}) {
		var err error
		if r.key, err = makeKeyFile(r.keyFile, "--key"); err != nil {
			return err
		}
		g.log.Info("made a key; the server must enrol its public half: anytun-server invite --public-key",
			"file", r.keyFile, "public_key", r.key.Public().String())
	}
	servers, err := resolveServer(ctx, r.address)
	if err != nil {
		return err
	}
	g.log.Info("connecting", "version", cmd.Version(), "server", r.address, "public_key", r.key.Public().String())
	err = g.openTunnel(servers, r.serverKey, r.key, outerAddress(servers))
	if err == nil {
		return nil
	}
	// This host may have no IPv6, though the server has.
	ipv4 := slices.DeleteFunc(servers, func(s netip.AddrPort) bool { return s.Addr().Is6() })
	if len(ipv4) == 0 {
		return err
	}
	return g.openTunnel(ipv4, r.serverKey, r.key, outerAddress(ipv4))
}

func resolveServer(ctx context.Context, address string) ([]netip.AddrPort, error) {
	host, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, cmd.Usage("give HOST:PORT", "--server: %w", err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, cmd.Usage("give HOST:PORT", "--server: %q is not a port", portText)
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, cmd.Failure("check the name in --server and this host's resolver, or give the server's IP address",
			"look up the server: %w", err)
	}
	servers := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		servers = append(servers, netip.AddrPortFrom(ip.Unmap(), uint16(port)))
	}
	return servers, nil
}

// outerAddress returns what to bind the outer socket to so that it can send to
// all servers.
func outerAddress(servers []netip.AddrPort) netip.AddrPort {
	for _, s := range servers {
		if s.Addr().Is6() {
			return netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
}

func (g *gateway) openTunnel(servers []netip.AddrPort, serverKey session.PublicKey, key session.PrivateKey, bind netip.AddrPort) (err error) {
	if g.outer, err = udp.Listen(bind, udp.Options{}); err != nil {
		return cmd.Failure("check that this host has a network", "open the outer socket: %w", err)
	}
	t := newTunnel(serverKey, g.log)
	engine, err := client.New(client.Config{
		Conn: g.outer, Servers: servers, ServerKey: serverKey, Key: key,
		KeepAlive: g.keepAlive, MTU: g.mtu,
		Input: t.receive, OnSession: t.onSession,
		OnSuspect: t.onSuspect, OnGap: t.onGap, OnPorts: t.onPorts, Logger: g.log,
	})
	if err != nil {
		return err
	}
	t.output, t.more = engine.Output, engine.RequestPorts
	g.tunnel, g.client = t, engine
	return nil
}

// runTunnel runs the client engine and then ends the netstack.
func (g *gateway) runTunnel(ctx context.Context) error {
	var wg sync.WaitGroup
	waitCtx, cancel := context.WithCancel(ctx)
	wg.Go(func() { g.warnOfSilence(waitCtx) })
	wg.Go(func() { g.tunnel.recoverLoop(waitCtx) })
	wg.Go(func() { g.restLoop(waitCtx) })
	err := g.client.Run(ctx)
	cancel()
	wg.Wait()
	err = errors.Join(err, g.tunnel.close())
	if err == nil {
		err = ctx.Err()
	}
	return err
}

// warnOfSilence says once that no server answers, and what may be the cause: a
// server never answers strangers, so nothing tells the causes apart.
func (g *gateway) warnOfSilence(ctx context.Context) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-g.tunnel.made:
	case <-ctx.Done():
	case <-timer.C:
		g.log.Warn("the server does not answer; check its address and key, that UDP gets through, and that this client is enrolled",
			"server", g.serverName())
	}
}

func (g *gateway) serverName() string {
	if g.server == nil {
		return "embedded"
	}
	return g.server.address
}

func (g *gateway) runProxy(ctx context.Context) error {
	err := g.proxy.Serve(ctx, g.listeners...)
	if err == nil && g.draining.Load() {
		// Drained. The other tasks go on until the supervision ends them.
		<-ctx.Done()
	}
	if err == nil {
		err = ctx.Err()
	}
	return err
}

func (g *gateway) drain(ctx context.Context) {
	g.draining.Store(true)
	if err := g.proxy.Drain(ctx); err != nil {
		g.log.Warn("drain time is over; open connections were reset")
	}
}

func (g *gateway) reload() {
	if g.auth == nil {
		return
	}
	if err := g.auth.Reload(); err != nil {
		g.log.Error("the users stay as they were; correct the file and send SIGHUP again", "error", err)
		return
	}
	g.log.Info("read the auth file")
}

// listenApp opens a UDP association's socket towards the application.
func listenApp(at netip.AddrPort) (socks5.AppConn, error) {
	s, err := udp.ListenSocket(at, udp.Options{RecvBuffer: 1 << 20, SendBuffer: 1 << 20, Messages: 16, ShareBuffers: true})
	if err != nil {
		return nil, err
	}
	return s, nil
}
