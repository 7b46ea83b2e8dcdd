//go:build !linux

package tun

import "context"

// Device is a TUN device; there are none on this system.
type Device struct{ counters counters }

// Open returns ErrNotSupported.
func Open(cfg Config) (*Device, error) {
	if _, err := cfg.withDefaults(); err != nil {
		return nil, err
	}
	return nil, ErrNotSupported
}

// Name is the interface's name.
func (d *Device) Name() string { return "" }

// ReadBatch returns ErrNotSupported.
func (d *Device) ReadBatch() ([][]byte, error) { return nil, ErrNotSupported }

// TryRead does nothing.
func (d *Device) TryRead(func(pkts [][]byte)) {}

// WriteBatch counts the packets as dropped.
func (d *Device) WriteBatch(pkts [][]byte) { d.counters.drop(DropClosed, len(pkts)) }

// Stats returns the counters.
func (d *Device) Stats() Stats { return d.counters.snapshot() }

// Close does nothing.
func (d *Device) Close() error { return nil }

// Check returns ErrNotSupported.
func (h Host) Check() error { return ErrNotSupported }

// Up returns ErrNotSupported.
func (h Host) Up(context.Context) (down func() error, err error) { return nil, ErrNotSupported }
