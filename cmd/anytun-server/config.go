package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/anytun-go/anytun/anytun/announce"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
)

const (
	// defaultListen is every address of the host; where there is no IPv6 it
	// falls back to 0.0.0.0.
	defaultListen = "[::]:4444"

	dnsPort      = 53
	minMTU       = 1280
	maxMTU       = 9000 // a jumbo frame; more never fits a real path
	maxFlowLimit = 1 << 20
	maxServer    = 1<<16 - 1
)

// config is what the flags say, checked.
type config struct {
	listen       []netip.AddrPort
	fallback     bool // nobody asked for [::]: 0.0.0.0 will do
	clusterFile  string
	cluster      *session.Cluster
	stale        bool // the key file holds secrets that are past their time
	clientsFile  string
	clients      []server.Enrolment
	dns          []netip.AddrPort // empty: the host's
	number       uint16
	mtu          int
	keepAlive    time.Duration
	maxFlows     int
	maxPerClient int
	allowLocal   bool
	drainTime    time.Duration
	admin        string

	egress   egressConfig
	registry registryConfig
	announce *announce.Config // nil: nothing is announced
}

// parseConfig checks every value and reads the files; it opens no socket and
// writes nothing.
func parseConfig(s *cmd.Settings, now time.Time) (*config, error) {
	c := &config{
		fallback:   !s.IsSet("listen"),
		mtu:        s.Int("mtu"),
		keepAlive:  s.Duration("keep-alive"),
		maxFlows:   s.Int("max-flows"),
		allowLocal: s.Bool("allow-local"),
		drainTime:  s.Duration("drain-time"),
		admin:      s.String("admin"),
	}
	c.maxPerClient = s.Int("max-flows-per-client")
	for _, text := range s.Strings("listen") {
		address, err := cmd.ParseAddrPort("--listen", text, 0)
		if err != nil {
			return nil, err
		}
		if slices.Contains(c.listen, address) {
			return nil, cmd.Usage("give each address once", "--listen: %s stands there twice", text)
		}
		c.listen = append(c.listen, address)
	}
	for _, text := range s.Strings("dns") {
		address, err := cmd.ParseAddrPort("--dns", text, dnsPort)
		if err != nil {
			return nil, err
		}
		c.dns = append(c.dns, address)
	}
	if err := errors.Join(
		s.CheckRange("server-number", 0, maxServer),
		s.CheckRange("ports-per-client", 1, portblock.MaxPorts),
		s.CheckRange("mtu", minMTU, maxMTU),
		s.CheckRange("max-flows", 1, maxFlowLimit),
		s.CheckRange("max-flows-per-client", 1, maxFlowLimit),
		s.CheckDuration("keep-alive", session.MinKeepAlive, session.MaxKeepAlive),
		s.CheckDuration("drain-time", 0, time.Hour),
		cmd.CheckAdmin(c.admin),
	); err != nil {
		return nil, cmd.First(err)
	}
	if len(c.listen) == 0 {
		return nil, cmd.Usage("give an address such as 0.0.0.0:4444", "--listen: the list is empty")
	}
	c.number = uint16(s.Int("server-number"))
	if c.maxPerClient > c.maxFlows {
		return nil, cmd.Usage("lower --max-flows-per-client or raise --max-flows",
			"--max-flows-per-client (%d) is larger than --max-flows (%d)", c.maxPerClient, c.maxFlows)
	}
	if err := c.readFiles(s, now); err != nil {
		return nil, err
	}
	if err := c.parseEgress(s); err != nil {
		return nil, err
	}
	if err := c.parseRegistry(s); err != nil {
		return nil, err
	}
	if err := c.parseAnnounce(s); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *config) readFiles(s *cmd.Settings, now time.Time) (err error) {
	if c.clusterFile, err = stateFile(s, "cluster-key", "cluster.key"); err != nil {
		return err
	}
	if c.clientsFile, err = stateFile(s, "clients", "clients.txt"); err != nil {
		return err
	}
	if c.cluster, c.stale, err = readCluster(c.clusterFile, now); err != nil {
		return err
	}
	if c.clients, err = server.LoadClients(c.clientsFile); err != nil {
		return clientsError(c.clientsFile, err)
	}
	return nil
}

// stateFile returns the path in a flag, or that of the file in the state
// directory that stands in for it.
func stateFile(s *cmd.Settings, flag, name string) (string, error) {
	if path := s.String(flag); path != "" {
		return path, nil
	}
	if dir := s.String("state-dir"); dir != "" {
		return filepath.Join(dir, name), nil
	}
	hint := "make one with anytun-server keygen --out " + name + ", then give --" + flag + " " + name
	if flag == "clients" {
		hint = "make one with anytun-server invite, then give --" + flag + " " + name
	}
	return "", cmd.Usage(hint, "--%s is missing", flag)
}

// readCluster reads the cluster's key file. stale says that the file holds a
// secret that is not to be kept any more.
func readCluster(path string, now time.Time) (c *session.Cluster, stale bool, err error) {
	text, err := cmd.ReadSecret(path, "cluster key")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, cmd.Usage("make one with anytun-server keygen --out "+path, "cluster key: %w", rootCause(err))
	}
	if err != nil {
		return nil, false, err
	}
	c, err = session.ParseCluster(text, now)
	if err != nil {
		return nil, false, cmd.Usage("give the file that anytun-server keygen wrote", "cluster key %s: %w", path, err)
	}
	// The secret is the last line: when the file has another one, that is older.
	lines := bytes.Split(bytes.TrimSpace(c.Marshal()), []byte("\n"))
	return c, !bytes.Contains(text, lines[len(lines)-1]), nil
}

func rootCause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path
	}
	return err
}

func clientsError(path string, err error) error {
	hint := "check the path given with --clients"
	var line *server.LineError
	switch {
	case errors.As(err, &line):
		hint = "a line is a public key, a name and a number; # begins a comment"
	case errors.Is(err, fs.ErrNotExist):
		hint = "make it with anytun-server invite --clients " + path + " …"
	case errors.Is(err, fs.ErrPermission):
		hint = "let the user who runs the server read it"
	}
	return cmd.Usage(hint, "%w", err)
}

// check is the subcommand, and what --check does.
func check(_ context.Context, s *cmd.Settings) error {
	if _, err := parseConfig(s, time.Now()); err != nil {
		return err
	}
	if _, err := cmd.NewLogger(s.Process.Stderr, s); err != nil {
		return err
	}
	return s.WriteEffective(s.Process.Stdout, nil)
}
