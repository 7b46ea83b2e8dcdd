package server

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/anytun-go/anytun/anytun/session"
)

// testKey is a public key with every byte n.
func testKey(n byte) (k session.PublicKey) {
	for i := range k {
		k[i] = n
	}
	return k
}

func TestParseClients(t *testing.T) {
	a, b := testKey(1).String(), testKey(2).String()
	for _, test := range []struct {
		name, text string
		want       []Enrolment
		line       int // of the error; 0: none
		says       string
	}{
		{name: "empty", text: ""},
		{name: "comments and blanks", text: "# clients\n\n   \n\t# more\n"},
		{
			name: "two", text: a + " laptop 1\n" + b + "\tphone  4194303\n",
			want: []Enrolment{{Key: testKey(1), Name: "laptop", Number: 1}, {Key: testKey(2), Name: "phone", Number: 4194303}},
		},
		{
			name: "line ends of another system", text: a + " laptop 1\r\n" + b + " phone 2",
			want: []Enrolment{{Key: testKey(1), Name: "laptop", Number: 1}, {Key: testKey(2), Name: "phone", Number: 2}},
		},
		{
			name: "unpadded key, foreign name", text: strings.TrimRight(a, "=") + " küche 7\n",
			want: []Enrolment{{Key: testKey(1), Name: "küche", Number: 7}},
		},
		{
			name: "any port", text: a + " router 3 any-port\n",
			want: []Enrolment{{Key: testKey(1), Name: "router", Number: 3, AnyPort: true}},
		},
		{name: "unknown fourth word", text: a + " laptop 1 all-ports", line: 1, says: "this one has 4 words"},
		{name: "one word", text: "x\n", line: 1, says: "this one has 1 words"},
		{name: "four words", text: "\n" + a + " my laptop 1", line: 2, says: "this one has 4 words"},
		{name: "bad key", text: "AAAA laptop 1", line: 1, says: "a key is 32 bytes"},
		{name: "number 0", text: a + " laptop 0", line: 1, says: `"0" is not a client number`},
		{name: "number too large", text: a + " laptop 4194304", line: 1, says: `"4194304" is not a client number (1 to 4194303)`},
		{name: "number wraps", text: a + " laptop 4294967297", line: 1, says: "is not a client number"},
		{name: "negative", text: a + " laptop -1", line: 1, says: "is not a client number"},
		{name: "comment behind", text: a + " laptop #1", line: 1, says: "is not a client number"},
		{name: "control character", text: a + " lap\x01top 1", line: 1, says: "one word of printable"},
		{name: "not UTF-8", text: a + " lap\xfftop 1", line: 1, says: "one word of printable"},
		{name: "long name", text: a + " " + strings.Repeat("x", 65) + " 1", line: 1, says: "longer than 64"},
		{name: "key twice", text: a + " laptop 1\n\n" + a + " phone 2", line: 3, says: "the key of line 1 again"},
		{name: "name twice", text: a + " laptop 1\n" + b + " laptop 2", line: 2, says: `the name "laptop" of line 1 again`},
		{name: "number twice", text: a + " laptop 1\n" + b + " phone 01", line: 2, says: "the number 1 of line 1 again"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := ParseClients([]byte(test.text))
			if test.line == 0 {
				if err != nil || !slices.Equal(got, test.want) {
					t.Errorf("got %v, %v\nwant %v", got, err, test.want)
				}
				return
			}
			var le *LineError
			if !errors.As(err, &le) || le.Line != test.line || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, %v\nwant an error in line %d that says %q", got, err, test.line, test.says)
			}
		})
	}
}

func TestFreeNumber(t *testing.T) {
	a, b, c := testKey(1).String(), testKey(2).String(), testKey(3).String()
	for _, test := range []struct {
		name, text string
		want       uint32
	}{
		{"empty", "", 1},
		{"after two", a + " a 1\n" + b + " b 2\n", 3},
		{"a gap", a + " a 1\n" + b + " b 3\n", 2},
		{"out of use, not free", a + " a 1\n#" + b + " b 2\n # " + c + " c 3\n", 4},
		{"words are no clients", "# the 1\n", 1},
	} {
		if got, err := FreeNumber([]byte(test.text)); err != nil || got != test.want {
			t.Errorf("%s: got %d, %v, want %d", test.name, got, err, test.want)
		}
	}
}

func TestDirectory(t *testing.T) {
	d := NewDirectory([]Enrolment{{Key: testKey(1), Name: "a", Number: 1}, {Key: testKey(2), Name: "b", Number: 2}, {Key: testKey(3), Name: "c", Number: 3}})
	if n, name, ok := d.Lookup(testKey(2)); n != 2 || name != "b" || !ok {
		t.Errorf("Lookup: %d %q %v", n, name, ok)
	}
	if n, name, ok := d.Lookup(testKey(9)); n != 0 || name != "" || ok {
		t.Errorf("Lookup of a stranger: %d %q %v", n, name, ok)
	}
	if !d.Enrolled(3) || d.Enrolled(0) || d.Enrolled(4) || d.Len() != 3 {
		t.Error("Enrolled or Len is wrong")
	}
	// 1 stays under another name, 2 gets another key, 3 goes, 4 comes.
	gone := d.Replace([]Enrolment{{Key: testKey(1), Name: "renamed", Number: 1}, {Key: testKey(9), Name: "b", Number: 2}, {Key: testKey(4), Name: "d", Number: 4}})
	if !slices.Equal(gone, []uint32{2, 3}) {
		t.Errorf("gone: %v, want [2 3]", gone)
	}
	if _, _, ok := d.Lookup(testKey(2)); ok || d.Enrolled(3) || !d.Enrolled(4) {
		t.Error("the directory still knows the old list")
	}
}

func TestReloadKeepsTheOldListOnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clients")
	if _, err := LoadClients(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file gave %v", err)
	}
	if _, err := LoadClients(filepath.Dir(path)); err == nil || !strings.Contains(err.Error(), "is not a file") {
		t.Errorf("a directory gave %v", err)
	}
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(testKey(1).String() + " a 1\n")
	list, err := LoadClients(path)
	if err != nil {
		t.Fatal(err)
	}
	d := NewDirectory(list)
	write(testKey(1).String() + " a 1\n" + testKey(2).String() + " b\n")
	if _, err := d.Reload(path); err == nil || !strings.Contains(err.Error(), path+": line 2: ") {
		t.Errorf("a broken file gave %v", err)
	}
	if d.Len() != 1 || !d.Enrolled(1) {
		t.Error("a broken file changed the directory")
	}
	write(testKey(2).String() + " b 2\n")
	gone, err := d.Reload(path)
	if err != nil || !slices.Equal(gone, []uint32{1}) || !d.Enrolled(2) {
		t.Errorf("gone %v, %v", gone, err)
	}
}

func FuzzParseClients(f *testing.F) {
	f.Add([]byte(testKey(1).String() + " laptop 1\n# comment\n" + testKey(2).String() + " phone 2\n"))
	f.Add([]byte(testKey(1).String() + " a 1\r\n\r\n" + testKey(1).String() + " b 2"))
	f.Add([]byte("# " + testKey(1).String() + " a 1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := ParseClients(text)
		if err != nil {
			var le *LineError
			if !errors.As(err, &le) || le.Line < 1 {
				t.Fatalf("%v names no line", err)
			}
			return
		}
		// What was read can be written and read again, and is free of what
		// would make two clients one.
		var b strings.Builder
		for _, e := range list {
			b.WriteString(e.String() + "\n")
		}
		again, err := ParseClients([]byte(b.String()))
		if err != nil || !slices.Equal(list, again) {
			t.Fatalf("%v\nwas read again as\n%v, %v", list, again, err)
		}
		d := NewDirectory(list)
		if d.Len() != len(list) {
			t.Fatalf("%d of %d clients are in the directory", d.Len(), len(list))
		}
		free, err := FreeNumber(text)
		if err != nil || d.Enrolled(free) {
			t.Fatalf("the free number %d is taken, %v", free, err)
		}
	})
}
