// Command anytun-server is the server of an anytun cluster: it takes the sealed
// packets of enrolled clients and lets their traffic out.
package main

import (
	"context"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
)

func main() {
	os.Exit(run(context.Background(), cmd.OS()))
}

// run is main with the process handed in. It returns the exit code.
func run(ctx context.Context, p *cmd.Process) int {
	return program().Main(ctx, p)
}

const defaultAdmin = "127.0.0.1:9444"

func program() cmd.Program {
	return cmd.Program{
		Name:  "anytun-server",
		Usage: "lets the traffic of anytun clients out",
		Description: `Start with a key for the cluster and an invite for each client:

   anytun-server keygen --out cluster.key
   anytun-server invite --cluster-key cluster.key --clients clients.txt \
      --name laptop --address gw.example.net:4444
   anytun-server --cluster-key cluster.key --clients clients.txt`,
		Flags: serveFlags(),
		Run:   serve,
		Commands: []cmd.Command{
			{Name: "keygen", Usage: "make the key file of a new cluster and print its public key", Flags: keygenFlags(), Run: keygen},
			{Name: "invite", Usage: "add a client to the clients file and print its anytun:// URL", Flags: inviteFlags(), Run: invite},
			{Name: "status", Usage: "ask a running server how it is", Flags: statusFlags(), Run: cmd.ShowStatus},
			{Name: "check", Usage: "check flags and files, print the values in force, and exit", Flags: serveFlags(), Run: check},
		},
	}
}

func statusFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "admin", Value: defaultAdmin, Usage: "admin `ADDRESS` of the running server"},
		&cli.BoolFlag{Name: "json", DisableDefaultText: true, Usage: "print JSON"},
	}
}

func serveFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.StringSliceFlag{Name: "listen", Value: cli.NewStringSlice(defaultListen), Usage: "UDP `ADDRESS` to listen at, repeatable"},
		&cli.StringFlag{Name: "cluster-key", Usage: "key `FILE` of the cluster; default cluster.key in --state-dir"},
		&cli.StringFlag{Name: "clients", Usage: "`FILE` of the enrolled clients, read again on SIGHUP; default clients.txt in --state-dir"},
		&cli.StringFlag{Name: "state-dir", Usage: "`DIR` with the files that have no flag of their own"},
		&cli.StringFlag{Name: "egress", Value: "sockets", Usage: "`HOW` traffic leaves; sockets: as sockets of this host, no root needed"},
		&cli.StringSliceFlag{Name: "dns", Usage: "`RESOLVER` that clients' questions go to, repeatable; default those of this host"},
		&cli.IntFlag{Name: "server-number", Value: 1, Usage: "`NUMBER` of this server, which no other server of the cluster has"},
		&cli.IntFlag{Name: "mtu", Value: server.DefaultMTU, Usage: "largest inner packet in `BYTES`"},
		&cli.DurationFlag{Name: "keep-alive", Value: session.DefaultKeepAlive, Usage: "longest `INTERVAL` between a client's signs of life"},
		&cli.IntFlag{Name: "max-flows", Value: server.DefaultMaxFlows, Usage: "most TCP and UDP flows and pings at once"},
		&cli.IntFlag{Name: "max-flows-per-client", Value: server.DefaultMaxFlowsPerClient, Usage: "most of them for one client"},
		&cli.BoolFlag{Name: "allow-local", DisableDefaultText: true, Usage: "let clients reach this host's loopback and link-local addresses"},
		&cli.DurationFlag{Name: "drain-time", Value: 10 * time.Second, Usage: "`TIME` that open flows get to end after SIGTERM"},
		&cli.StringFlag{Name: "admin", Usage: "`ADDRESS` for /healthz, /readyz, /metrics, /status and /debug/pprof; off by default"},
		&cli.StringFlag{Name: "config", Usage: "TOML `FILE` with the long names of these flags as keys"},
		&cli.BoolFlag{Name: "check", DisableDefaultText: true, Usage: "check flags and files, print the values in force, and exit"},
	}, cmd.LogFlags()...)
}
