package cmd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"
)

// Program is one of the commands: what it does without a subcommand, and its
// subcommands.
type Program struct {
	Name        string
	Usage       string // a few words for the first line of the help text
	Description string
	Flags       []cli.Flag
	Run         func(ctx context.Context, s *Settings) error
	Commands    []Command
}

// Command is one subcommand.
type Command struct {
	Name  string
	Usage string
	Flags []cli.Flag
	Run   func(ctx context.Context, s *Settings) error
}

// parsing guards cli.App.Run: the library keeps its help flag in a package
// variable and writes to it while parsing, which would race between two
// programs in one test process.
var parsing sync.Mutex

// Main parses p.Args, runs what they ask for and returns the exit code. Errors
// are reported on p.Stderr.
func (prog Program) Main(ctx context.Context, p *Process) int {
	run, err := prog.parse(ctx, p)
	if err == nil && run != nil {
		err = run()
	}
	return Report(p.Stderr, prog.Name, err)
}

// parse returns what is to be run, or nil when the arguments only asked for the
// help text or the version.
func (prog Program) parse(ctx context.Context, p *Process) (run func() error, err error) {
	app := &cli.App{
		Name:                      prog.Name,
		HelpName:                  prog.Name,
		Usage:                     prog.Usage,
		UsageText:                 prog.Name + " [options]\n" + prog.Name + " command [options]",
		Description:               prog.Description,
		Reader:                    p.Stdin,
		Writer:                    p.Stdout,
		ErrWriter:                 io.Discard, // Report writes the errors
		HideVersion:               true,
		HideHelpCommand:           true,
		DisableSliceFlagSeparator: true, // a value may contain a comma
		ExitErrHandler:            func(*cli.Context, error) {},
		OnUsageError:              prog.usageError,
		CustomAppHelpTemplate:     helpTemplate,
		Flags:                     withTwins(prog.Flags),
	}
	app.Flags = append(app.Flags, &cli.BoolFlag{Name: "version", Usage: "print the version and exit", DisableDefaultText: true})
	app.Action = func(c *cli.Context) error {
		if c.Bool("version") {
			_, err := fmt.Fprintln(p.Stdout, versionLine(prog.Name))
			return err
		}
		if c.Args().Present() {
			return prog.unknownCommand(c.Args().First())
		}
		s, err := load(c, prog.Flags, p)
		if err != nil {
			return err
		}
		run = func() error { return prog.Run(ctx, s) }
		return nil
	}
	for _, command := range prog.Commands {
		app.Commands = append(app.Commands, &cli.Command{
			Name:            command.Name,
			Usage:           command.Usage,
			UsageText:       prog.Name + " " + command.Name + " [options]",
			Flags:           withTwins(command.Flags),
			HideHelpCommand: true,
			OnUsageError:    prog.usageError,
			Action: func(c *cli.Context) error {
				if c.Args().Present() {
					return Usage("run "+prog.Name+" "+command.Name+" --help for its options",
						"%s takes no arguments, but got %q", command.Name, c.Args().First())
				}
				for _, parent := range c.Lineage()[1:] {
					if parent.Command == nil {
						continue
					}
					if names := parent.LocalFlagNames(); len(names) > 0 {
						return Usage("write "+prog.Name+" "+command.Name+" --"+names[0]+" …",
							"--%s stands before the command %q", names[0], command.Name)
					}
				}
				s, err := load(c, command.Flags, p)
				if err != nil {
					return err
				}
				run = func() error { return command.Run(ctx, s) }
				return nil
			},
		})
	}
	parsing.Lock()
	defer parsing.Unlock()
	if err := app.RunContext(ctx, append([]string{prog.Name}, p.Args...)); err != nil {
		return nil, err
	}
	return run, nil
}

func (prog Program) unknownCommand(word string) error {
	var names []string
	for _, c := range prog.Commands {
		names = append(names, c.Name)
	}
	hint := "the commands are " + strings.Join(names, ", ")
	if near := Nearest(word, names); near != "" {
		hint = "did you mean " + prog.Name + " " + near + "?"
	}
	return Usage(hint, "unknown command %q", word)
}

// usageError puts the flag package's sentences into the words of the command
// line: two dashes, and a hint.
func (prog Program) usageError(c *cli.Context, err error, _ bool) error {
	help := "run " + prog.Name + " --help for the options"
	if c.Command != nil && c.Command.Name != prog.Name && c.Command.Name != "" {
		help = "run " + prog.Name + " " + c.Command.Name + " --help for the options"
	}
	text := err.Error()
	if errors.Is(err, flag.ErrHelp) {
		return Usage(help, "no help on this")
	}
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		name = strings.TrimLeft(name, "-")
		var known []string
		if c.Command != nil {
			for _, f := range c.Command.Flags {
				known = append(known, f.Names()[0])
			}
		}
		if near := Nearest(name, known); near != "" {
			help = "did you mean --" + near + "?"
		}
		return Usage(help, "unknown flag --%s", name)
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		return Usage(help, "--%s needs a value", strings.TrimLeft(name, "-"))
	}
	for _, form := range []string{" for flag -", " for -"} { // the second is the form of booleans
		head, tail, ok := strings.Cut(text, form)
		if !ok {
			continue
		}
		name, _, _ := strings.Cut(tail, ":")
		value := strings.TrimPrefix(strings.TrimPrefix(head, "invalid value "), "invalid boolean value ")
		return wrongValue("--"+name, value, name, c)
	}
	return Usage(help, "%s", text)
}

// wrongValue says which kind of value the flag called name wants. quoted is the
// value that was given, in quotation marks; where names its origin.
func wrongValue(where, quoted, name string, c *cli.Context) error {
	for _, f := range c.Command.Flags {
		if f.Names()[0] == name {
			want, hint := wants(f)
			return Usage(hint, "%s: %s is not %s", where, quoted, want)
		}
	}
	return Usage("", "%s: wrong value %s", where, quoted)
}

func wants(f cli.Flag) (want, hint string) {
	switch f.(type) {
	case *cli.IntFlag:
		return "a whole number", "give a number such as 1400"
	case *cli.DurationFlag:
		return "a duration", "give a number with a unit, such as 20s or 5m"
	case *cli.BoolFlag:
		return "true or false", "give true or false"
	case *cli.StringSliceFlag:
		return "a text or a list of texts", `give one text, or a list such as ["a", "b"]`
	default:
		return "a text", "give a text in quotation marks"
	}
}

const helpTemplate = `{{.Name}} - {{.Usage}}

Usage:
   {{wrap .UsageText 3}}
{{if .Description}}
{{.Description}}
{{end}}{{if .VisibleCommands}}
Commands:{{template "visibleCommandTemplate" .}}
{{end}}{{if .VisibleFlags}}
Options:{{template "visibleFlagTemplate" .}}
{{end}}`
