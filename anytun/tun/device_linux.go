package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/anytun-go/anytun/anytun/nowait"
)

const (
	clonePath = "/dev/net/tun"

	// queueLength is how many messages for the server may wait in the kernel,
	// each up to 64 KiB. The default of 500 is 5 ms of small packets.
	queueLength = 1000

	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h

	// freeWriters is how many idle writers are kept: as many as write at once.
	freeWriters = 16
)

// Device is a TUN device. ReadBatch has one caller at a time; everything else is
// safe for concurrent use.
type Device struct {
	name     string
	file     *os.File
	rc       syscall.RawConn
	index    int
	uso      bool
	closed   atomic.Bool
	reader   *reader
	free     chan *writer
	counters counters
	calls    nowait.Caller

	mu     sync.Mutex      // guards routes against Close
	routes *netlink.Handle // speaks to the namespace of the device, whoever calls; nil once closed
}

// Open creates the device, or takes over one that stands ready without an owner
// (ip tuntap add), and sets it up. It needs CAP_NET_ADMIN. The device is in the
// calling thread's network namespace and goes with Close, or with the process.
func Open(cfg Config) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open tun: %w", err)
	}
	d, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open tun %q: %w", cfg.Name, explain(err))
	}
	return d, nil
}

// explain adds what to do about the errors that an operator meets.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (it needs CAP_NET_ADMIN)", err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w (another process has this device)", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w (is the kernel's module there? modprobe tun)", err)
	}
	return err
}

func open(cfg Config) (d *Device, err error) {
	ifr, err := unix.NewIfreq(cfg.Name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: clonePath, Err: err}
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("TUNSETIFF", err)
	}
	d = &Device{name: ifr.Name(), free: make(chan *writer, freeWriters)}
	if err := d.offload(fd); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d.file = os.NewFile(uintptr(fd), clonePath)
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	if d.rc, err = d.file.SyscallConn(); err != nil {
		return nil, err
	}
	d.reader = newReader(d, cfg)
	if d.routes, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	return d, d.setUp(cfg)
}

// offload tells the kernel which super-packets it may hand out.
func (d *Device) offload(fd int) error {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	// USO came with Linux 6.2; older kernels refuse the whole set.
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		d.uso = true
	} else if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp); err != nil {
		return os.NewSyscallError("TUNSETOFFLOAD", err)
	}
	// A device that stood ready may have had another owner's header size.
	return os.NewSyscallError("TUNSETVNETHDRSZ", unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetSize))
}

// setUp gives the interface its MTU and queue and takes it up. What is as it
// should be stays untouched, so that an operator can do it beforehand.
func (d *Device) setUp(cfg Config) error {
	link, err := d.routes.LinkByName(d.name)
	if err != nil {
		return fmt.Errorf("find interface: %w", err)
	}
	a := link.Attrs()
	d.index = a.Index
	if a.MTU != cfg.MTU {
		if err := d.routes.LinkSetMTU(link, cfg.MTU); err != nil {
			return fmt.Errorf("set mtu: %w", err)
		}
	}
	if a.TxQLen != queueLength {
		if err := d.routes.LinkSetTxQLen(link, queueLength); err != nil {
			return fmt.Errorf("set queue length: %w", err)
		}
	}
	if a.RawFlags&unix.IFF_UP != 0 {
		return nil
	}
	// Without a link-local address the kernel says nothing of itself on this
	// device (router solicitations). It may lack IPv6, so this may fail.
	_ = d.routes.LinkSetIP6AddrGenMode(link, addrGenModeNone)
	if err := d.routes.LinkSetUp(link); err != nil {
		return fmt.Errorf("take interface up: %w", err)
	}
	return nil
}

// Name is the interface's name.
func (d *Device) Name() string { return d.name }

// Stats returns the counters.
func (d *Device) Stats() Stats {
	s := d.counters.snapshot()
	s.USO = d.uso
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.routes == nil {
		return s
	}
	if link, err := d.routes.LinkByIndex(d.index); err == nil && link.Attrs().Statistics != nil {
		s.Drops[DropBacklog] = link.Attrs().Statistics.TxDropped
	}
	return s
}

// Close removes the device and unblocks ReadBatch. It may be called repeatedly.
func (d *Device) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.mu.Lock()
	if d.routes != nil {
		d.routes.Close()
		d.routes = nil
	}
	d.mu.Unlock()
	if err := d.file.Close(); err != nil {
		return fmt.Errorf("close tun %q: %w", d.name, err)
	}
	return nil
}
