package server

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/anytun-go/anytun/anytun/session"
)

// Enrolment is one line of the clients file: whose key it is, what the operator
// calls the client, and the number that its inner addresses and ports follow from.
type Enrolment struct {
	Key    session.PublicKey
	Name   string
	Number uint32 // 1 to session.MaxClient
	// AnyPort lets the client send from ports outside its blocks: what sends
	// there isn't our netstack but, say, a kernel.
	AnyPort bool
}

// anyPort is the fourth word of such a client's line.
const anyPort = "any-port"

// String returns the enrolment as a line of the clients file, without the end
// of line.
func (e Enrolment) String() string {
	line := e.Key.String() + " " + e.Name + " " + strconv.FormatUint(uint64(e.Number), 10)
	if e.AnyPort {
		line += " " + anyPort
	}
	return line
}

const (
	// maxClientsBytes bounds a clients file; some 60 bytes a line, it has room
	// for more than a million clients.
	maxClientsBytes = 64 << 20
	// maxNameBytes bounds a client's name, which stands in logs.
	maxNameBytes = 64
)

// ErrNumbersUsed says that every client number is taken.
var ErrNumbersUsed = errors.New("all client numbers are taken")

// LineError says which line of a clients file is wrong, and what with.
type LineError struct {
	Line int // from 1
	Err  error
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }

// Unwrap returns what is wrong with the line.
func (e *LineError) Unwrap() error { return e.Err }

// ParseClients reads the text of a clients file. A line holds public key, name
// and number with blanks between them, and may end with the word any-port; empty lines and lines that begin with #
// don't count. Two lines must not have a key, a name or a number in common.
// Errors are *LineError values.
func ParseClients(text []byte) ([]Enrolment, error) {
	var list []Enrolment
	keys := make(map[session.PublicKey]int)
	names := make(map[string]int)
	numbers := make(map[uint32]int)
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		e, err := parseEnrolment(line)
		if err != nil {
			return nil, &LineError{n, err}
		}
		switch {
		case keys[e.Key] != 0:
			err = fmt.Errorf("the key of line %d again", keys[e.Key])
		case names[e.Name] != 0:
			err = fmt.Errorf("the name %q of line %d again", e.Name, names[e.Name])
		case numbers[e.Number] != 0:
			err = fmt.Errorf("the number %d of line %d again", e.Number, numbers[e.Number])
		}
		if err != nil {
			return nil, &LineError{n, err}
		}
		keys[e.Key], names[e.Name], numbers[e.Number] = n, n, n
		list = append(list, e)
	}
	return list, nil
}

func parseEnrolment(line string) (e Enrolment, err error) {
	fields := strings.Fields(line)
	if len(fields) == 4 && fields[3] == anyPort {
		e.AnyPort = true
		fields = fields[:3]
	}
	if len(fields) != 3 {
		return e, fmt.Errorf("a line is a public key, a name and a number, but this one has %d words", len(fields))
	}
	if e.Key, err = session.ParsePublicKey(fields[0]); err != nil {
		return e, err
	}
	if err := CheckName(fields[1]); err != nil {
		return e, err
	}
	e.Name = fields[1]
	number, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil || number < 1 || number > session.MaxClient {
		return e, fmt.Errorf("%q is not a client number (1 to %d)", fields[2], session.MaxClient)
	}
	e.Number = uint32(number)
	return e, nil
}

// CheckName says what is wrong with a client's name: it stands in a file of
// words and in logs, so it is one word of printable characters.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > maxNameBytes:
		return fmt.Errorf("the name is longer than %d bytes", maxNameBytes)
	case !utf8.ValidString(name) || strings.HasPrefix(name, "#") ||
		strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fmt.Errorf("the name %q is not one word of printable characters", name)
	}
	return nil
}

// FreeNumber returns the lowest client number that no line of a clients file
// has. Lines that were put out of use with a # keep their number: a client that
// was removed may hold a session for its number until the epoch has passed, so
// the next one must not get it.
func FreeNumber(text []byte) (uint32, error) {
	taken := make(map[uint32]bool)
	for line := range strings.Lines(string(text)) {
		if e, err := parseEnrolment(strings.TrimLeft(line, "# \t")); err == nil {
			taken[e.Number] = true
		}
	}
	for n := uint32(1); n <= session.MaxClient; n++ {
		if !taken[n] {
			return n, nil
		}
	}
	return 0, ErrNumbersUsed
}

// LoadClients reads a clients file.
func LoadClients(path string) ([]Enrolment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("clients file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("clients file: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("clients file: %s is not a file", path)
	case info.Size() > maxClientsBytes:
		return nil, fmt.Errorf("clients file: %s is larger than %d bytes", path, maxClientsBytes)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("clients file: %w", err)
	}
	list, err := ParseClients(text)
	if err != nil {
		return nil, fmt.Errorf("clients file %s: %w", path, err)
	}
	return list, nil
}

// Directory knows who is enrolled. Look-ups are safe for concurrent use and
// never wait for a Replace.
type Directory struct {
	current atomic.Pointer[enrolments]
}

// enrolments is never changed once it is in a Directory.
type enrolments struct {
	byKey    map[session.PublicKey]Enrolment
	byNumber map[uint32]session.PublicKey
	anyPort  map[uint32]bool // few
	highest  uint32
}

// NewDirectory returns a directory of the clients in list, which has no
// duplicates.
func NewDirectory(list []Enrolment) *Directory {
	d := new(Directory)
	d.current.Store(index(list))
	return d
}

func index(list []Enrolment) *enrolments {
	e := &enrolments{
		byKey:    make(map[session.PublicKey]Enrolment, len(list)),
		byNumber: make(map[uint32]session.PublicKey, len(list)),
		anyPort:  make(map[uint32]bool),
	}
	for _, c := range list {
		e.byKey[c.Key] = c
		e.byNumber[c.Number] = c.Key
		e.highest = max(e.highest, c.Number)
		if c.AnyPort {
			e.anyPort[c.Number] = true
		}
	}
	return e
}

// Lookup finds a client by its key, as a handshake does.
func (d *Directory) Lookup(key session.PublicKey) (number uint32, name string, ok bool) {
	c, ok := d.current.Load().byKey[key]
	return c.Number, c.Name, ok
}

// Enrolled says whether a client number is still in use. A server asks it
// before it accepts a session that another server made.
func (d *Directory) Enrolled(number uint32) bool {
	_, ok := d.current.Load().byNumber[number]
	return ok
}

// AnyPort says whether a client may send from ports outside its blocks.
func (d *Directory) AnyPort(number uint32) bool { return d.current.Load().anyPort[number] }

// Highest returns the highest number that is enrolled.
func (d *Directory) Highest() uint32 { return d.current.Load().highest }

// Len returns the number of clients.
func (d *Directory) Len() int { return len(d.current.Load().byKey) }

// Replace puts list in the place of what the directory knew. It returns, in
// rising order, the numbers whose client is gone or has another key now: their
// sessions are to be dropped.
func (d *Directory) Replace(list []Enrolment) (gone []uint32) {
	next := index(list)
	old := d.current.Swap(next)
	for number, key := range old.byNumber {
		if now, ok := next.byNumber[number]; !ok || now != key {
			gone = append(gone, number)
		}
	}
	slices.Sort(gone)
	return gone
}

// Reload replaces the directory by what the clients file at path holds now. A
// file that can't be read or has an error changes nothing.
func (d *Directory) Reload(path string) (gone []uint32, err error) {
	list, err := LoadClients(path)
	if err != nil {
		return nil, err
	}
	return d.Replace(list), nil
}
