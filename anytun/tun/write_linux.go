package tun

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writer is the scratch of one WriteBatch. It holds pointers into the caller's
// packets only while one run is written.
type writer struct {
	d     *Device
	vnet  [vnetSize]byte
	iovs  [1 + maxRun]unix.Iovec
	run   run
	lay   layout // of the run's first packet
	last  []byte // packet of the run
	errno syscall.Errno
	write func(fd uintptr) // the method writeNow, bound once
}

func (d *Device) takeWriter() *writer {
	select {
	case w := <-d.free:
		return w
	default:
	}
	w := &writer{d: d}
	w.write = w.writeNow
	w.iovs[0].Base = &w.vnet[0]
	w.iovs[0].SetLen(vnetSize)
	return w
}

func (d *Device) giveWriter(w *writer) {
	w.run, w.last = run{}, nil
	select {
	case d.free <- w:
	default: // the collector's
	}
}

// WriteBatch gives IP packets to the kernel, which forwards them. Packets in a
// row that belong to one flow go as one super-packet, without being copied. TCP, UDP and
// ICMPv6 checksums may be anything, the kernel computes them; fragments and other
// protocols go as they are. Headers of the packets are changed. Packets that can't be
// delivered are counted, see Stats.
func (d *Device) WriteBatch(pkts [][]byte) {
	w := d.takeWriter()
	defer d.giveWriter(w)
	for _, b := range pkts {
		if w.run.count > 0 && w.run.add(b) {
			w.append(b)
			continue
		}
		w.flush()
		b, l, ok := examine(b)
		if !ok {
			d.counters.drop(DropMalformed, 1)
			continue
		}
		w.run, w.lay = startRun(b, &l, d.uso), l
		w.last = b
		w.iovs[1].Base = &b[0]
		w.iovs[1].SetLen(len(b))
	}
	w.flush()
	// Pointers to payloads hide the packets' beginnings from nobody, but the
	// scratch must not keep them alive; see flush. The caller's slice does.
	runtime.KeepAlive(pkts)
}

// append puts the payload of b, which the run has counted in, behind the others.
func (w *writer) append(b []byte) {
	v := &w.iovs[w.run.count]
	v.Base = &b[w.run.head]
	v.SetLen(len(b) - w.run.head)
	w.last = b
}

// flush writes the run, if there is one.
func (w *writer) flush() {
	n := w.run.count
	if n == 0 {
		return
	}
	v := w.run.seal(w.last, &w.lay)
	v.put(w.vnet[:])
	w.errno = 0
	// Not RawConn.Write: its lock would admit one goroutine at a time, and the kernel
	// never asks to wait (it handles the packet within the call).
	if err := w.d.rc.Control(w.write); err != nil {
		w.errno = unix.EBADF
	}
	if w.errno == 0 {
		w.d.counters.written.add(n, w.run.size+(n-1)*w.run.head, 1)
	} else {
		w.d.counters.drop(dropReason(w.errno), n)
	}
	clear(w.iovs[1 : 1+n])
	w.run.count = 0
}

func (w *writer) writeNow(fd uintptr) {
	for {
		_, _, w.errno = syscall.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iovs[0])), uintptr(1+w.run.count))
		if w.errno != syscall.EINTR {
			return
		}
	}
}

func dropReason(errno syscall.Errno) DropReason {
	switch errno {
	case unix.ENOBUFS, unix.ENOMEM, unix.EAGAIN:
		return DropQueueFull
	case unix.EIO, unix.ENETDOWN:
		return DropDown
	case unix.EBADF, unix.EBADFD:
		return DropClosed
	}
	return DropRefused
}
