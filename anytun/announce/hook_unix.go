//go:build unix

package announce

import (
	"os/exec"
	"syscall"
)

// hookGroup makes a timeout kill the command with all that it started.
func hookGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}
