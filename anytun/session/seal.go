package session

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/anytun/wire"
)

// Errors of Open. The packet is dropped and counted by these reasons.
var (
	ErrReplay  = errors.New("replayed or too old")
	ErrForged  = errors.New("doesn't authenticate")
	ErrSender  = errors.New("sender not allowed")
	ErrEpoch   = errors.New("unknown epoch")
	ErrCipher  = errors.New("no common cipher")
	ErrExpired = errors.New("session expired")
)

// Sealer encrypts one direction of a session for one sender. Safe for
// concurrent use.
type Sealer struct {
	aead    cipher.AEAD
	header  wire.DataHeader // all but the counter
	counter atomic.Uint64   // last one used
}

func newSealer(aead cipher.AEAD, h wire.DataHeader, now time.Time) *Sealer {
	s := &Sealer{aead: aead, header: h}
	// From the wall clock, so that a sender that starts again goes on above
	// whatever it used before: it can't send 10^9 packets a second.
	s.counter.Store(uint64(now.UnixNano()))
	return s
}

// nonces are pooled since what is handed to a cipher.AEAD escapes.
var nonces = sync.Pool{New: func() any { return new([12]byte) }}

// putNonce writes sender(2) 0(2) counter(8) (PROTOCOL.md 5.3).
func putNonce(n *[12]byte, sender uint16, counter uint64) {
	binary.BigEndian.PutUint16(n[:], sender)
	n[2], n[3] = 0, 0
	binary.BigEndian.PutUint64(n[4:], counter)
}

// Seal encrypts packets in place. Every element of bufs is
// wire.DataHeaderLen + packet + wire.TagLen bytes long, and is afterwards a
// whole data message. The counters of one call follow each other.
func (s *Sealer) Seal(bufs [][]byte) {
	h := s.header
	h.Counter = s.counter.Add(uint64(len(bufs))) - uint64(len(bufs))
	nonce := nonces.Get().(*[12]byte)
	for _, b := range bufs {
		h.Counter++
		wire.PutData(b, h)
		putNonce(nonce, h.Sender, h.Counter)
		packet := b[wire.DataHeaderLen : len(b)-wire.TagLen]
		s.aead.Seal(packet[:0], nonce[:], packet, b[:wire.DataHeaderLen])
	}
	nonces.Put(nonce)
}

// Used returns how many packets were sealed since start, where start is the
// time the sealer was made with.
func (s *Sealer) Used(start time.Time) uint64 { return s.counter.Load() - uint64(start.UnixNano()) }

// maxSenders bounds the replay windows of an Opener: the servers whose packets
// are in flight at a time. The one not heard for longest is forgotten, and with
// it what it sent: its next packet must be newer than anything it sent before,
// which floor keeps.
const maxSenders = 64

type senderWindow struct {
	sender uint16
	used   uint64 // clock of the last use, for eviction
	window Window
}

// Opener decrypts one direction of a session and refuses what was seen before.
// Not safe for concurrent use.
type Opener struct {
	aead    cipher.AEAD
	nonce   [12]byte
	allow   func(uint16) bool
	last    *senderWindow
	senders []*senderWindow
	clock   uint64
	floor   uint64 // highest counter of any window that was evicted
	old     uint64 // counters up to here are too old, whatever the windows say
}

func onlyClient(s uint16) bool { return s == wire.ClientSender }
func onlyServer(s uint16) bool { return s != wire.ClientSender }

func newOpener(aead cipher.AEAD, allow func(uint16) bool) *Opener {
	return &Opener{aead: aead, allow: allow}
}

func (o *Opener) find(sender uint16) *senderWindow {
	if o.last != nil && o.last.sender == sender {
		return o.last
	}
	for _, w := range o.senders {
		if w.sender == sender {
			return w
		}
	}
	return nil
}

// Open decrypts the data message b in place and returns the packet inside,
// which lies in b. h is b's header. Only a packet that authenticates leaves a
// trace.
func (o *Opener) Open(b []byte, h wire.DataHeader) ([]byte, error) {
	if !o.allow(h.Sender) {
		return nil, ErrSender
	}
	w := o.find(h.Sender)
	if !o.fresh(w, h.Counter) {
		return nil, ErrReplay
	}
	putNonce(&o.nonce, h.Sender, h.Counter)
	sealed := b[wire.DataHeaderLen:]
	packet, err := o.aead.Open(sealed[:0], o.nonce[:], sealed, b[:wire.DataHeaderLen])
	if err != nil {
		return nil, ErrForged
	}
	o.mark(w, h)
	return packet, nil
}

func (o *Opener) fresh(w *senderWindow, counter uint64) bool {
	if counter <= o.old {
		return false
	}
	if w == nil {
		return counter > o.floor
	}
	return w.window.Fresh(counter)
}

// Raise says that somebody else has opened the message with this counter, so
// that those a window's length before it are too old here, too. It is for
// Openers of one sender, those of servers: a message that was caught and is
// replayed to another server then has only that window.
func (o *Opener) Raise(counter uint64) {
	if counter > WindowLen {
		o.old = max(o.old, counter-WindowLen)
	}
}

func (o *Opener) mark(w *senderWindow, h wire.DataHeader) {
	if w == nil {
		w = o.add(h.Sender)
	}
	w.window.Mark(h.Counter)
	o.clock++
	w.used = o.clock
	o.last = w
}

// Note counts a packet as seen that was opened elsewhere, and says whether it
// was new.
func (o *Opener) Note(h wire.DataHeader) bool {
	w := o.find(h.Sender)
	if !o.fresh(w, h.Counter) {
		return false
	}
	o.mark(w, h)
	return true
}

func (o *Opener) add(sender uint16) *senderWindow {
	if len(o.senders) < maxSenders {
		w := &senderWindow{sender: sender}
		o.senders = append(o.senders, w)
		return w
	}
	old := o.senders[0]
	for _, w := range o.senders {
		if w.used < old.used {
			old = w
		}
	}
	o.floor = max(o.floor, old.window.top)
	*old = senderWindow{sender: sender}
	return old
}
