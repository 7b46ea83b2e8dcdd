//go:build linux

package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// bulkSize is what goes once each way per place: the gigabyte that has to
// arrive byte for byte.
const bulkSize = 1 << 30

// partSize goes each way with every other way of speaking to the proxy.
const partSize = 8<<20 + 12345

// A payload is a file to transfer.
type payload struct {
	name, path string
	size       int64
	sum        sum
}

// payloads makes the files once for all places.
func payloads(t *testing.T) (bulk, part payload) {
	t.Helper()
	made.Do(func() {
		made.bulk = newPayload(t, "bulk", bulkSize, 1)
		made.part = newPayload(t, "part", partSize, 2)
	})
	if made.part.sum == "" {
		t.Fatal("the files to transfer could not be made")
	}
	return made.bulk, made.part
}

var made struct {
	sync.Once
	bulk, part payload
}

func newPayload(t *testing.T, name string, size int64, seed byte) payload {
	t.Helper()
	path := filepath.Join(work, name)
	return payload{name, path, size, noise(t, path, size, seed)}
}

// curl runs curl on the client; it must succeed.
func (p *place) curl(t *testing.T, limit time.Duration, args ...string) string {
	t.Helper()
	return p.client.run(t, limit, curlArgs(limit, args...)...)
}

func curlArgs(limit time.Duration, args ...string) []string {
	return append([]string{"curl", "-sS", "--fail", "--max-time", fmt.Sprint(int(limit.Seconds()))}, args...)
}

// download is what curl gets, as its sum.
func (p *place) download(t *testing.T, limit time.Duration, args ...string) (sum, int64) {
	t.Helper()
	h := sha256.New()
	n := &counter{}
	r := p.client.stream(t, limit, nil, io.MultiWriter(h, n), curlArgs(limit, args...)...)
	if r.code != 0 {
		t.Fatalf("curl %s: exit status %d after %d bytes: %s", strings.Join(args, " "), r.code, n.bytes, r.stderr)
	}
	return sum(hex.EncodeToString(h.Sum(nil))), n.bytes
}

// A counter counts what is written to it.
type counter struct{ bytes int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.bytes += int64(len(b))
	return len(b), nil
}

func testCurl(t *testing.T, p *place) {
	require(t, "curl")
	bulk, part := payloads(t)
	for _, f := range []payload{bulk, part} {
		if err := os.Symlink(f.path, filepath.Join(p.site.web, f.name)); err != nil {
			t.Fatal(err)
		}
	}
	// Every way curl has of speaking to a proxy, with every kind of target that
	// this way can name.
	ways := []struct {
		name, scheme string
		targets      []any
	}{
		{"socks5", "socks5", []any{p.site.v4, p.site.v6}},
		{"socks5h", "socks5h", []any{webName, v4Name, v6Name, p.site.v4, p.site.v6}},
		{"socks4", "socks4", []any{p.site.v4}},
		{"socks4a", "socks4a", []any{webName, v6Name, p.site.v4}},
		{"http", "http", []any{webName, p.site.v4, p.site.v6}},
	}
	for _, w := range ways {
		proxy := w.scheme + "://" + proxyAddr
		for _, target := range w.targets {
			t.Run(fmt.Sprintf("%s/%v", w.name, target), func(t *testing.T) {
				for _, scheme := range []string{"http", "https"} {
					port := map[string]int{"http": httpPort, "https": httpsPort}[scheme]
					args := []string{"-x", proxy, "--cacert", p.site.cert}
					if target == v4Name || target == v6Name {
						args = append(args, "--insecure") // the certificate has one name
					}
					got := p.curl(t, 30*time.Second, append(args, url(scheme, target, port, "/"))...)
					if got != "hello from nginx\n" {
						t.Errorf("%s: got %q", scheme, got)
					}
				}
			})
		}
		t.Run(w.name+"/transfer", func(t *testing.T) {
			p.transfer(t, proxy, url("http", w.targets[0], httpPort, ""), part)
			p.transfer(t, proxy, url("https", w.targets[0], httpsPort, ""), part)
		})
	}
	t.Run("gigabyte", func(t *testing.T) {
		p.transfer(t, "socks5h://"+proxyAddr, url("http", webName, httpPort, ""), bulk)
	})
	t.Run("eight at once", func(t *testing.T) {
		args := []string{"-x", "socks5h://" + proxyAddr, "--parallel", "--parallel-immediate"}
		for i := range 8 {
			args = append(args, "-o", filepath.Join(p.client.dir, fmt.Sprint("eight", i)), url("http", webName, httpPort, "/part"))
		}
		p.curl(t, time.Minute, args...)
		for i := range 8 {
			if got, n := sumOfFile(t, filepath.Join(p.client.dir, fmt.Sprint("eight", i))); got != part.sum {
				t.Errorf("download %d: %d bytes, sum %s, want %s", i, n, got, part.sum)
			}
		}
	})
}

// transfer gets a file through the proxy and puts it back, and compares each.
func (p *place) transfer(t *testing.T, proxy, base string, f payload) {
	t.Helper()
	limit := 2 * time.Minute
	began := time.Now()
	got, n := p.download(t, limit, "-x", proxy, "--cacert", p.site.cert, base+"/"+f.name)
	down := time.Since(began)
	if got != f.sum {
		t.Errorf("down: %d bytes, sum %s, want %d bytes, %s", n, got, f.size, f.sum)
	}
	stored := filepath.Join(p.site.web, "put", f.name)
	began = time.Now()
	p.curl(t, limit, "-x", proxy, "--cacert", p.site.cert, "-H", "Expect:", "-T", f.path, base+"/put/"+f.name)
	up := time.Since(began)
	got, n = sumOfFile(t, stored)
	if got != f.sum {
		t.Errorf("up: %d bytes, sum %s, want %d bytes, %s", n, got, f.size, f.sum)
	}
	if err := os.Remove(stored); err != nil {
		t.Error(err)
	}
	t.Logf("%d bytes down in %.2f s (%.0f MB/s), up in %.2f s (%.0f MB/s)", f.size,
		down.Seconds(), float64(f.size)/down.Seconds()/1e6, up.Seconds(), float64(f.size)/up.Seconds()/1e6)
}
