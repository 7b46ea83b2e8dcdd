// Command anytun-proxy is the client's gateway: applications speak SOCKS5,
// SOCKS4a or HTTP to it, and it carries their traffic through an anytun tunnel.
package main

import (
	"context"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

func main() {
	os.Exit(run(context.Background(), cmd.OS()))
}

// run is main with the process handed in. It returns the exit code.
func run(ctx context.Context, p *cmd.Process) int {
	return program().Main(ctx, p)
}

const defaultAdmin = "127.0.0.1:9080"

func program() cmd.Program {
	return cmd.Program{
		Name:  "anytun-proxy",
		Usage: "a SOCKS and HTTP proxy whose traffic leaves at an anytun server",
		Description: `Without --server the process holds a server of its own, and traffic leaves
as sockets of this host:

   anytun-proxy --listen 127.0.0.1:1080

With the URL that anytun-server invite printed it leaves at that server:

   anytun-proxy --server 'anytun://gw.example.net:4444?key=…&secret=…'`,
		Flags: serveFlags(),
		Run:   serve,
		Commands: []cmd.Command{
			{Name: "keygen", Usage: "make a client's key file and print its public key", Flags: keygenFlags(), Run: keygen},
			{Name: "status", Usage: "ask a running proxy how it is", Flags: statusFlags(), Run: cmd.ShowStatus},
			{Name: "check", Usage: "check flags and files, print the values in force, and exit", Flags: serveFlags(), Run: check},
		},
	}
}

func keygenFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "out", Value: "client.key", Usage: "`FILE` to write; an existing one is never overwritten"},
	}
}

func statusFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "admin", Value: defaultAdmin, Usage: "admin `ADDRESS` of the running proxy"},
		&cli.BoolFlag{Name: "json", DisableDefaultText: true, Usage: "print JSON"},
	}
}

func serveFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.StringSliceFlag{Name: "listen", Value: cli.NewStringSlice("127.0.0.1:1080"), Usage: "`ADDRESS` for applications, repeatable: IP:PORT, unix:///path or fd://3"},
		&cli.StringFlag{Name: "server", Usage: "`URL` anytun://… from an invite, @FILE that holds one, or HOST:PORT; none: a server inside this process"},
		&cli.StringFlag{Name: "server-key", Usage: "public `KEY` of the cluster, with --server HOST:PORT"},
		&cli.StringFlag{Name: "key", Usage: "this client's key `FILE`, made at the first start; with --server HOST:PORT or an invite without a secret"},
		&cli.StringSliceFlag{Name: "auth", Usage: "`USER:PASSWORD` that applications must give, repeatable"},
		&cli.StringFlag{Name: "auth-file", Usage: "`FILE` of lines user:bcrypt-hash, read again on SIGHUP"},
		&cli.StringSliceFlag{Name: "dns", Usage: "`RESOLVER` of the server inside this process, repeatable; default those of this host"},
		&cli.IntFlag{Name: "mtu", Value: server.DefaultMTU, Usage: "largest inner packet in `BYTES`; the server may lower it"},
		&cli.DurationFlag{Name: "keep-alive", Value: session.DefaultKeepAlive, Usage: "`INTERVAL` between signs of life; the server may lower it"},
		&cli.IntFlag{Name: "max-connections", Value: proxy.DefaultMaxConns, Usage: "most connections of applications at once"},
		&cli.IntFlag{Name: "max-associations", Value: socks5.DefaultMaxAssociations, Usage: "most SOCKS5 UDP associations at once"},
		&cli.DurationFlag{Name: "handshake-timeout", Value: proxy.DefaultHandshakeTimeout, Usage: "`TIME` an application gets to say what it wants"},
		&cli.DurationFlag{Name: "dial-timeout", Value: proxy.DefaultDialTimeout, Usage: "`TIME` a destination gets to answer, its name's look-up included"},
		&cli.DurationFlag{Name: "idle-timeout", Usage: "end connections in which nothing moved for this `TIME`; 0: never"},
		&cli.DurationFlag{Name: "udp-timeout", Value: socks5.DefaultUDPIdleTimeout, Usage: "end UDP associations in which nothing moved for this `TIME`"},
		&cli.DurationFlag{Name: "drain-time", Value: 10 * time.Second, Usage: "`TIME` that open connections get to end after SIGTERM"},
		&cli.StringFlag{Name: "admin", Usage: "`ADDRESS` for /healthz, /readyz, /metrics, /status and /debug/pprof; off by default"},
		&cli.StringFlag{Name: "config", Usage: "TOML `FILE` with the long names of these flags as keys"},
		&cli.BoolFlag{Name: "check", DisableDefaultText: true, Usage: "check flags and files, print the values in force, and exit"},
	}, cmd.LogFlags()...)
}
