package proxy

import (
	"bufio"
	"io"
	"sync"
)

// relayBufferBytes is how much is read at once: as much as netstack hands over in one joined segment.
const relayBufferBytes = 64 << 10

// readerBytes holds any SOCKS handshake (at most 2*255+3 bytes at a time) and a usual TLS ClientHello behind it.
const readerBytes = 4 << 10

type buffer [relayBufferBytes]byte

var (
	buffers = sync.Pool{New: func() any { return new(buffer) }}
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerBytes) }}
)

func getBuffer() *buffer  { return buffers.Get().(*buffer) }
func putBuffer(b *buffer) { buffers.Put(b) }

func getReader(r io.Reader) *bufio.Reader {
	br := readers.Get().(*bufio.Reader)
	br.Reset(r)
	return br
}

func putReader(br *bufio.Reader) {
	br.Reset(nil)
	readers.Put(br)
}

// Buffers lends the relay's buffers to net/http's reverse proxy.
type Buffers struct{}

// Get returns a buffer of 64 KiB.
func (Buffers) Get() []byte { return getBuffer()[:] }

// Put takes back a buffer from Get.
func (Buffers) Put(b []byte) {
	if cap(b) >= relayBufferBytes {
		putBuffer((*buffer)(b[:relayBufferBytes]))
	}
}
