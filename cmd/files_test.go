package cmd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestReadSecret(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("windows has no mode bits to check")
	}
	dir := t.TempDir()
	for _, test := range []struct {
		name, path string
		mode       fs.FileMode // 0: not made
		says       string      // "": accepted
	}{
		{"owner only", "good", 0o600, ""},
		{"read only", "readonly", 0o400, ""},
		{"group", "group", 0o640, "can be read by others (mode 0640)"},
		{"world", "world", 0o604, "can be read by others (mode 0604)"},
		{"missing", "missing", 0, "no such file"},
		{"directory", ".", 0, "is not a file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(dir, test.path)
			if test.mode != 0 {
				if err := os.WriteFile(path, []byte("secret"), test.mode); err != nil {
					t.Fatal(err)
				}
			}
			text, err := ReadSecret(path, "key")
			if test.says == "" {
				if err != nil || string(text) != "secret" {
					t.Fatalf("got %q, %v", text, err)
				}
				return
			}
			var e *Error
			if !errors.As(err, &e) || e.Code != ExitUsage || e.Hint == "" || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want a usage error with a hint that says %q", err, test.says)
			}
		})
	}
}

func TestReadSecretRefusesHugeFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "huge")
	if err := CreateSecret(path, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, maxFileBytes+1); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSecret(path, "key"); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("got %v", err)
	}
}

func TestCreateAndReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := CreateSecret(path, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := CreateSecret(path, []byte("two")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwriting gave %v, want fs.ErrExist", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Skip("no symbolic links here: ", err)
	}
	if err := ReplaceFile(link, []byte("three"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "three" {
		t.Errorf("the file behind the link holds %q, %v", text, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("temporary files are left: %v, %v", entries, err)
	}
	if err := ReplaceFile(filepath.Join(path, "below"), nil, 0o600); err == nil {
		t.Error("replacing below a file did not fail")
	}
}
