package proxy

import (
	"bufio"
	"io"
	"sync"

	"github.com/anytun-go/anytun/netstack/splice"
)

// readerBytes holds any SOCKS handshake (at most 2*255+3 bytes at a time) and a usual TLS ClientHello behind it.
const readerBytes = 4 << 10

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerBytes) }}

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
func (Buffers) Get() []byte { return splice.Get()[:] }

// Put takes back a buffer from Get.
func (Buffers) Put(b []byte) {
	if cap(b) >= len(splice.Buffer{}) {
		splice.Put((*splice.Buffer)(b[:len(splice.Buffer{})]))
	}
}
