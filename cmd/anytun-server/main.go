// Command anytun-server is the server of an anytun cluster: it takes the sealed
// packets of enrolled clients and lets their traffic out.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/anytun-go/anytun/anytun/portblock"
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
			{Name: "drain", Usage: "make a running server withdraw its routes, serve on for its drain time, and end", Flags: drainFlags(), Run: drain},
			{Name: "check", Usage: "check flags and files, print the values in force, and exit", Flags: serveFlags(), Run: check},
		},
	}
}

func drainFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "admin", Value: defaultAdmin, Usage: "admin `ADDRESS` of the running server"},
	}
}

// drain tells a running server to end without breaking anything.
func drain(ctx context.Context, s *cmd.Settings) error {
	if err := cmd.AskDrain(ctx, s.String("admin")); err != nil {
		return err
	}
	_, err := fmt.Fprintln(s.Process.Stdout, "draining")
	return err
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
		&cli.StringFlag{Name: "egress", Value: egressSockets, Usage: "`HOW` traffic leaves; sockets: as sockets of this host, no root needed; tun: by a TUN device, from --egress-address"},
		&cli.StringFlag{Name: "tun", Value: "anytun0", Usage: "`NAME` of the TUN device"},
		&cli.StringSliceFlag{Name: "egress-address", Usage: "`ADDRESS` that clients' traffic leaves from with --egress tun, IPv4, IPv6 or an IPv6 prefix, repeatable; the same on all servers, in the same order"},
		&cli.IntFlag{Name: "ports-per-client", Value: portblock.DefaultPorts, Usage: "`NUMBER` of ports of an egress address that each client has; the same on all servers"},
		&cli.StringSliceFlag{Name: "dns", Usage: "`RESOLVER` that clients' questions go to, repeatable; default those of this host"},
		&cli.IntFlag{Name: "server-number", Usage: "`NUMBER` of this server, which no other server of the cluster has; default 1, or one that the registry leases"},
		&cli.StringFlag{Name: "registry", Value: registryMemory, Usage: "`WHERE` servers tell each other of clients; memory: this server is alone; nats://HOST:PORT: a NATS server"},
		&cli.StringFlag{Name: "cluster-listen", Usage: "`ADDRESS` at which the other servers reach this one's own NATS server"},
		&cli.StringSliceFlag{Name: "cluster-join", Usage: "--cluster-listen `ADDRESS` of another server, repeatable"},
		&cli.StringSliceFlag{Name: "announce", Usage: "`PREFIX` to announce to --bgp-peer while the server is well, repeatable; default its --listen and --egress-address"},
		&cli.StringFlag{Name: "announce-hook", Usage: "shell `COMMAND` that is run with announce or withdraw, for routing daemons of your own"},
		&cli.StringSliceFlag{Name: "bgp-peer", Usage: "`ADDRESS@AS` of a router to announce to, repeatable; add ,bfd or ,multihop=N"},
		&cli.IntFlag{Name: "bgp-as", Usage: "autonomous system `NUMBER` of this server"},
		&cli.StringFlag{Name: "bgp-router-id", Usage: "BGP identifier, an IPv4 `ADDRESS` that no other router has"},
		&cli.StringFlag{Name: "bgp-password-file", Usage: "`FILE` with the TCP MD5 password of the sessions"},
		&cli.IntFlag{Name: "bgp-port", Usage: "TCP `PORT` at which routers may open the session; 0: only this server opens it"},
		&cli.DurationFlag{Name: "bgp-hold-time", Value: 9 * time.Second, Usage: "`TIME` after which routers drop the routes of a server they don't hear"},
		&cli.DurationFlag{Name: "bfd-interval", Value: 200 * time.Millisecond, Usage: "`INTERVAL` of BFD, for peers with bfd; three silent ones are the end"},
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
