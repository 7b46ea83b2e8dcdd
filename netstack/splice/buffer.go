package splice

import "sync"

// Buffer is what is read at once: as much as netstack hands over in one joined segment, and the largest datagram.
type Buffer [64 << 10]byte

var buffers = sync.Pool{New: func() any { return new(Buffer) }}

// Get returns a buffer, of undefined content, that is given back with Put.
func Get() *Buffer { return buffers.Get().(*Buffer) }

// Put gives a buffer back.
func Put(b *Buffer) { buffers.Put(b) }
