package server

import (
	"bytes"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// dnsHostFiles names the host's files that the service resolves like the host
// with. An empty name means the system's usual file.
type dnsHostFiles struct {
	Hosts      string // hosts(5)
	ResolvConf string // resolv.conf(5)
}

func (f *dnsHostFiles) fill() {
	if f.Hosts == "" {
		f.Hosts = "/etc/hosts"
		if runtime.GOOS == "windows" {
			f.Hosts = os.Getenv("SystemRoot") + `\System32\drivers\etc\hosts`
		}
	}
	if f.ResolvConf == "" {
		f.ResolvConf = "/etc/resolv.conf"
	}
}

const (
	dnsFileCheck   = 2 * time.Second // how often a file is looked at
	dnsFileMax     = 16 << 20        // block lists are hosts files of some megabytes
	dnsMaxResolver = 8               // nameserver lines that are used
)

// dnsFile is a file of the host, parsed again when it has changed. What could
// be read last stays when it can't be read any more.
type dnsFile[T any] struct {
	path  string
	parse func([]byte) *T

	value atomic.Pointer[T]

	loading sync.Mutex // held while reading; others go on with the old value
	checked time.Time
	size    int64
	changed time.Time
}

// get returns what the file says; never nil.
func (f *dnsFile[T]) get(now time.Time) *T {
	v := f.value.Load()
	if v == nil {
		f.loading.Lock() // the first readers have nothing to go on with
	} else if !f.loading.TryLock() {
		return v
	}
	defer f.loading.Unlock()
	v = f.value.Load()
	if v != nil && now.Sub(f.checked) < dnsFileCheck && !now.Before(f.checked) {
		return v
	}
	f.checked = now
	st, err := os.Stat(f.path)
	if err == nil && (v == nil || st.Size() != f.size || !st.ModTime().Equal(f.changed)) {
		if b, err := readAtMost(f.path, dnsFileMax); err == nil {
			v = f.parse(b)
			f.size, f.changed = st.Size(), st.ModTime()
		}
	}
	if v == nil {
		v = f.parse(nil)
	}
	f.value.Store(v)
	return v
}

// readAtMost reads the first limit bytes of a file.
func readAtMost(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// parseResolvConf returns the resolvers of a resolv.conf. Options and search
// lists are for programs that make up names; the service is given whole ones.
func parseResolvConf(b []byte) *[]netip.AddrPort {
	out := new([]netip.AddrPort)
	for line := range bytes.Lines(b) {
		if len(line) == 0 || line[0] == ';' || line[0] == '#' {
			continue
		}
		f := strings.Fields(string(line))
		if len(f) < 2 || f[0] != "nameserver" || len(*out) == dnsMaxResolver {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			*out = append(*out, netip.AddrPortFrom(a, dnsPort))
		}
	}
	return out
}

// dnsHosts is a parsed hosts file; names are in the wire form of dnsKey.
type dnsHosts struct {
	addrs map[string][]netip.Addr
	names map[netip.Addr]string // the first name of an address
}

// parseHosts reads a hosts file: an address and its names on each line, then
// perhaps a comment. Lines it can't make sense of are skipped, as by the
// system's resolver.
func parseHosts(b []byte) *dnsHosts {
	h := &dnsHosts{addrs: make(map[string][]netip.Addr), names: make(map[netip.Addr]string)}
	for line := range bytes.Lines(b) {
		if i := bytes.IndexByte(line, '#'); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		a, err := netip.ParseAddr(f[0])
		if err != nil {
			continue
		}
		a = a.Unmap().WithZone("")
		for _, text := range f[1:] {
			name, ok := dnsWireName(text)
			if !ok {
				continue
			}
			if _, ok := h.names[a]; !ok {
				h.names[a] = name
			}
			known := false
			for _, have := range h.addrs[name] {
				known = known || have == a
			}
			if !known {
				h.addrs[name] = append(h.addrs[name], a)
			}
		}
	}
	return h
}

// dnsWireName turns a host name into the wire form of dnsKey.
func dnsWireName(text string) (string, bool) {
	text = strings.TrimSuffix(text, ".")
	if text == "" || len(text) > dnsMaxName-2 {
		return "", false
	}
	b := make([]byte, 0, len(text)+2)
	for label := range strings.SplitSeq(text, ".") {
		if label == "" || len(label) > dnsMaxLabel {
			return "", false
		}
		b = append(b, byte(len(label)))
		for _, c := range []byte(label) {
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			b = append(b, c)
		}
	}
	return string(append(b, 0)), true
}

// dnsTextName turns the wire form into text without a final dot; false for the
// root and for labels that text can't hold.
func dnsTextName(wire string) (string, bool) {
	var b strings.Builder
	for len(wire) > 1 {
		n := int(wire[0])
		if n == 0 || n+1 > len(wire) {
			return "", false
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		for _, c := range []byte(wire[1 : 1+n]) {
			if c <= ' ' || c == '.' || c == '\\' || c >= 0x7f {
				return "", false
			}
			b.WriteByte(c)
		}
		wire = wire[1+n:]
	}
	return b.String(), b.Len() > 0
}
