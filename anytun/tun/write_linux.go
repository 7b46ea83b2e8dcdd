package tun

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxOpen is how many flows of a batch have a run that is still open. More of
// them at once take turns, and their runs are shorter.
const maxOpen = 32

// writer is the scratch of one WriteBatch. It holds pointers into the caller's
// packets only while that lasts.
type writer struct {
	d     *Device
	vnet  [vnetSize]byte
	iovs  [1 + maxRun]unix.Iovec
	count int // of iovs in use
	errno syscall.Errno
	write func(fd uintptr) // the method writeNow, bound once

	// The open runs, at most one of a flow. A flow's packets leave in order;
	// flows overtake each other.
	keys   [maxOpen]uint64
	runs   [maxOpen]openRun
	open   int // runs in use
	victim int // the next to be closed when there are too many

	pkts [][]byte
	next []int32 // by packet: the one that follows in its run
}

// openRun is a run whose packets are listed in writer.next.
type openRun struct {
	run
	lay        layout // of the first packet
	begin, end int32  // the first packet and the last
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
	clear(w.runs[:])
	w.pkts = nil
	select {
	case d.free <- w:
	default: // the collector's
	}
}

// WriteBatch gives IP packets to the kernel, which forwards them. Packets of one
// flow that follow each other go as one super-packet, without being copied; those
// of other flows may lie between them. The order within a flow stays as it is.
// TCP, UDP and ICMPv6 checksums may be anything, the kernel computes them;
// fragments and other protocols go as they are. Headers of the packets are
// changed. Packets that can't be delivered are counted, see Stats.
func (d *Device) WriteBatch(pkts [][]byte) {
	w := d.takeWriter()
	defer d.giveWriter(w)
	w.pkts = pkts
	if len(w.next) < len(pkts) {
		w.next = make([]int32, len(pkts))
	}
	at := 0 // the run of the packet before, which is most often this one's
	for i, b := range pkts {
		if at >= w.open || !w.runs[at].add(b) {
			at = w.sort(i, at)
			continue
		}
		w.append(at, i)
	}
	for w.open > 0 {
		w.close(0)
	}
	// Pointers to payloads hide the packets' beginnings from nobody, but the
	// scratch must not keep them alive; see flush. The caller's slice does.
	runtime.KeepAlive(pkts)
}

// append puts packet i, which the run has counted in, behind its others.
func (w *writer) append(at, i int) {
	r := &w.runs[at]
	w.next[r.end] = int32(i)
	r.end = int32(i)
	if !r.open {
		w.close(at)
	}
}

// sort finds packet i its run, or begins one, and returns where that is. tried is
// a run that it doesn't continue.
func (w *writer) sort(i, tried int) int {
	b := w.pkts[i]
	key := flowKey(b)
	at := 0
	for at < w.open && w.keys[at] != key {
		at++
	}
	if at < w.open && at != tried && w.runs[at].add(b) {
		w.append(at, i)
		return at
	}
	b, l, ok := examine(b)
	if !ok {
		w.d.counters.drop(DropMalformed, 1)
		return tried
	}
	switch {
	case key == 0: // it may belong to any
		for w.open > 0 {
			w.close(0)
		}
	case at < w.open:
		w.close(at)
	case at == maxOpen:
		w.victim = (w.victim + 1) % maxOpen
		w.close(w.victim)
	}
	at = w.open
	w.keys[at] = key
	w.runs[at] = openRun{run: startRun(b, &l, w.d.uso), lay: l, begin: int32(i), end: int32(i)}
	w.open++
	if !w.runs[at].open {
		w.close(at)
	}
	return at
}

// close writes a run. The last one takes its place.
func (w *writer) close(at int) {
	w.flush(&w.runs[at])
	w.open--
	w.keys[at], w.runs[at] = w.keys[w.open], w.runs[w.open]
}

// flush writes the packets of a run as one.
func (w *writer) flush(r *openRun) {
	n := r.count
	v := r.seal(w.pkts[r.end], &r.lay)
	v.put(w.vnet[:])
	w.iovs[1].Base = &r.first[0]
	w.iovs[1].SetLen(len(r.first))
	for i, at := 2, r.begin; i <= n; i++ {
		at = w.next[at]
		b := w.pkts[at]
		w.iovs[i].Base = &b[r.head]
		w.iovs[i].SetLen(len(b) - r.head)
	}
	w.count, w.errno = 1+n, 0
	// Not RawConn.Write: its lock would admit one goroutine at a time, and the kernel
	// never asks to wait (it handles the packet within the call).
	if err := w.d.rc.Control(w.write); err != nil {
		w.errno = unix.EBADF
	}
	if w.errno == 0 {
		w.d.counters.written.add(n, r.size+(n-1)*r.head, 1)
	} else {
		w.d.counters.drop(dropReason(w.errno), n)
	}
	clear(w.iovs[1 : 1+n])
}

func (w *writer) writeNow(fd uintptr) {
	for {
		_, w.errno = w.d.calls.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iovs[0])), uintptr(w.count), 0, 0, 0)
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
