package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/registry/nats"
	"github.com/anytun-go/anytun/cmd"
)

const registryMemory = "memory"

// A server's number is leased for numberLease and renewed every numberRenew. A
// server that was killed blocks its number for that long, for others.
const (
	numberLease = 10 * time.Minute
	numberRenew = 3 * time.Minute
	// numberWait bounds the wait for a number at the start: a cluster that is
	// started as a whole needs some seconds until it has a majority.
	numberWait = 2 * time.Minute
	numberTry  = 500 * time.Millisecond
	// numberPatience is how long a server that had a number before waits.
	numberPatience = 10 * time.Second
)

// registryConfig is what the flags say about the registry.
type registryConfig struct {
	url    string // of a NATS server
	listen string // of the server's own
	join   []string
	dir    string // of what that one keeps
}

// alone says that there are no other servers.
func (c *registryConfig) alone() bool { return c.url == "" && c.listen == "" }

func (c *config) parseRegistry(s *cmd.Settings) error {
	r := &c.registry
	r.listen, r.join = s.String("cluster-listen"), s.Strings("cluster-join")
	switch where := s.String("registry"); {
	case where == registryMemory:
	case r.listen != "":
		return cmd.Usage("give one of the two", "--registry %s and --cluster-listen are both there", where)
	default:
		u, err := url.Parse(where)
		if err != nil || u.Scheme != "nats" && u.Scheme != "tls" || u.Host == "" {
			return cmd.Usage("give memory, or a URL such as nats://192.0.2.10:4222", "--registry: %q is neither memory nor a NATS server's URL", where)
		}
		r.url = where
	}
	if dir := s.String("state-dir"); dir != "" {
		r.dir = filepath.Join(dir, "registry")
	} else {
		r.dir = filepath.Join(filepath.Dir(c.clusterFile), "registry")
	}
	if r.listen == "" {
		if len(r.join) > 0 {
			return cmd.Usage("add --cluster-listen with the address at which the others reach this server", "--cluster-join needs --cluster-listen")
		}
		return nil
	}
	if _, port, err := net.SplitHostPort(r.listen); err != nil || port == "" || port == "0" {
		return cmd.Usage("give the address and port at which other servers reach this one, such as 192.0.2.11:6222",
			"--cluster-listen: %q is not an address with a port", r.listen)
	}
	for _, text := range r.join {
		if err := checkHostPort(text); err != nil {
			return cmd.Usage("give the --cluster-listen address of another server, such as 192.0.2.12:6222", "--cluster-join %s: %w", text, err)
		}
	}
	return nil
}

// openRegistry makes this server's end of the registry.
func (c *config) openRegistry(logger *slog.Logger) (registry.Registry, error) {
	r := &c.registry
	if r.alone() {
		return registry.NewMemory(), nil
	}
	public := c.cluster.Public()
	key := c.cluster.RegistryKey()
	reg, err := nats.New(nats.Config{
		URL: r.url, Listen: r.listen, Join: r.join, StoreDir: r.dir, Advertise: r.advertise(),
		ClusterName: "anytun-" + hex.EncodeToString(public[:8]), ServerName: serverName(r.listen),
		Secret: hex.EncodeToString(key[:]), Logger: logger,
	})
	if err != nil {
		return nil, cmd.Failure("check --registry, --cluster-listen and --cluster-join", "registry: %w", err)
	}
	return reg, nil
}

// advertise is what other servers are told to connect to: the very address in
// --cluster-listen, since a server of a cluster has anycast addresses, too, which
// lead to anybody.
func (r *registryConfig) advertise() string {
	if a, err := netip.ParseAddrPort(r.listen); err == nil && !a.Addr().IsUnspecified() {
		return r.listen
	}
	return ""
}

// maxServerName is the longest name that the registry's engine takes.
const maxServerName = 32

// serverName names this server to the registry's engine, by the address at which
// the others reach it. It stays the same when the server starts again.
func serverName(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return ""
	}
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		host, _ = os.Hostname() // without one the port is the name
	}
	name := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '-'
	}, host) + "-" + port
	if len(name) > maxServerName {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:maxServerName/2])
	}
	return name
}

// owner identifies this server in the claim for its number: a server with an
// address of its own is the same when it starts again, and gets the number that
// it had.
func (r *registryConfig) owner() uint32 {
	b := sha256.Sum256([]byte(serverName(r.listen)))
	if r.listen == "" {
		_, _ = rand.Read(b[:]) // never fails: crypto/rand
	}
	return binary.BigEndian.Uint32(b[:]) | 1
}

// numberHolder keeps this server's number.
type numberHolder struct {
	registry registry.Registry
	claim    registry.Claim
	log      *slog.Logger
	file     string // holds the number of the last time
}

// leaseNumber gets a number that no other server of the cluster has. It waits
// until the registry can say so; but a server that had a number before goes on
// with that one when there is nobody to ask, since it would else be down with the
// others, and asks again later.
func leaseNumber(ctx context.Context, reg registry.Registry, r *registryConfig, logger *slog.Logger) (*numberHolder, error) {
	ctx, cancel := context.WithTimeout(ctx, numberWait)
	defer cancel()
	h := &numberHolder{
		registry: reg, log: logger, file: filepath.Join(r.dir, "server-number"),
		claim: registry.Claim{Kind: registry.ClaimServer, Index: 1, Owner: r.owner()},
	}
	before := h.load()
	began, told := time.Now(), false
	again := time.NewTicker(numberTry)
	defer again.Stop()
	for {
		h.claim.Until = time.Now().Add(numberLease).Round(0)
		_, err := reg.Claim(ctx, h.claim)
		switch {
		case err == nil:
			logger.Info("leased a server number", "server_number", h.claim.Index)
			h.save()
			return h, nil
		case errors.Is(err, registry.ErrTaken):
			if h.claim.Index++; h.claim.Index > maxServer {
				return nil, cmd.Failure("wait until the leases of servers that are gone have ended, or give --server-number", "every server number is taken")
			}
			continue
		case before != 0 && time.Since(began) > numberPatience:
			h.claim.Index = before
			logger.Warn("the registry can't be asked; going on with the server number of the last time", "server_number", before, "reason", err)
			return h, nil
		case !told:
			told = true
			logger.Info("waiting for the registry, for a server number", "reason", err)
		}
		select {
		case <-ctx.Done():
			return nil, cmd.Failure("check that the other servers run and --cluster-join names them, or give --server-number",
				"the registry gives this server no number: %w", err)
		case <-again.C:
		}
	}
}

// load returns the number of the last time, or 0.
func (h *numberHolder) load() uint32 {
	text, err := os.ReadFile(h.file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 16)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// save keeps the number for the next start.
func (h *numberHolder) save() {
	err := os.MkdirAll(filepath.Dir(h.file), 0o700)
	if err == nil {
		err = cmd.ReplaceFile(h.file, []byte(strconv.FormatUint(uint64(h.claim.Index), 10)+"\n"), 0o600)
	}
	if err != nil {
		h.log.Warn("can't keep the server number for the next start", "error", err)
	}
}

// run renews the lease until ctx ends, and gives the number back then.
func (h *numberHolder) run(ctx context.Context) error {
	t := time.NewTicker(numberRenew)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		h.claim.Until = time.Now().Add(numberLease).Round(0)
		_, err := h.registry.Claim(ctx, h.claim)
		switch {
		case errors.Is(err, registry.ErrTaken):
			// Clients take packets of two senders of one number for replays.
			return fmt.Errorf("server number %d is another server's now", h.claim.Index)
		case err != nil && ctx.Err() == nil:
			h.log.Warn("can't renew the lease of this server's number", "error", err)
		}
	}
}

// release gives the number back. It is called while the registry still runs.
func (h *numberHolder) release() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := h.registry.Release(ctx, h.claim); err != nil {
		h.log.Debug("can't give the server number back", "error", err)
	}
}
