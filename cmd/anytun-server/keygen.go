package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/cmd"
)

func keygenFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "out", Value: "cluster.key", Usage: "`FILE` to write; an existing one is never overwritten"},
	}
}

// keygen makes a cluster's key file.
func keygen(_ context.Context, s *cmd.Settings) error {
	path := s.String("out")
	cluster, err := session.NewCluster(time.Now())
	if err != nil {
		return err
	}
	err = cmd.CreateSecret(path, cluster.Marshal())
	switch {
	case errors.Is(err, fs.ErrExist):
		return cmd.Usage("give another file with --out; every invite names the key that is in this one",
			"%s exists already", path)
	case err != nil:
		return cmd.Usage("give a file in a directory that you may write to with --out", "write cluster key: %w", err)
	}
	_, err = fmt.Fprintln(s.Process.Stdout, cluster.Public())
	return err
}

func inviteFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "cluster-key", Usage: "key `FILE` of the cluster"},
		&cli.StringFlag{Name: "clients", Usage: "`FILE` of the enrolled clients; made if need be"},
		&cli.StringFlag{Name: "state-dir", Usage: "`DIR` with the files that have no flag of their own"},
		&cli.StringFlag{Name: "name", Usage: "what to call the client: one `WORD`"},
		&cli.StringFlag{Name: "address", Usage: "`HOST:PORT` at which clients reach the servers"},
		&cli.StringFlag{Name: "public-key", Usage: "`KEY` that the client made itself; the URL then holds no secret"},
	}
}

// invite enrols a client.
func invite(_ context.Context, s *cmd.Settings) error {
	now := time.Now()
	clusterFile, err := stateFile(s, "cluster-key", "cluster.key")
	if err != nil {
		return err
	}
	clientsFile, err := stateFile(s, "clients", "clients.txt")
	if err != nil {
		return err
	}
	name := s.String("name")
	if name == "" {
		return cmd.Usage("name the client, such as --name laptop", "--name is missing")
	}
	if err := server.CheckName(name); err != nil {
		return cmd.Usage("give one word, such as --name laptop", "--name: %w", err)
	}
	address := s.String("address")
	if address == "" {
		return cmd.Usage("say where clients reach the server, such as --address gw.example.net:4444", "--address is missing")
	}
	if err := checkHostPort(address); err != nil {
		return cmd.Usage("give host:port, such as gw.example.net:4444", "--address %s: %w", address, err)
	}
	cluster, _, err := readCluster(clusterFile, now)
	if err != nil {
		return err
	}
	url := session.Invite{Address: address, ServerKey: cluster.Public(), Name: name}
	enrolment := server.Enrolment{Name: name}
	if text := s.String("public-key"); text != "" {
		if enrolment.Key, err = session.ParsePublicKey(text); err != nil {
			return cmd.Usage("give what anytun-proxy keygen printed", "--public-key: %w", err)
		}
	} else {
		if url.Key, err = session.NewPrivateKey(); err != nil {
			return err
		}
		enrolment.Key = url.Key.Public()
	}
	if enrolment.Number, err = enrol(clientsFile, enrolment); err != nil {
		return err
	}
	fmt.Fprintf(s.Process.Stderr, "anytun-server: %s is client %d in %s; a running server reads it on SIGHUP\n",
		name, enrolment.Number, clientsFile)
	_, err = fmt.Fprintln(s.Process.Stdout, url.String())
	return err
}

func checkHostPort(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("the port is missing")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q is not a port", port)
	}
	if host == "" {
		return errors.New("the host is missing")
	}
	return nil
}

const clientsHeader = `# anytun clients: public key, name, number. The server reads this file again on SIGHUP.
# To remove a client put # before its line: its number must not be given to
# another one before two epochs (48 h) have passed.
`

// enrol adds a client with the lowest free number to the clients file and
// returns the number. Concurrent calls wait for each other, and a reader of the
// file sees it with the new line or without.
func enrol(path string, e server.Enrolment) (number uint32, err error) {
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return 0, cmd.Usage("give a file in a directory that exists with --clients", "lock clients file: %w", err)
	}
	defer unlock()
	mode := fs.FileMode(0o600)
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		text = []byte(clientsHeader)
	case err != nil:
		return 0, clientsError(path, fmt.Errorf("clients file: %w", err))
	default:
		// Someone may have given the server's group a right to read the file.
		info, err := os.Stat(path)
		if err != nil {
			return 0, clientsError(path, fmt.Errorf("clients file: %w", err))
		}
		mode = info.Mode().Perm()
	}
	list, err := server.ParseClients(text)
	if err != nil {
		return 0, clientsError(path, fmt.Errorf("clients file %s: %w", path, err))
	}
	for _, old := range list {
		if old.Name == e.Name {
			return 0, cmd.Usage("choose another name, or put # before the old client's line first",
				"%s has a client named %s already", path, e.Name)
		}
		if old.Key == e.Key {
			return 0, cmd.Usage("one key is one client; make another key with anytun-proxy keygen",
				"%s has this key already, for %s", path, old.Name)
		}
	}
	if e.Number, err = server.FreeNumber(text); err != nil {
		return 0, cmd.Usage("delete lines that have been out of use for two days", "clients file %s: %w", path, err)
	}
	text = bytes.TrimRight(text, "\n")
	if len(text) > 0 {
		text = append(text, '\n')
	}
	text = append(text, e.String()+"\n"...)
	if err := cmd.ReplaceFile(path, text, mode); err != nil {
		return 0, cmd.Failure("check that you may write to the directory of "+path, "write clients file: %w", err)
	}
	return e.Number, nil
}
