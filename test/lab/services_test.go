//go:build linux

package lab

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Ports of the destination's services: the same in both places.
const (
	httpPort  = 8080
	httpsPort = 8443
	sshPort   = 2222
	dnsPort   = 53
	closed    = 9 // nobody listens
)

// The names that the destination's resolver knows, and nobody else.
const (
	webName  = "web.lab.test"     // IPv4 and IPv6
	v4Name   = "four.lab.test"    // IPv4 alone
	v6Name   = "six.lab.test"     // IPv6 alone
	noName   = "nobody.lab.test"  // doesn't exist
	longName = "long.lab.test"    // a TXT answer of about 3 kB
	badName  = "refused.lab.test" // an address at which nothing listens

	ptrAddress = "192.0.2.250" // whose name is webName
)

// A site is what the destination offers.
type site struct {
	host   *host
	v4, v6 netip.Addr
	web    string // nginx's root folder
	cert   string // its certificate, PEM
}

// serve starts nginx and the resolver on h, which has the two addresses.
func serve(t *testing.T, h *host, v4, v6 netip.Addr) *site {
	t.Helper()
	require(t, "nginx", "unbound", "openssl")
	s := &site{host: h, v4: v4, v6: v6, web: filepath.Join(h.dir, "web"), cert: filepath.Join(h.dir, "cert.pem")}
	s.startNginx(t)
	s.startUnbound(t)
	return s
}

// url is an address of the site as a URL.
func url(scheme string, addr any, port int, path string) string {
	if a, ok := addr.(netip.Addr); ok && a.Is6() {
		return fmt.Sprintf("%s://[%s]:%d%s", scheme, a, port, path)
	}
	return fmt.Sprintf("%s://%s:%d%s", scheme, addr, port, path)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (s *site) startNginx(t *testing.T) {
	t.Helper()
	h := s.host
	h.run(t, 20*time.Second, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
		"-nodes", "-days", "2", "-subj", "/CN="+webName,
		"-addext", fmt.Sprintf("subjectAltName=DNS:%s,IP:%s,IP:%s", webName, s.v4, s.v6),
		"-keyout", filepath.Join(h.dir, "key.pem"), "-out", s.cert)
	write(t, filepath.Join(s.web, "index.html"), "hello from nginx\n")
	write(t, filepath.Join(h.dir, "nginx.conf"), strings.NewReplacer("DIR", h.dir, "WEB", s.web).Replace(`
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log stderr warn;
events { worker_connections 4096; }
http {
  access_log off;
  sendfile on;
  keepalive_requests 100000;
  client_max_body_size 0;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fcgi; uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
  types { text/html html; text/javascript js; image/svg+xml svg; }
  default_type application/octet-stream;
  server {
    listen 0.0.0.0:8080 backlog=4096; listen [::]:8080 ipv6only=on backlog=4096;
    listen 0.0.0.0:8443 ssl; listen [::]:8443 ssl ipv6only=on;
    ssl_certificate DIR/cert.pem; ssl_certificate_key DIR/key.pem;
    root WEB;
    location /who { return 200 "$remote_addr\n"; }
    location /slow { limit_rate 1m; alias WEB/; }
    location /put/ { dav_methods PUT; create_full_put_path on; }
    location ~ ^/smart(/.*)$ {
      fastcgi_pass unix:DIR/fcgi.sock;
      fastcgi_param SCRIPT_FILENAME /usr/lib/git-core/git-http-backend;
      fastcgi_param GIT_PROJECT_ROOT WEB;
      fastcgi_param GIT_HTTP_EXPORT_ALL "";
      fastcgi_param PATH_INFO $1;
      fastcgi_param QUERY_STRING $query_string;
      fastcgi_param REQUEST_METHOD $request_method;
      fastcgi_param CONTENT_TYPE $content_type;
      fastcgi_param HTTP_CONTENT_ENCODING $http_content_encoding;
    }
  }
}
`))
	d := h.start(t, "nginx", "nginx", "-c", filepath.Join(h.dir, "nginx.conf"), "-p", h.dir, "-e", "stderr")
	d.listening(t, "tcp", httpPort)
}

// startUnbound starts a resolver that knows the lab's zone and asks nobody.
func (s *site) startUnbound(t *testing.T) {
	t.Helper()
	h := s.host
	var long strings.Builder
	for i := range 12 {
		fmt.Fprintf(&long, "  local-data: '%s 60 TXT \"%02d%s\"'\n", longName, i, strings.Repeat("x", 248))
	}
	conf := filepath.Join(h.dir, "unbound.conf")
	write(t, conf, fmt.Sprintf(`
server:
  interface: 0.0.0.0
  interface: ::0
  port: %d
  access-control: 0.0.0.0/0 allow
  access-control: ::0/0 allow
  do-daemonize: no
  use-syslog: no
  chroot: ""
  username: ""
  directory: %q
  pidfile: ""
  num-threads: 1
  module-config: "iterator"
  edns-buffer-size: 4096
  max-udp-size: 4096
  local-zone: "." static
  local-zone: "lab.test." static
  local-data: "%s 60 A %s"
  local-data: "%s 60 AAAA %s"
  local-data: "%s 60 A %s"
  local-data: "%s 60 AAAA %s"
  local-data: "%s 60 A %s"
  local-data-ptr: "%s 60 %s"
%s
remote-control:
  control-enable: no
`, dnsPort, h.dir, webName, s.v4, webName, s.v6, v4Name, s.v4, v6Name, s.v6, badName, s.v4, ptrAddress, webName, long.String()))
	d := h.start(t, "unbound", "unbound", "-d", "-c", conf)
	d.listening(t, "udp", dnsPort)
}

// A sum is the SHA-256 of a byte stream, in hexadecimal.
type sum string

// sumOf reads r to its end.
func sumOf(t *testing.T, r io.Reader) (sum, int64) {
	t.Helper()
	h := sha256.New()
	n, err := io.CopyBuffer(h, struct{ io.Reader }{r}, make([]byte, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return sum(hex.EncodeToString(h.Sum(nil))), n
}

func sumOfFile(t *testing.T, path string) (sum, int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return sumOf(t, f)
}

// noise fills a file with size bytes that don't repeat and don't compress, and
// returns their sum. Different seeds give different bytes.
func noise(t *testing.T, path string, size int64, seed byte) sum {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block, err := aes.NewCipher(append(make([]byte, 15), seed))
	if err != nil {
		t.Fatal(err)
	}
	stream := cipher.StreamReader{S: cipher.NewCTR(block, make([]byte, 16)), R: zeros{}}
	h := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(f, h), io.LimitReader(stream, size), make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return sum(hex.EncodeToString(h.Sum(nil)))
}

// zeros reads as zero bytes for ever.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
