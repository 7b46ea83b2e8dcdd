package nats

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/test/loopback"
)

const secret = "the cluster's secret"

// memory is a Handler that keeps what it hears, like a server.
type memory struct {
	mu        sync.Mutex
	locations map[uint32]registry.Location
	seen      map[uint32]uint64
	mappings  map[registry.Mapping]bool
	claims    map[string]registry.Claim
	block     chan struct{} // not nil: Location waits for it
}

func newMemory() *memory {
	return &memory{
		locations: map[uint32]registry.Location{}, seen: map[uint32]uint64{},
		mappings: map[registry.Mapping]bool{}, claims: map[string]registry.Claim{},
	}
}

func (h *memory) Location(l registry.Location) {
	if h.block != nil {
		<-h.block
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old, ok := h.locations[l.Client]; !ok || l.Newer(old) {
		h.locations[l.Client] = l
	}
}

func (h *memory) Seen(seen []registry.Seen) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range seen {
		h.seen[s.Client] = max(h.seen[s.Client], s.Counter)
	}
}

func (h *memory) Mapping(m registry.Mapping) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mappings[m] = true
}

func (h *memory) Claimed(c registry.Claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.claims[claimKey(c)] = c
}

func (h *memory) Released(c registry.Claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.claims, claimKey(c))
}

func (h *memory) Snapshot(yield func(registry.Location) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.locations {
		if !yield(l) {
			return
		}
	}
}

func (h *memory) Mappings(yield func(registry.Mapping) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.mappings {
		if !yield(m) {
			return
		}
	}
}

func (h *memory) at(client uint32) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.locations[client].Counter
}

func (h *memory) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.locations)
}

func (h *memory) owner(key string) uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.claims[key].Owner
}

func location(client uint32, counter uint64, server uint16) registry.Location {
	return registry.Location{
		Client: client, Session: uint64(client) << 32, Epoch: 7, Counter: counter, Server: server,
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(client)}), 4000),
		Local:    netip.MustParseAddrPort("203.0.113.1:4444"),
	}
}

// node is a server of a test's cluster.
type node struct {
	*Bus
	*memory
	number uint16
	config Config
	stop   func()
}

// tell is what a server does that hears a client: it knows, and publishes.
func (n *node) tell(client uint32, counter uint64) {
	n.memory.Location(location(client, counter, n.number))
	n.PublishLocation(location(client, counter, n.number))
}

// start runs a server until the test ends or stop is called.
func start(t testing.TB, number uint16, c Config, h *memory) *node {
	t.Helper()
	return startHello(t, number, c, h, 500*time.Millisecond)
}

func startHello(t testing.TB, number uint16, c Config, h *memory, hello time.Duration) *node {
	t.Helper()
	b, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	b.helloInterval, b.stepTimeout = hello, 3*time.Second
	if h == nil {
		h = newMemory()
	}
	n := &node{Bus: b, memory: h, number: number, config: c}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, h) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) && !errors.Is(err, registry.ErrClosed) {
			t.Errorf("Run: %v", err)
		}
		if err := errors.Join(b.Close(), b.Close()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

// configs returns the settings of a cluster of n on free addresses.
func configs(t testing.TB, n int) []Config {
	t.Helper()
	var addrs []string
	for range n {
		addrs = append(addrs, loopback.Addr(t))
	}
	cs := make([]Config, n)
	for i := range cs {
		cs[i] = Config{
			Listen: addrs[i], Join: addrs, ServerName: fmt.Sprintf("s%d", i+1), StoreDir: t.TempDir(), Secret: secret,
			Logger: testLogger(t),
		}
	}
	return cs
}

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("REGISTRY_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("test", t.Name())
}

// cluster starts all servers of a cluster, in that order.
func cluster(t testing.TB, order ...int) ([]*node, []Config) {
	t.Helper()
	cs := configs(t, len(order))
	nodes := make([]*node, len(order))
	for _, i := range order {
		nodes[i] = start(t, uint16(i+1), cs[i], nil)
	}
	together(t, nodes...)
	return nodes, cs
}

// together waits until all know each other.
func together(t testing.TB, nodes ...*node) {
	t.Helper()
	eventually(t, "all servers know each other", func() bool {
		for _, n := range nodes {
			if n.Bus.Stats().Peers != len(nodes)-1 {
				return false
			}
		}
		return true
	})
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(45 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("never: %s", what)
		}
	}
}

// claims tries until there is somebody to decide.
func claims(t testing.TB, n *node, c registry.Claim) (got registry.Claim, err error) {
	t.Helper()
	eventually(t, "a decision on claims", func() bool {
		got, err = n.Bus.Claim(context.Background(), c)
		return !errors.Is(err, registry.ErrUnavailable)
	})
	return got, err
}

func block(index, owner uint32) registry.Claim {
	return registry.Claim{Kind: registry.ClaimBlock, Index: index, Owner: owner, Until: time.Now().Add(time.Hour)}
}

// TestMain looks for goroutines that outlive their registry.
func TestMain(m *testing.M) {
	code := runTests(m)
	os.Exit(code) //nolint:forbidigo // the way of TestMain
}

func runTests(m *testing.M) int {
	if helper() {
		return 0
	}
	// Most of the time goes into waiting for elections, so run them all at once.
	flag.Parse()
	if err := flag.Set("test.parallel", "12"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if code != 0 {
		return code
	}
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		buf := make([]byte, 1<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "nats-io") && !strings.Contains(stacks, "registry/nats.(") {
			return 0
		}
		if time.Now().After(limit) {
			fmt.Fprintln(os.Stderr, "left running:\n"+stacks)
			return 1
		}
	}
}

func TestClusterForms(t *testing.T) {
	t.Parallel()
	for _, order := range [][]int{{0, 1, 2}, {2, 0, 1}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			t.Parallel()
			begin := time.Now()
			nodes, _ := cluster(t, order...)
			t.Log("formed after", time.Since(begin))
			nodes[0].tell(1, 10)
			nodes[1].PublishSeen([]registry.Seen{{Client: 1, Counter: 11}, {Client: 2, Counter: 5}})
			nodes[2].PublishMapping(registry.Mapping{Client: 3, Protocol: 17, Inner: 53, Public: 2000, Since: 1})
			eventually(t, "all know all", func() bool {
				h := nodes[0].memory
				h.mu.Lock()
				defer h.mu.Unlock()
				return nodes[1].at(1) == 10 && nodes[2].at(1) == 10 && h.seen[1] == 11 && h.seen[2] == 5 && len(h.mappings) == 1
			})
			t.Log("told after", time.Since(begin))
			mine, err := claims(t, nodes[0], block(5, 1))
			if err != nil || mine.Owner != 1 {
				t.Fatal(mine, err)
			}
			t.Log("claimed after", time.Since(begin))
			if got, err := claims(t, nodes[1], block(5, 2)); !errors.Is(err, registry.ErrTaken) || got.Owner != 1 {
				t.Error("twice:", got, err)
			}
			eventually(t, "all are told of the claim", func() bool {
				return nodes[0].owner("block.5") == 1 && nodes[1].owner("block.5") == 1 && nodes[2].owner("block.5") == 1
			})
			if err := nodes[2].Bus.Release(t.Context(), block(5, 1)); err != nil {
				t.Error(err)
			}
			if got, err := claims(t, nodes[1], block(5, 2)); err != nil || got.Owner != 2 {
				t.Error("after the release:", got, err)
			}
			eventually(t, "all are told of the new claim", func() bool {
				return nodes[0].owner("block.5") == 2 && nodes[1].owner("block.5") == 2 && nodes[2].owner("block.5") == 2
			})
			t.Log("done after", time.Since(begin))
		})
	}
}
