package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
	"github.com/anytun-go/anytun/proxy"
)

const (
	minMTU         = 1280
	maxMTU         = 9000 // a jumbo frame; more never fits a real path
	maxConnections = 1 << 20
	dnsPort        = 53
)

// config is what the flags say, checked.
type config struct {
	listen      []string
	reachable   []string // those of listen that other hosts can reach
	server      *remote  // nil: a server inside this process
	auth        *proxy.Auth
	dns         []netip.AddrPort // of the server inside; empty: the host's
	mtu         int
	keepAlive   time.Duration
	maxConns    int
	maxUDP      int
	handshake   time.Duration
	dialTimeout time.Duration
	idle        time.Duration
	udpTimeout  time.Duration
	drainTime   time.Duration
	admin       string
}

// remote is a server elsewhere, and who we are there.
type remote struct {
	address   string // host:port
	serverKey session.PublicKey
	key       session.PrivateKey // zero until keyFile has been made
	keyFile   string             // empty: the invite held the key
}

// parseConfig checks every value and reads the files; it opens no socket and
// writes nothing.
func parseConfig(s *cmd.Settings) (*config, error) {
	c := &config{
		mtu:         s.Int("mtu"),
		keepAlive:   s.Duration("keep-alive"),
		maxConns:    s.Int("max-connections"),
		maxUDP:      s.Int("max-associations"),
		handshake:   s.Duration("handshake-timeout"),
		dialTimeout: s.Duration("dial-timeout"),
		idle:        s.Duration("idle-timeout"),
		udpTimeout:  s.Duration("udp-timeout"),
		drainTime:   s.Duration("drain-time"),
		admin:       s.String("admin"),
	}
	if err := errors.Join(
		s.CheckRange("mtu", minMTU, maxMTU),
		s.CheckRange("max-connections", 1, maxConnections),
		s.CheckRange("max-associations", 1, maxConnections),
		s.CheckDuration("keep-alive", session.MinKeepAlive, session.MaxKeepAlive),
		s.CheckDuration("handshake-timeout", time.Second, time.Hour),
		s.CheckDuration("dial-timeout", time.Second, time.Hour),
		s.CheckDuration("idle-timeout", 0, 30*24*time.Hour),
		s.CheckDuration("udp-timeout", time.Second, 24*time.Hour),
		s.CheckDuration("drain-time", 0, time.Hour),
		cmd.CheckAdmin(c.admin),
	); err != nil {
		return nil, cmd.First(err)
	}
	for _, address := range s.Strings("listen") {
		reachable, err := checkListen(address)
		if err != nil {
			return nil, err
		}
		if slices.Contains(c.listen, address) && !strings.HasSuffix(address, ":0") {
			return nil, cmd.Usage("give each address once", "--listen: %s stands there twice", address)
		}
		c.listen = append(c.listen, address)
		if reachable {
			c.reachable = append(c.reachable, address)
		}
	}
	if len(c.listen) == 0 {
		return nil, cmd.Usage("give an address such as 127.0.0.1:1080", "--listen: the list is empty")
	}
	if err := c.parseServer(s); err != nil {
		return nil, err
	}
	for _, text := range s.Strings("dns") {
		if c.server != nil {
			return nil, cmd.Usage("leave --dns out; the operator of the server sets its resolver",
				"--dns is for the server inside this process, but --server names another")
		}
		address, err := cmd.ParseAddrPort("--dns", text, dnsPort)
		if err != nil {
			return nil, err
		}
		c.dns = append(c.dns, address)
	}
	return c, c.parseAuth(s)
}

// checkListen says whether an address has one of the forms that proxy.Listen
// takes, and whether other hosts can reach it.
func checkListen(address string) (reachable bool, err error) {
	const hint = "give an IP address and a port such as 127.0.0.1:1080, or unix:///path, or fd://3"
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		if !strings.HasPrefix(path, "/") {
			return false, cmd.Usage(hint, "--listen: the path in %q does not begin with a slash", address)
		}
		return false, nil
	}
	if number, ok := strings.CutPrefix(address, "fd://"); ok {
		if n, err := strconv.ParseUint(number, 10, 16); err != nil || n < 3 {
			return false, cmd.Usage(hint, "--listen: %q names no inherited socket", address)
		}
		return false, nil
	}
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return false, cmd.Usage(hint, "--listen: %q is not an address", address)
	}
	switch host {
	case "localhost":
		return false, nil
	case "":
		return true, nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false, cmd.Usage(hint, "--listen: %q is not an address of this host in numbers", host)
	}
	return !ip.IsLoopback(), nil
}

func (c *config) parseServer(s *cmd.Settings) error {
	text := s.String("server")
	switch {
	case text == "":
		for _, flag := range []string{"server-key", "key"} {
			if s.IsSet(flag) && s.String(flag) != "" {
				return cmd.Usage("add --server HOST:PORT, or leave --"+flag+" out to use a server inside this process",
					"--%s is of no use without --server", flag)
			}
		}
		return nil
	case strings.HasPrefix(text, "@"):
		secret, err := cmd.ReadSecret(text[1:], "invite file")
		if err != nil {
			return err
		}
		text = strings.TrimSpace(string(secret))
		if !strings.HasPrefix(text, "anytun://") {
			return cmd.Usage("put the line that anytun-server invite printed into the file",
				"invite file %s holds no anytun:// URL", s.String("server")[1:])
		}
	}
	c.server = &remote{keyFile: s.String("key")}
	if strings.HasPrefix(text, "anytun:") {
		return c.server.parseInvite(s, text)
	}
	if !isHostPort(text) {
		return cmd.Usage("give the anytun:// URL of an invite, or HOST:PORT with --server-key and --key",
			"--server: %q is neither an anytun:// URL nor HOST:PORT", text)
	}
	c.server.address = text
	if s.String("server-key") == "" {
		return cmd.Usage("give the public key that anytun-server keygen printed, or the anytun:// URL of an invite as --server",
			"--server %s needs --server-key", text)
	}
	var err error
	if c.server.serverKey, err = session.ParsePublicKey(s.String("server-key")); err != nil {
		return cmd.Usage("give the public key that anytun-server keygen printed", "--server-key: %w", err)
	}
	if c.server.keyFile == "" {
		return cmd.Usage("add --key FILE; it is made at the first start", "--server %s needs --key", text)
	}
	return c.server.readKey()
}

func isHostPort(text string) bool {
	host, port, err := net.SplitHostPort(text)
	if err != nil || host == "" {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n != 0
}

func (r *remote) parseInvite(s *cmd.Settings, text string) error {
	invite, err := session.ParseInvite(text)
	if err != nil {
		return cmd.Usage("give the whole line that anytun-server invite printed, in quotation marks", "--server: %w", err)
	}
	if s.String("server-key") != "" {
		return cmd.Usage("leave --server-key out", "--server-key and the key in the anytun:// URL contradict each other")
	}
	r.address, r.serverKey, r.key = invite.Address, invite.ServerKey, invite.Key
	switch {
	case r.key == (session.PrivateKey{}) && r.keyFile == "":
		return cmd.Usage("add --key FILE, whose public half the server knows", "this anytun:// URL holds no secret, so --key is missing")
	case r.key != (session.PrivateKey{}) && r.keyFile != "":
		return cmd.Usage("leave --key out, or take &secret=… out of the URL",
			"--key and the secret in the anytun:// URL contradict each other")
	case r.keyFile != "":
		return r.readKey()
	}
	return nil
}

// readKey reads the key file if there is one.
func (r *remote) readKey() error {
	text, err := cmd.ReadSecret(r.keyFile, "key file")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r.key, err = parseKeyFile(text)
	if err != nil {
		return cmd.Usage("give the file that anytun-proxy keygen wrote, or one that does not exist yet", "key file %s: %w", r.keyFile, err)
	}
	return nil
}

func (c *config) parseAuth(s *cmd.Settings) error {
	pairs, file := s.Strings("auth"), s.String("auth-file")
	if len(pairs) == 0 && file == "" {
		return nil
	}
	var err error
	if c.auth, err = proxy.NewAuth(pairs, file); err != nil {
		hint := "give user:password; a password with a comma goes into --auth-file or on the command line"
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
			hint = "check the path given with --auth-file"
		case file != "":
			hint = "a line is user:hash as htpasswd -nB prints it; # begins a comment"
		}
		return cmd.Usage(hint, "%w", err)
	}
	return nil
}

// check is the subcommand, and what --check does.
func check(_ context.Context, s *cmd.Settings) error {
	if _, err := parseConfig(s); err != nil {
		return err
	}
	if _, err := cmd.NewLogger(s.Process.Stderr, s); err != nil {
		return err
	}
	return s.WriteEffective(s.Process.Stdout, map[string]func(string) string{
		"server": func(text string) string {
			if invite, err := session.ParseInvite(text); err == nil {
				return invite.Redacted()
			}
			return text
		},
		"auth": func(pair string) string {
			user, _, _ := strings.Cut(pair, ":")
			return user + ":***"
		},
	})
}
