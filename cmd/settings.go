package cmd

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/urfave/cli/v2"
)

// notInFile are flags that say what this one run is to do; they have no
// environment twin and no key in the configuration file.
var notInFile = []string{"check", "help", "version"}

// Settings are the values of a command's flags after all four layers were
// looked at: command line, environment, file, default; the first that has a
// value wins, and a list from one layer replaces the list of a lower one.
type Settings struct {
	Process *Process

	c      *cli.Context
	flags  []cli.Flag
	source map[string]string // flag name -> where its value is from
}

// Twin returns the name of the environment variable that stands for a flag.
func Twin(flag string) string {
	return "ANYTUN_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// withTwins names each flag's environment variable in its help text. It changes
// and returns the flags, which are made anew for each run.
func withTwins(flags []cli.Flag) []cli.Flag {
	for _, f := range flags {
		name := f.Names()[0]
		if slices.Contains(notInFile, name) {
			continue
		}
		suffix := " [$" + Twin(name) + "]"
		switch f := f.(type) {
		case *cli.StringFlag:
			f.Usage += suffix
		case *cli.StringSliceFlag:
			f.Usage += suffix
		case *cli.IntFlag:
			f.Usage += suffix
		case *cli.DurationFlag:
			f.Usage += suffix
		case *cli.BoolFlag:
			f.Usage += suffix
		}
	}
	return slices.Clone(flags)
}

func load(c *cli.Context, flags []cli.Flag, p *Process) (*Settings, error) {
	s := &Settings{Process: p, c: c, flags: flags, source: make(map[string]string)}
	for _, f := range flags {
		name := f.Names()[0]
		if c.IsSet(name) {
			s.source[name] = "flag"
			continue
		}
		if slices.Contains(notInFile, name) {
			continue
		}
		value, ok := p.LookupEnv(Twin(name))
		if !ok || value == "" {
			continue
		}
		values := []string{value}
		if isList(f) {
			values = strings.Split(value, ",")
		}
		if err := s.set(f, values, Twin(name)); err != nil {
			return nil, err
		}
	}
	if s.has("config") && s.String("config") != "" {
		if err := s.loadFile(s.String("config")); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Settings) has(name string) bool {
	return slices.ContainsFunc(s.flags, func(f cli.Flag) bool { return f.Names()[0] == name })
}

func (s *Settings) set(f cli.Flag, values []string, source string) error {
	name := f.Names()[0]
	for _, v := range values {
		if err := s.c.Set(name, strings.TrimSpace(v)); err != nil {
			return wrongValue(source, strconv.Quote(v), name, s.c)
		}
	}
	s.source[name] = source
	return nil
}

func isList(f cli.Flag) bool {
	_, ok := f.(*cli.StringSliceFlag)
	return ok
}

func (s *Settings) loadFile(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return Usage("check the path given with --config", "read configuration: %w", err)
	}
	var keys map[string]any
	if _, err := toml.Decode(string(text), &keys); err != nil {
		return Usage("the file is TOML: one line per flag, such as listen = [\"127.0.0.1:1080\"]",
			"configuration %s: %w", path, err)
	}
	var known []string
	for _, f := range s.flags {
		if n := f.Names()[0]; n != "config" && !slices.Contains(notInFile, n) {
			known = append(known, n)
		}
	}
	for _, key := range sortedKeys(keys) {
		if !slices.Contains(known, key) {
			hint := "the keys are the long names of the flags; --help lists them"
			if near := Nearest(key, known); near != "" {
				hint = "did you mean " + near + "?"
			}
			return Usage(hint, "configuration %s: unknown key %q", path, key)
		}
	}
	for _, f := range s.flags {
		name := f.Names()[0]
		value, ok := keys[name]
		if !ok {
			continue
		}
		// A value of the wrong kind is an error even where a higher layer hides
		// it, so that a file is right or wrong by itself.
		values, ok := texts(f, value)
		if !ok {
			want, hint := wants(f)
			return Usage(hint, "configuration %s: %s: %v is not %s", path, name, value, want)
		}
		if s.source[name] != "" {
			continue
		}
		if err := s.set(f, values, "configuration "+path+": "+name); err != nil {
			return err
		}
		s.source[name] = path
	}
	return nil
}

// texts turns a TOML value into what would stand on the command line, when it
// has the flag's kind.
func texts(f cli.Flag, value any) ([]string, bool) {
	switch f.(type) {
	case *cli.IntFlag:
		n, ok := value.(int64)
		return []string{strconv.FormatInt(n, 10)}, ok
	case *cli.BoolFlag:
		b, ok := value.(bool)
		return []string{strconv.FormatBool(b)}, ok
	case *cli.StringSliceFlag:
		if list, ok := value.([]any); ok {
			var out []string
			for _, v := range list {
				text, ok := v.(string)
				if !ok {
					return nil, false
				}
				out = append(out, text)
			}
			return out, true
		}
	}
	text, ok := value.(string)
	return []string{text}, ok
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// String returns the value of a text flag.
func (s *Settings) String(name string) string { return s.c.String(name) }

// Strings returns the values of a repeatable flag.
func (s *Settings) Strings(name string) []string { return s.c.StringSlice(name) }

// Int returns the value of a number flag.
func (s *Settings) Int(name string) int { return s.c.Int(name) }

// Duration returns the value of a duration flag.
func (s *Settings) Duration(name string) time.Duration { return s.c.Duration(name) }

// Bool returns the value of a yes-or-no flag.
func (s *Settings) Bool(name string) bool { return s.c.Bool(name) }

// IsSet reports whether any layer but the default gave the flag a value.
func (s *Settings) IsSet(name string) bool { return s.source[name] != "" }

// WriteEffective writes the values in force as a TOML file, with a comment that
// says where each is from. The functions in secret, by flag name, replace a
// value by what may be shown.
func (s *Settings) WriteEffective(w io.Writer, secret map[string]func(string) string) error {
	for _, f := range s.flags {
		name := f.Names()[0]
		if name == "config" || slices.Contains(notInFile, name) {
			continue
		}
		show := func(v string) string {
			if hide := secret[name]; hide != nil && v != "" {
				v = hide(v)
			}
			return strconv.Quote(v)
		}
		var value string
		switch f.(type) {
		case *cli.IntFlag:
			value = strconv.Itoa(s.Int(name))
		case *cli.BoolFlag:
			value = strconv.FormatBool(s.Bool(name))
		case *cli.DurationFlag:
			value = strconv.Quote(s.Duration(name).String())
		case *cli.StringSliceFlag:
			var list []string
			for _, v := range s.Strings(name) {
				list = append(list, show(v))
			}
			value = "[" + strings.Join(list, ", ") + "]"
		default:
			value = show(s.String(name))
		}
		source := s.source[name]
		if source == "" {
			source = "default"
		}
		if _, err := fmt.Fprintf(w, "%-48s # %s\n", name+" = "+value, source); err != nil {
			return err
		}
	}
	return nil
}
