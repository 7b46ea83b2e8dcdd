package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
)

// A key file is one line with the private key in base64; lines that begin with
// # don't count.
const keyFileHeader = "# anytun client key. Keep it secret: whoever has it is this client.\n"

func formatKeyFile(key session.PrivateKey) []byte {
	return []byte(keyFileHeader + key.Text() + "\n")
}

// parseKeyFile reads the text of a key file. Its errors never repeat the text.
func parseKeyFile(text []byte) (key session.PrivateKey, err error) {
	var found bool
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if found {
			return session.PrivateKey{}, errors.New("more than one line that is not a comment")
		}
		if key, err = session.ParsePrivateKey(line); err != nil {
			return session.PrivateKey{}, err
		}
		found = true
	}
	if !found {
		return key, errors.New("no key in it")
	}
	return key, nil
}

// makeKeyFile makes a key and writes it to a new file.
func makeKeyFile(path, flag string) (session.PrivateKey, error) {
	key, err := session.NewPrivateKey()
	if err != nil {
		return key, err
	}
	err = cmd.CreateSecret(path, formatKeyFile(key))
	switch {
	case errors.Is(err, fs.ErrExist):
		return key, cmd.Usage("give another file with "+flag+"; the server knows this client by the key in that one", "%s exists already", path)
	case err != nil:
		return key, cmd.Usage("give a file in a directory that you may write to with "+flag, "write key file: %w", err)
	}
	return key, nil
}

// keygen makes a client's key file.
func keygen(_ context.Context, s *cmd.Settings) error {
	key, err := makeKeyFile(s.String("out"), "--out")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(s.Process.Stdout, key.Public())
	return err
}
