//go:build linux

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// testSSH: a command, its exit status, and files both ways, through ssh's
// ProxyCommand with the SOCKS client of OpenBSD's nc.
func testSSH(t *testing.T, p *place) {
	require(t, "ssh", "scp", "ssh-keygen", "sshd", "nc.openbsd")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := p.site.host.dir
	hostKey, userKey := filepath.Join(dir, "ssh_host_key"), filepath.Join(dir, "ssh_user_key")
	for _, k := range []string{hostKey, userKey} {
		p.site.host.run(t, 10*time.Second, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", k)
	}
	public, err := os.ReadFile(hostKey + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "known_hosts"), fmt.Sprintf("[%s]:%d %s", webName, sshPort, public))
	write(t, filepath.Join(dir, "sshd_config"), fmt.Sprintf(`
Port %d
HostKey %s
AuthorizedKeysFile %s.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
`, sshPort, hostKey, userKey))
	if os.Geteuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // where Debian's sshd confines itself
			t.Fatal(err)
		}
	}
	sshd, err := exec.LookPath("sshd") // it insists on being called by its full path
	if err != nil {
		t.Fatal(err)
	}
	p.site.host.start(t, "sshd", sshd, "-D", "-e", "-f", filepath.Join(dir, "sshd_config")).listening(t, "tcp", sshPort)

	options := []string{
		"-F", "none", "-i", userKey, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + filepath.Join(dir, "known_hosts"),
		"-o", "ProxyCommand=nc.openbsd -X 5 -x " + proxyAddr + " %h %p",
	}
	ssh := func(command string) result {
		args := append([]string{"ssh", "-p", fmt.Sprint(sshPort)}, options...)
		return p.client.try(t, time.Minute, append(args, me.Username+"@"+webName, command)...)
	}
	if r := ssh("echo it is $((6*7)); echo oops >&2; exit 7"); r.code != 7 || r.stdout != "it is 42\n" || !strings.Contains(r.stderr, "oops") {
		t.Errorf("ssh: exit status %d, printed %q, %q", r.code, r.stdout, r.stderr)
	}
	_, part := payloads(t)
	there, back := filepath.Join(dir, "copied"), filepath.Join(p.client.dir, "copied-back")
	scp := append([]string{"scp", "-q", "-P", fmt.Sprint(sshPort)}, options...)
	remote := me.Username + "@" + webName + ":" + there
	p.client.run(t, time.Minute, append(scp, part.path, remote)...)
	if got, n := sumOfFile(t, there); got != part.sum {
		t.Errorf("scp up: %d bytes, sum %s, want %s", n, got, part.sum)
	}
	p.client.run(t, time.Minute, append(scp, remote, back)...)
	if got, n := sumOfFile(t, back); got != part.sum {
		t.Errorf("scp down: %d bytes, sum %s, want %s", n, got, part.sum)
	}
}

// testGit: a clone over HTTP, from plain files and from git's own program.
func testGit(t *testing.T, p *place) {
	require(t, "git", "fcgiwrap")
	origin := filepath.Join(p.site.host.dir, "origin")
	bare := filepath.Join(p.site.web, "repo.git")
	git := func(args ...string) string {
		return strings.TrimSpace(p.site.host.run(t, time.Minute, append([]string{
			"git", "-c", "user.name=Lab", "-c", "user.email=lab@lab.test", "-c", "init.defaultBranch=main", "-c", "safe.directory=*",
		}, args...)...))
	}
	git("init", "-q", origin)
	for i := range 20 {
		noise(t, filepath.Join(origin, fmt.Sprintf("dir%d", i%3), fmt.Sprintf("file%d", i)), 100_000, byte(i))
		git("-C", origin, "add", ".")
		git("-C", origin, "commit", "-q", "-m", fmt.Sprintf("commit %d", i))
	}
	want := git("-C", origin, "rev-parse", "HEAD")
	git("clone", "-q", "--bare", origin, bare)
	git("-C", bare, "update-server-info")
	p.site.host.start(t, "fcgiwrap", "fcgiwrap", "-s", "unix:"+filepath.Join(p.site.host.dir, "fcgi.sock"))

	for name, path := range map[string]string{"dumb": "/repo.git", "smart": "/smart/repo.git"} {
		t.Run(name, func(t *testing.T) {
			clone := filepath.Join(p.client.dir, "clone-"+name)
			// Without an address for its log git asks the host's resolver for the
			// host's own name, and nobody answers there.
			p.client.run(t, time.Minute, "git", "-c", "user.email=lab@lab.test", "-c", "user.name=Lab",
				"-c", "http.proxy=socks5h://"+proxyAddr, "clone", "-q", url("http", webName, httpPort, path), clone)
			if got := strings.TrimSpace(p.client.run(t, time.Minute, "git", "-C", clone, "rev-parse", "HEAD")); got != want {
				t.Errorf("cloned %s, want %s", got, want)
			}
			p.client.run(t, time.Minute, "git", "-C", clone, "fsck", "--full", "--strict")
		})
	}
}

// testChromium: a browser loads a page of a hundred objects.
func testChromium(t *testing.T, p *place) {
	require(t, "chromium")
	const objects = 100
	var page strings.Builder
	page.WriteString("<!doctype html><title>objects</title><script>var n = 0</script>\n")
	for i := range objects / 2 {
		script, picture := fmt.Sprintf("o/%d.js", i), fmt.Sprintf("o/%d.svg", i)
		write(t, filepath.Join(p.site.web, script), "n++; //"+strings.Repeat("x", 200*i)+"\n")
		write(t, filepath.Join(p.site.web, picture), `<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><!--`+
			strings.Repeat("y", 300*i)+`--><rect width="9" height="9"/></svg>`)
		fmt.Fprintf(&page, "<script src=%q async></script><img src=%q onload=\"n++\">\n", script, picture)
	}
	page.WriteString(`<p id=p></p><script>onload = () => { document.getElementById("p").textContent = "loaded " + n }</script>`)
	write(t, filepath.Join(p.site.web, "page.html"), page.String())

	dom := p.client.run(t, 90*time.Second, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(p.client.dir, "chromium"),
		"--proxy-server=socks5://"+proxyAddr, "--proxy-bypass-list=<-loopback>",
		"--timeout=60000", "--dump-dom", url("http", webName, httpPort, "/page.html"))
	if want := fmt.Sprintf("loaded %d<", objects); !strings.Contains(dom, want) {
		t.Errorf("the page doesn't say %q:\n%s", want, tail(dom, 10))
	}
}

// testProxychains: a program that knows nothing of proxies.
func testProxychains(t *testing.T, p *place) {
	require(t, "proxychains4", "curl")
	conf := filepath.Join(p.client.dir, "proxychains.conf")
	host, port, _ := strings.Cut(proxyAddr, ":")
	write(t, conf, "strict_chain\nproxy_dns\n[ProxyList]\nsocks5 "+host+" "+port+"\n")
	for _, target := range []any{webName, p.site.v4} {
		args := append([]string{"proxychains4", "-q", "-f", conf}, curlArgs(30*time.Second)...)
		if got := p.client.run(t, 40*time.Second, append(args, url("http", target, httpPort, "/"))...); got != "hello from nginx\n" {
			t.Errorf("%v: got %q", target, got)
		}
	}
}
