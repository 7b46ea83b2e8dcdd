package nowait

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// TestIdle: packets that come alone make the road idle after a while, and one
// batch ends that at once. Looking in vain says nothing.
func TestIdle(t *testing.T) {
	var c Caller
	for i := range lull {
		if c.Idle() {
			t.Fatalf("idle after %d packets", i)
		}
		c.Came(1)
		c.Came(0)
	}
	if !c.Idle() {
		t.Fatalf("not idle after %d packets that came alone", lull)
	}
	c.Came(0)
	c.Came(1)
	if !c.Idle() {
		t.Error("another packet alone ends the idleness")
	}
	c.Came(2)
	if c.Idle() {
		t.Error("idle after a batch")
	}
	for range lull - 1 {
		c.Came(1)
	}
	if c.Idle() {
		t.Error("the packets before the batch still count")
	}
}

// TestSyscall makes calls on both ways.
func TestSyscall(t *testing.T) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_NONBLOCK|syscall.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fds[0])
	defer syscall.Close(fds[1])
	var c Caller
	for _, idle := range []bool{false, true} {
		if c.Idle() != idle {
			t.Fatalf("idle: %v", !idle)
		}
		out, in := []byte("packet"), make([]byte, 10)
		if n, errno := c.Syscall(syscall.SYS_WRITE, uintptr(fds[1]), uintptr(unsafe.Pointer(&out[0])), uintptr(len(out)), 0, 0, 0); int(n) != len(out) || errno != 0 {
			t.Errorf("idle %v: write: %d, %v", idle, n, errno)
		}
		n, errno := c.Syscall(syscall.SYS_READ, uintptr(fds[0]), uintptr(unsafe.Pointer(&in[0])), uintptr(len(in)), 0, 0, 0)
		if errno != 0 || !bytes.Equal(in[:n], out) {
			t.Errorf("idle %v: read: %q, %v", idle, in[:n], errno)
		}
		if _, errno := c.Syscall(syscall.SYS_READ, uintptr(fds[0]), uintptr(unsafe.Pointer(&in[0])), uintptr(len(in)), 0, 0, 0); errno != syscall.EAGAIN {
			t.Errorf("idle %v: read of an empty pipe: %v", idle, errno)
		}
		for range lull {
			c.Came(1)
		}
	}
}

// BenchmarkSyscall is one read of an empty pipe.
func BenchmarkSyscall(b *testing.B) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_NONBLOCK|syscall.O_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	defer syscall.Close(fds[0])
	defer syscall.Close(fds[1])
	for _, idle := range []bool{false, true} {
		name := map[bool]string{false: "busy", true: "idle"}[idle]
		b.Run(name, func(b *testing.B) {
			var c Caller
			for idle && !c.Idle() {
				c.Came(1)
			}
			var p [1]byte
			for b.Loop() {
				if _, errno := c.Syscall(syscall.SYS_READ, uintptr(fds[0]), uintptr(unsafe.Pointer(&p[0])), 1, 0, 0, 0); errno != syscall.EAGAIN {
					b.Fatal(errno)
				}
			}
		})
	}
}

// TestOthersRun: a goroutine that always finds something to read must not keep the
// only processor from one that waits for the network. The scheduler's monitor sees
// to that, but it sleeps, once all is quiet, until it hears of a call.
func TestOthersRun(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	// Another process, so that this one is quiet before.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sh := exec.CommandContext(ctx, "sh", "-c", "sleep 0.3; echo; sleep 0.3; echo >&2; exec sleep 60")
	out, err := sh.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	later, err := sh.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = sh.Wait() // it was killed
	}()
	var stop atomic.Bool
	go func() {
		_, _ = later.Read(make([]byte, 1))
		stop.Store(true)
	}()
	var c Caller
	var p [1]byte
	fd := zero.Fd()
	wait, err := out.(*os.File).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Not out.Read, of which the scheduler hears.
	if err := wait.Read(func(fd uintptr) bool {
		_, errno := c.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&p[0])), 1, 0, 0, 0)
		return errno != syscall.EAGAIN
	}); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); !stop.Load(); {
		if _, errno := c.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&p[0])), 1, 0, 0, 0); errno != 0 {
			t.Fatal(errno)
		}
		if time.Since(began) > 10*time.Second {
			t.Fatal("a goroutine that waits for a pipe never runs")
		}
	}
}
