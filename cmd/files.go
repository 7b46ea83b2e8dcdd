package cmd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// ReadSecret reads a file that holds a key or a password. A file that others
// may read is refused: what it holds is no secret any more.
func ReadSecret(path, what string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		hint := "check the path"
		if errors.Is(err, fs.ErrPermission) {
			hint = "run the command as the user who owns the file"
		}
		return nil, Usage(hint, "%s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, Usage("check the path", "%s: %w", what, err)
	}
	if !info.Mode().IsRegular() {
		return nil, Usage("give the path of an ordinary file", "%s: %s is not a file", what, path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 && runtime.GOOS != "windows" {
		return nil, Usage(fmt.Sprintf("run chmod 600 %s, and make a new one if others may have read it", path),
			"%s: %s can be read by others (mode %04o)", what, path, mode)
	}
	text, err := readAtMost(f, maxFileBytes)
	if err != nil {
		return nil, Usage("check the file", "%s: %w", what, err)
	}
	return text, nil
}

// maxFileBytes bounds key and password files, so that a wrong path such as a
// disk image gives an error instead of filling the memory.
const maxFileBytes = 1 << 20

func readAtMost(f *os.File, limit int) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(text) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", f.Name(), limit)
	}
	return text, err
}

// CreateSecret writes a new file that only its owner may read. It never
// overwrites: when the file exists the error matches fs.ErrExist.
func CreateSecret(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// ReplaceFile puts text in the place of a file in one step: a reader, or a
// machine that loses power, sees the old text or the new one.
func ReplaceFile(path string, text []byte, mode fs.FileMode) error {
	// Follow a symbolic link, so that the file it names is replaced and not the link.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
