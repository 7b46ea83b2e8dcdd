//go:build unix && !linux

package splice

import "golang.org/x/sys/unix"

type calls struct{}

func (*calls) read(fd uintptr, p []byte) (int, error) { return unix.Read(int(fd), p) }

func (*calls) write(fd uintptr, p []byte, _ bool) (int, error) { return unix.Write(int(fd), p) }
