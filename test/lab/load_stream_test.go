//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// The kinds of connections that the load opens to the sink.
//
//	up    the load writes, the sink checks and at the end says how much it got
//	down  the sink writes until the load has finished its side, then says how much
//	ping  a message every now and then, which comes back
//	idle  a message at the beginning and one at the end, both of which come back
const (
	kindUp   = 'u'
	kindDown = 'd'
	kindPing = 'p'
	kindIdle = 'i'
)

var kindNames = map[byte]string{kindUp: "up", kindDown: "down", kindPing: "ping", kindIdle: "idle"}

// A header begins every connection: the word "load", kind, id, seed, rate in
// bytes a second (0: as fast as it goes), and the time between writes.
type header struct {
	kind byte
	id   uint32
	seed uint64
	rate uint32
	tick time.Duration
}

const (
	headerLen   = 4 + 1 + 4 + 8 + 4 + 2
	trailerLen  = 4 + 8
	messageLen  = 64
	bulkBuffer  = 32 << 10
	headerMagic = "load"
	endMagic    = "end:"
)

func (h header) append(b []byte) []byte {
	b = append(append(b, headerMagic...), h.kind)
	b = binary.BigEndian.AppendUint32(b, h.id)
	b = binary.BigEndian.AppendUint64(b, h.seed)
	b = binary.BigEndian.AppendUint32(b, h.rate)
	return binary.BigEndian.AppendUint16(b, uint16(h.tick/time.Millisecond))
}

func readHeader(r io.Reader) (h header, err error) {
	b := make([]byte, headerLen)
	if _, err := io.ReadFull(r, b); err != nil {
		return header{}, err
	}
	if string(b[:4]) != headerMagic || kindNames[b[4]] == "" {
		return header{}, errors.New("corrupt: not a header")
	}
	return header{
		kind: b[4], id: binary.BigEndian.Uint32(b[5:]), seed: binary.BigEndian.Uint64(b[9:]),
		rate: binary.BigEndian.Uint32(b[17:]), tick: time.Duration(binary.BigEndian.Uint16(b[21:])) * time.Millisecond,
	}, nil
}

// tape is the bytes of one direction of the connection; an answer is what was
// asked, so connections that are asked have one.
func (h header) tape() tape {
	return tape(h.seed ^ tape(h.id).word(uint64(h.kind)))
}

// trailer ends a bulk stream: how many bytes of the tape went before it.
func trailer(n uint64) []byte { return binary.BigEndian.AppendUint64([]byte(endMagic), n) }

// A wrong is what verification found: not merely a broken connection.
type wrong string

func (w wrong) Error() string { return "corrupt: " + string(w) }

// pace writes the tape until stop is closed and returns how much it wrote.
func pace(w io.Writer, h header, stop <-chan struct{}) (sent uint64, err error) {
	k, b := h.tape(), make([]byte, bulkBuffer)
	var tick <-chan time.Time
	if h.rate > 0 {
		each := max(1, int(int64(h.rate)*int64(h.tick)/int64(time.Second)))
		b = make([]byte, each)
		// Not all of them at the same moment.
		select {
		case <-stop:
			return 0, nil
		case <-time.After(rand.N(h.tick)):
		}
		ticker := time.NewTicker(h.tick)
		defer ticker.Stop()
		tick = ticker.C
	} else {
		always := make(chan time.Time)
		close(always)
		tick = always
	}
	for {
		select {
		case <-stop:
			return sent, nil
		case <-tick:
		}
		select { // both may be ready
		case <-stop:
			return sent, nil
		default:
		}
		k.fill(b, sent)
		n, err := w.Write(b)
		sent += uint64(n)
		if err != nil {
			return sent, err
		}
	}
}

// take reads the tape to the connection's end and checks every byte. withEnd
// says that the stream ends with a trailer; without one, an end is an end.
func take(r io.Reader, k tape, m *meter, withEnd bool) (got uint64, err error) {
	keep := 0 // bytes at the end of what was read that may be the trailer
	if withEnd {
		keep = trailerLen
	}
	b, held := make([]byte, bulkBuffer+trailerLen), 0
	m.wait()
	defer m.rest()
	for {
		n, err := r.Read(b[held:])
		if n > 0 {
			m.add(n, true)
			held += n
			if ready := held - keep; ready > 0 {
				if at := k.check(b[:ready], got); at >= 0 {
					return got, wrong(fmt.Sprintf("another byte at position %d", got+uint64(at)))
				}
				got += uint64(ready)
				copy(b, b[ready:held])
				held = keep
			}
		}
		switch {
		case err == nil:
		case !errors.Is(err, io.EOF):
			return got, err
		case !withEnd:
			return got, nil
		case held < trailerLen || string(b[:4]) != endMagic:
			return got, fmt.Errorf("ended early, after %d bytes", got+uint64(held))
		default:
			if want := binary.BigEndian.Uint64(b[4:held]); want != got {
				return got, wrong(fmt.Sprintf("%d bytes arrived of %d", got, want))
			}
			return got, nil
		}
	}
}

// A stream is one connection of the load.
type stream struct {
	header
	conn   *net.TCPConn
	meter  meter
	asked  uint64 // bytes of the tape that were sent and came back
	out    []byte // of the message on its way
	back   []byte
	mu     sync.Mutex
	err    error
	failed time.Time
}

// fail notes the first error.
func (s *stream) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && err != nil {
		s.err, s.failed = err, time.Now()
	}
}

// begin says what the connection is for; those that answer have to, once.
func (s *stream) begin() error {
	if _, err := s.conn.Write(s.header.append(nil)); err != nil {
		return err
	}
	if s.kind == kindPing || s.kind == kindIdle {
		s.out, s.back = make([]byte, messageLen), make([]byte, messageLen)
		return s.ask()
	}
	return nil
}

// ask sends a message and takes it back.
func (s *stream) ask() error {
	s.tape().fill(s.out, s.asked)
	s.meter.wait()
	defer s.meter.rest()
	if _, err := s.conn.Write(s.out); err != nil {
		return err
	}
	if _, err := io.ReadFull(s.conn, s.back); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("ended early, after %d bytes", s.asked)
		}
		return err
	}
	s.meter.add(2*messageLen, false)
	if at := s.tape().check(s.back, s.asked); at >= 0 {
		return wrong(fmt.Sprintf("another byte at position %d", s.asked+uint64(at)))
	}
	s.asked += messageLen
	return nil
}

// run drives the stream until stop is closed and ends it in good order.
func (s *stream) run(stop <-chan struct{}, every time.Duration) error {
	defer s.conn.Close()
	switch s.kind {
	case kindUp:
		return s.runUp(stop)
	case kindDown:
		return s.runDown(stop)
	}
	return s.runAsked(stop, every)
}

func (s *stream) runUp(stop <-chan struct{}) error {
	sent, err := pace(countingWriter{s.conn, &s.meter}, s.header, stop)
	if err != nil {
		return err
	}
	if _, err := s.conn.Write(trailer(sent)); err != nil {
		return err
	}
	if err := s.conn.CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(s.conn, 2*trailerLen))
	if err != nil {
		return err
	}
	if string(answer) != string(trailer(sent)) {
		if len(answer) == 0 {
			return errors.New("ended early, without the sink's count")
		}
		return wrong(fmt.Sprintf("sent %d bytes, the sink says %q", sent, answer))
	}
	return nil
}

// runDown reads from the beginning and finishes its own side when it is told
// to stop, which ends the sink's.
func (s *stream) runDown(stop <-chan struct{}) error {
	var wg sync.WaitGroup
	ended := make(chan struct{})
	wg.Go(func() {
		select {
		case <-stop:
			s.fail(s.conn.CloseWrite())
		case <-ended:
		}
	})
	_, err := take(s.conn, s.tape(), &s.meter, true)
	close(ended)
	wg.Wait()
	return err
}

func (s *stream) runAsked(stop <-chan struct{}, every time.Duration) error {
	var tick <-chan time.Time
	if s.kind == kindPing {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		tick = ticker.C
	}
	// An idle connection is read all the time: its end must not come unseen.
	if s.kind == kindIdle {
		if err := s.idle(stop); err != nil {
			return err
		}
	}
	for going := true; going; {
		select {
		case <-stop:
			going = false
		case <-tick:
		}
		if err := s.ask(); err != nil {
			return err
		}
	}
	if err := s.conn.CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(io.LimitReader(s.conn, 1))
	if err == nil && len(rest) > 0 {
		err = wrong("more came back than was sent")
	}
	return err
}

// idle waits until stop is closed; anything that comes meanwhile is wrong.
func (s *stream) idle(stop <-chan struct{}) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ended := make(chan struct{})
	defer close(ended)
	wg.Go(func() {
		select {
		case <-stop:
			_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // wakes the reader below
		case <-ended:
		}
	})
	n, err := s.conn.Read(s.back[:1])
	switch {
	case n > 0:
		return wrong("a byte that nobody asked for")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return s.conn.SetReadDeadline(time.Now().Add(endLimit))
	case errors.Is(err, io.EOF):
		return fmt.Errorf("ended early, after %d bytes", s.asked)
	}
	return err
}

// A countingWriter counts what a stream has handed over, without a judgement
// on stalls: a socket's buffer hides them from its writer.
type countingWriter struct {
	io.Writer
	m *meter
}

func (w countingWriter) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	w.m.add(n, false)
	return n, err
}
