// Package nowait makes the system calls that never wait, those on non-blocking
// sockets and devices.
//
// A call through package syscall tells Go's scheduler first, in case it takes
// long. That wakes the scheduler's monitor if it sleeps, which then looks around
// every 20 µs; where a call is still not over, as when the kernel carries a packet
// to its destination within it, the monitor gives the caller's processor to
// another thread, and the caller has to get one back. That is two thread switches
// for a call that would have ended by itself, and on two CPUs, shared with who is
// at the other end, they cost throughput and connections per second.
//
// Where packets come one by one, each awaited, it is the other way round. Each is
// a chain of wake-ups, and a CPU that sleeps is slow to wake, most of all in a
// virtual machine; the monitor's short sleeps keep it from sleeping soundly. So
// there the scheduler is told.
//
// It is told of some calls in any case: with the monitor asleep, goroutines that
// always find something to do would keep the processor for ever.
package nowait
