package cmd

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
)

// toy is a program with a flag of each kind. Its run prints the values it got.
func toy() Program {
	flags := append([]cli.Flag{
		&cli.StringSliceFlag{Name: "listen", Value: cli.NewStringSlice("127.0.0.1:1080"), Usage: "`ADDRESS` to listen at"},
		&cli.StringFlag{Name: "server", Usage: "server"},
		&cli.StringSliceFlag{Name: "auth", Usage: "user:password"},
		&cli.IntFlag{Name: "mtu", Value: 1400, Usage: "MTU"},
		&cli.DurationFlag{Name: "keep-alive", Value: 20 * time.Second, Usage: "interval"},
		&cli.BoolFlag{Name: "allow-local", Usage: "allow"},
		&cli.StringFlag{Name: "config", Usage: "TOML `FILE`"},
		&cli.BoolFlag{Name: "check", Usage: "check"},
	}, LogFlags()...)
	show := func(_ context.Context, s *Settings) error {
		if _, err := NewLogger(s.Process.Stderr, s); err != nil {
			return err
		}
		return s.WriteEffective(s.Process.Stdout, map[string]func(string) string{
			"auth": func(string) string { return "***" },
		})
	}
	return Program{
		Name: "toy", Usage: "tests the layers", Flags: flags, Run: show,
		Commands: []Command{
			{Name: "status", Usage: "status", Flags: []cli.Flag{
				&cli.StringFlag{Name: "admin", Value: "127.0.0.1:1", Usage: "address"},
				&cli.BoolFlag{Name: "json", Usage: "json"},
			}, Run: ShowStatus},
		},
	}
}

type result struct {
	code        int
	out, errors string
}

func runToy(t *testing.T, env map[string]string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := toy().Main(t.Context(), &Process{
		Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
		LookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
	})
	return result{code, out.String(), errs.String()}
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// line returns the line of the effective values that begins with name.
func (r result) line(name string) string {
	for l := range strings.Lines(r.out) {
		if strings.HasPrefix(l, name+" = ") {
			value, source, _ := strings.Cut(strings.TrimSpace(l), "#")
			return strings.TrimSpace(value) + " #" + source
		}
	}
	return ""
}

func TestPrecedence(t *testing.T) {
	file := write(t, `
listen = ["file:1", "file:2"]
mtu = 1301
keep-alive = "31s"
allow-local = true
server = "file"
`)
	env := map[string]string{"ANYTUN_LISTEN": "env:1, env:2", "ANYTUN_MTU": "1302", "ANYTUN_KEEP_ALIVE": "32s", "ANYTUN_CONFIG": file}
	for _, test := range []struct {
		name string
		env  map[string]string
		args []string
		want []string
	}{
		{
			"default", nil, nil,
			[]string{`listen = ["127.0.0.1:1080"] # default`, `mtu = 1400 # default`, `keep-alive = "20s" # default`, `allow-local = false # default`},
		},
		{
			"file", nil,
			[]string{"--config", file},
			[]string{`listen = ["file:1", "file:2"] # ` + file, `mtu = 1301 # ` + file, `keep-alive = "31s" # ` + file, `allow-local = true # ` + file},
		},
		{
			"environment over file", env, nil,
			[]string{`listen = ["env:1", "env:2"] # ANYTUN_LISTEN`, `mtu = 1302 # ANYTUN_MTU`, `keep-alive = "32s" # ANYTUN_KEEP_ALIVE`, `server = "file" # ` + file},
		},
		{
			"flag over environment", env,
			[]string{"--listen", "flag:1", "--listen", "flag:2", "--mtu=1303", "--keep-alive", "33s", "--allow-local=false"},
			[]string{`listen = ["flag:1", "flag:2"] # flag`, `mtu = 1303 # flag`, `keep-alive = "33s" # flag`, `allow-local = false # flag`},
		},
		{
			"a comma stays inside a flag's value", nil,
			[]string{"--server", "a,b"},
			[]string{`server = "a,b" # flag`},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := runToy(t, test.env, test.args...)
			if r.code != ExitDone {
				t.Fatalf("exit code %d: %s", r.code, r.errors)
			}
			for _, want := range test.want {
				name, _, _ := strings.Cut(want, " ")
				if got := r.line(name); got != want {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			}
		})
	}
}

// The effective values are a configuration file that means the same.
func TestEffectiveValuesAreAFile(t *testing.T) {
	first := runToy(t, nil, "--listen", "a:1", "--listen", `quote":2`, "--mtu", "1350", "--allow-local")
	second := runToy(t, nil, "--config", write(t, first.out))
	if second.code != ExitDone {
		t.Fatal(second.errors)
	}
	values := func(r result) (v []string) {
		for l := range strings.Lines(r.out) {
			value, _, _ := strings.Cut(l, " #")
			v = append(v, strings.TrimSpace(value))
		}
		return v
	}
	if a, b := strings.Join(values(first), "\n"), strings.Join(values(second), "\n"); a != b {
		t.Errorf("first:\n%s\nsecond:\n%s", a, b)
	}
}

func TestSecretsAreHidden(t *testing.T) {
	r := runToy(t, nil, "--auth", "alice:sesame")
	if r.code != ExitDone || strings.Contains(r.out, "sesame") || !strings.Contains(r.out, `auth = ["***"]`) {
		t.Errorf("exit code %d, output:\n%s", r.code, r.out)
	}
}

func TestWrongUsage(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.toml")
	for _, test := range []struct {
		name      string
		env       map[string]string
		args      []string
		says      string
		hint      string
		wantsCode int
	}{
		{"unknown flag", nil, []string{"--lisen", "x"}, "unknown flag --lisen", "did you mean --listen?", ExitUsage},
		{"unknown flag, nothing near", nil, []string{"--xyzzyxyzzy"}, "unknown flag --xyzzyxyzzy", "toy --help", ExitUsage},
		{"missing value", nil, []string{"--listen"}, "--listen needs a value", "--help", ExitUsage},
		{"not a number", nil, []string{"--mtu", "big"}, `--mtu: "big" is not a whole number`, "1400", ExitUsage},
		{"not a duration", nil, []string{"--keep-alive", "20"}, `--keep-alive: "20" is not a duration`, "20s", ExitUsage},
		{"not a bool", nil, []string{"--allow-local=maybe"}, `--allow-local: "maybe" is not true or false`, "give true or false", ExitUsage},
		{"not a number in the environment", map[string]string{"ANYTUN_MTU": "big"}, nil, `ANYTUN_MTU: "big" is not a whole number`, "1400", ExitUsage},
		{"unknown command", nil, []string{"statsu"}, `unknown command "statsu"`, "did you mean toy status?", ExitUsage},
		{"unknown flag of a command", nil, []string{"status", "--admn", "x"}, "unknown flag --admn", "did you mean --admin?", ExitUsage},
		{"argument of a command", nil, []string{"status", "now"}, `status takes no arguments, but got "now"`, "toy status --help", ExitUsage},
		{"flag before the command", nil, []string{"--mtu", "1400", "status"}, `--mtu stands before the command "status"`, "toy status --mtu", ExitUsage},
		{"no such file", nil, []string{"--config", missing}, "missing.toml: no such file or directory", "--config", ExitUsage},
		{"not TOML", nil, []string{"--config", write(t, "listen: x")}, "config.toml", "TOML", ExitUsage},
		{"unknown key", nil, []string{"--config", write(t, "lisen = 'x'")}, `unknown key "lisen"`, "did you mean listen?", ExitUsage},
		{"a key that is only a flag", nil, []string{"--config", write(t, "check = true")}, `unknown key "check"`, "long names of the flags", ExitUsage},
		{"table", nil, []string{"--config", write(t, "[server]\nx = 1")}, "server: map[x:1] is not a text", "quotation marks", ExitUsage},
		{"wrong kind", nil, []string{"--config", write(t, "mtu = '1400'")}, "mtu: 1400 is not a whole number", "1400", ExitUsage},
		{"wrong kind in a list", nil, []string{"--config", write(t, "listen = [1080]")}, "listen: [1080] is not a text or a list of texts", `["a", "b"]`, ExitUsage},
		{"wrong kind below a flag", nil, []string{"--mtu", "1400", "--config", write(t, "mtu = true")}, "mtu: true is not a whole number", "1400", ExitUsage},
		{"bad duration in a file", nil, []string{"--config", write(t, "keep-alive = 'soon'")}, `keep-alive: "soon" is not a duration`, "20s", ExitUsage},
		{"log level", nil, []string{"--log-level", "loud"}, `--log-level: "loud" is not a level`, "debug, info", ExitUsage},
		{"log format", nil, []string{"--log-format", "xml"}, `--log-format: "xml" is not a format`, "text or json", ExitUsage},
		{"nobody at the admin address", nil, []string{"status"}, "nobody answers on the admin address 127.0.0.1:1", "--admin", ExitFailure},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := runToy(t, test.env, test.args...)
			if r.code != test.wantsCode {
				t.Errorf("exit code %d, want %d", r.code, test.wantsCode)
			}
			checkReport(t, r.errors, test.says, test.hint)
			if r.out != "" {
				t.Errorf("standard output is not empty: %s", r.out)
			}
		})
	}
}

func checkReport(t *testing.T, report, says, hint string) {
	t.Helper()
	first, rest, _ := strings.Cut(report, "\n")
	if !strings.HasPrefix(first, "toy: error: ") || !strings.Contains(first, says) {
		t.Errorf("got %q, want an error that says %q", first, says)
	}
	if !strings.HasPrefix(rest, "toy: hint: ") || !strings.Contains(rest, hint) || strings.Count(rest, "\n") != 1 {
		t.Errorf("got %q, want one line of hint that says %q", rest, hint)
	}
}

func TestHelpAndVersion(t *testing.T) {
	r := runToy(t, nil, "--help")
	for _, want := range []string{"toy - tests the layers", "toy command [options]", "--listen ADDRESS", "[$ANYTUN_KEEP_ALIVE]", "(default: 20s)", "status"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("the help text lacks %q:\n%s", want, r.out)
		}
	}
	if r.code != ExitDone || r.errors != "" || strings.Contains(r.out, "ANYTUN_CHECK") {
		t.Errorf("exit code %d, errors %q, help text:\n%s", r.code, r.errors, r.out)
	}
	if r := runToy(t, nil, "status", "--help"); r.code != ExitDone || !strings.Contains(r.out, "toy status [options]") {
		t.Errorf("exit code %d, help text:\n%s", r.code, r.out)
	}
	if r := runToy(t, nil, "--version"); r.code != ExitDone || !strings.HasPrefix(r.out, "toy ") || !strings.Contains(r.out, " go1.") {
		t.Errorf("exit code %d, version %q", r.code, r.out)
	}
}
