package deep

import (
	"runtime/debug"
	"testing"
	"unsafe"
)

// spend calls itself down to a depth, in small steps as real calls do.
//
//go:noinline
func spend(bytes int) (sum byte) {
	var step [512]byte
	if bytes <= 0 {
		return step[-bytes%len(step)]
	}
	return step[bytes%len(step)] + spend(bytes-len(step))
}

// moved reports in a new goroutine whether its stack was copied elsewhere while it
// went down to a depth.
func moved(begin func(), bytes int) (yes bool) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		begin()
		var local byte
		before := uintptr(unsafe.Pointer(&local))
		spend(bytes)
		yes = uintptr(unsafe.Pointer(&local)) != before
	}()
	<-done
	return yes
}

// After Stack a goroutine goes deep where it is.
func TestStack(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it would shrink the stack
	const depth = 11 << 10
	if moved(Stack, depth) {
		t.Errorf("the stack was copied on the way down to %d bytes", depth)
	}
	if !moved(func() {}, depth) {
		t.Errorf("a new goroutine has %d bytes already: this package is superfluous", depth)
	}
}

// What a goroutine costs that goes as deep as a connection's does.
func BenchmarkStack(b *testing.B) {
	for name, begin := range map[string]func(){"grown step by step": func() {}, "grown at once": Stack} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				moved(begin, 11<<10)
			}
		})
	}
}
