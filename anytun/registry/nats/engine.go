package nats

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/anytun-go/anytun/anytun/registry"
)

// engine is the NATS server inside: routes to the other servers, and JetStream for
// the claims. It can't have routes without a port for clients, so it has one on
// loopback, where nobody has the password; ours connects within the process.
type engine struct {
	server   *server.Server
	addr     string
	password string // of the only client
}

// engineUser is its name.
const engineUser = "anytun"

const (
	// A neighbour whose host vanished is noticed after 3 pings.
	routePing     = 3 * time.Second
	routePingsOut = 2

	startTimeout  = 20 * time.Second
	maxClaimBytes = 64 << 20 // of the bucket: some 300,000 claims
)

func startEngine(c Config) (*engine, error) {
	host, port, err := splitListen(c.Listen)
	if err != nil {
		return nil, err
	}
	// The claims are sealed, but nobody else's business.
	if err := os.MkdirAll(c.StoreDir, 0o700); err != nil {
		return nil, fmt.Errorf("store dir: %w", err)
	}
	if err := os.Chmod(c.StoreDir, 0o700); err != nil {
		return nil, fmt.Errorf("store dir: %w", err)
	}
	hidden, err := routePassword([]byte(c.Secret))
	if err != nil {
		return nil, err
	}
	neighbours, err := routeTLS([]byte(c.Secret))
	if err != nil {
		return nil, err
	}
	user := url.UserPassword(engineUser, hidden)
	routes, err := routeURLs(c.Join, user)
	if err != nil {
		return nil, err
	}
	client := rand.Text()
	options := &server.Options{
		ServerName: c.ServerName, NoSigs: true, NoLog: true,
		Host: "127.0.0.1", Port: server.RANDOM_PORT, Username: engineUser, Password: client,
		JetStream: true, StoreDir: filepath.Clean(c.StoreDir), DisableJetStreamBanner: true,
		JetStreamMaxMemory: 16 << 20, JetStreamMaxStore: 4 * maxClaimBytes,
		Routes: routes,
		Cluster: server.ClusterOpts{
			Name: c.ClusterName, Host: host, Port: port, Advertise: c.Advertise,
			Username: user.Username(), Password: hidden, AuthTimeout: 5,
			TLSConfig: neighbours, TLSTimeout: 5,
			PoolSize: 1, PingInterval: routePing, MaxPingsOut: routePingsOut,
		},
	}
	if len(routes) == 0 {
		// JetStream wants at least one route in a cluster. One to ourselves is
		// noticed and dropped.
		options.Routes = []*url.URL{{Scheme: "nats", User: user, Host: net.JoinHostPort("127.0.0.1", "1")}}
		if port > 0 {
			options.Routes[0].Host = net.JoinHostPort(dialHost(host), strconv.Itoa(port))
		}
	}
	s, err := server.NewServer(options)
	if err != nil {
		return nil, err
	}
	log := &engineLog{logger: c.Logger, hidden: hidden}
	s.SetLoggerV2(log, false, false, false)
	s.Start()
	ready := false
	for limit := time.Now().Add(startTimeout); !ready && log.fatal.Load() == nil && time.Now().Before(limit); {
		ready = s.ReadyForConnections(100 * time.Millisecond)
	}
	addr := s.ClusterAddr()
	fatal := log.fatal.Load()
	if fatal == nil && (!ready || addr == nil) {
		fatal = &notStarted
	}
	if fatal != nil {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, errors.New(*fatal)
	}
	return &engine{server: s, addr: addr.String(), password: client}, nil
}

var notStarted = "the server didn't get ready"

// stop ends the server and waits for its goroutines; it may be nil.
func (e *engine) stop() {
	if e == nil {
		return
	}
	e.server.Shutdown()
	e.server.WaitForShutdown()
}

// routePassword is a second lock behind routeTLS.
func routePassword(secret []byte) (string, error) {
	key, err := registry.DeriveKey(secret, "route password", 24)
	return hex.EncodeToString(key), err
}

// splitListen turns port 0 into what NATS calls a random port.
func splitListen(listen string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(listen)
	if err != nil {
		return "", 0, fmt.Errorf("cluster address %q: %w", listen, err)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("cluster address %q: port: %w", listen, err)
	}
	if n == 0 {
		return host, server.RANDOM_PORT, nil
	}
	return host, int(n), nil
}

func dialHost(host string) string {
	if host == "" || net.ParseIP(host).IsUnspecified() {
		return "127.0.0.1"
	}
	return host
}

func routeURLs(join []string, user *url.Userinfo) (urls []*url.URL, err error) {
	for _, j := range join {
		host, port, err := net.SplitHostPort(j)
		if err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("server to join %q: not host:port", j)
		}
		urls = append(urls, &url.URL{Scheme: "nats", User: user, Host: j})
	}
	return urls, nil
}

// engineLog gives the NATS server's lines to ours. Its notices are for somebody
// who runs NATS, not anytun, so they are one level lower here. Its Fatal doesn't
// end the program.
type engineLog struct {
	logger *slog.Logger
	hidden string // the routes' password, part of URLs
	fatal  atomic.Pointer[string]
}

func (l *engineLog) text(format string, v []any) string {
	return strings.ReplaceAll(fmt.Sprintf(format, v...), l.hidden, "***")
}

func (l *engineLog) Noticef(format string, v ...any) {
	l.logger.Debug("cluster engine", "text", l.text(format, v))
}

func (l *engineLog) Warnf(format string, v ...any) {
	l.logger.Debug("cluster engine warns", "text", l.text(format, v))
}

func (l *engineLog) Errorf(format string, v ...any) {
	l.logger.Warn("cluster engine failed", "text", l.text(format, v))
}

func (l *engineLog) Fatalf(format string, v ...any) {
	text := l.text(format, v)
	l.fatal.CompareAndSwap(nil, &text)
	l.logger.Error("cluster engine ended", "text", text)
}

func (l *engineLog) Debugf(string, ...any) {}
func (l *engineLog) Tracef(string, ...any) {}
