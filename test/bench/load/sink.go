package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
)

const (
	portBulk   = 9001
	portUDP    = 9003
	portHTTP   = 9010 // and those after it: many connections to one port run into used up local ones
	httpPorts  = 8
	bulkBuffer = 256 << 10
	readBuffer = 8 << 20
	batchSize  = 64
	blastSize  = 16 // datagrams a call; more would be a burst that no application sends
)

// What a connection to portBulk begins with, and a datagram to portUDP.
const (
	askDown  = 'D' // connection: send for ever
	askUp    = 'U' // connection: count what comes, for the run whose number follows
	askCount = 'C' // connection: say what came for the run whose number follows

	askEcho  = 'E' // datagram: send it back
	askTake  = 'X' // datagram: count it for the run whose number follows
	askBlast = 'B' // datagram: send for so many ms (4 bytes) datagrams of such a size (2 bytes)
)

// filler is what is sent: nothing that a path could compress.
var filler = func() []byte {
	b := make([]byte, bulkBuffer)
	x := uint32(2463534242) // xorshift
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}()

// A sink is the destination of all tests. What arrives is counted here, by the
// sink's clock: what a sender has got rid of may still be on its way.
type sink struct {
	began time.Time

	mu   sync.Mutex
	runs map[uint64]*arrivals
}

// arrivals are what came for one run of a test.
type arrivals struct {
	mu          sync.Mutex
	streams     []*atomic.Uint64 // bytes of each connection
	datagrams   uint64
	first, last time.Duration // when datagrams came
}

func newSink() *sink { return &sink{began: time.Now(), runs: make(map[uint64]*arrivals)} }

// of is the arrivals of a run, new if it's the first time we hear of it.
func (s *sink) of(number uint64) *arrivals {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.runs[number]
	if a == nil {
		a = &arrivals{}
		s.runs[number] = a
	}
	return a
}

// serve listens at all ports and returns at the first error.
func (s *sink) serve() error {
	errs := make(chan error, 16) // as many as there are goroutines below, or more: only the first is read
	// Who is measured is ended without a word, with 10,000 connections open, perhaps.
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: time.Second, Count: 3}}
	listen := func(port int, handle func(net.Conn)) error {
		l, err := lc.Listen(context.Background(), "tcp4", ":"+strconv.Itoa(port))
		if err != nil {
			return err
		}
		go func() { errs <- acceptLoop(l, handle) }()
		return nil
	}
	if err := listen(portBulk, s.bulk); err != nil {
		return err
	}
	for i := range httpPorts {
		if err := listen(portHTTP+i, serveHTTP); err != nil {
			return err
		}
	}
	// A socket for each address, so that answers come from the one that was asked.
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range addresses {
		ip, ok := a.(*net.IPNet)
		if !ok || ip.IP.To4() == nil {
			continue
		}
		u, err := net.ListenUDP("udp4", &net.UDPAddr{IP: ip.IP, Port: portUDP})
		if err != nil {
			return err
		}
		if err := u.SetReadBuffer(readBuffer); err != nil {
			return err
		}
		go func() { errs <- s.datagramLoop(ipv4.NewPacketConn(u)) }()
	}
	return <-errs
}

func acceptLoop(l net.Listener, handle func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			pause(10 * time.Millisecond) // some of those that ended without a word will be noticed
			continue
		}
		if err != nil {
			return err
		}
		go func() { defer c.Close(); handle(c) }()
	}
}

// bulk serves one connection to portBulk.
func (s *sink) bulk(c net.Conn) {
	var ask [9]byte
	if _, err := io.ReadFull(c, ask[:1]); err != nil {
		return
	}
	if ask[0] == askDown {
		for {
			if _, err := c.Write(filler); err != nil {
				return
			}
		}
	}
	if _, err := io.ReadFull(c, ask[1:]); err != nil {
		return
	}
	a := s.of(binary.BigEndian.Uint64(ask[1:]))
	switch ask[0] {
	case askUp:
		n := a.stream()
		buf := make([]byte, bulkBuffer)
		for {
			k, err := c.Read(buf)
			n.Add(uint64(k))
			if err != nil {
				return
			}
		}
	case askCount:
		_, _ = c.Write(a.report(time.Since(s.began)).append(nil)) // who asked sees that there is no answer
	}
}

func (a *arrivals) stream() *atomic.Uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := new(atomic.Uint64)
	a.streams = append(a.streams, n)
	return n
}

// A count is what came until now for a run, by the sink's clock.
type count struct {
	at          time.Duration
	datagrams   uint64
	first, last time.Duration // of the datagrams
	streams     []uint64      // bytes each
}

func (a *arrivals) report(now time.Duration) count {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := count{at: now, datagrams: a.datagrams, first: a.first, last: a.last}
	for _, n := range a.streams {
		c.streams = append(c.streams, n.Load())
	}
	return c
}

// append writes a count as big-endian 64-bit words.
func (c count) append(b []byte) []byte {
	for _, v := range []uint64{uint64(c.at), c.datagrams, uint64(c.first), uint64(c.last), uint64(len(c.streams))} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	for _, v := range c.streams {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func readCount(r io.Reader) (count, error) {
	var head [5]uint64
	if err := binary.Read(r, binary.BigEndian, &head); err != nil {
		return count{}, err
	}
	if head[4] > 1<<16 {
		return count{}, fmt.Errorf("count of %d streams", head[4])
	}
	c := count{
		at: time.Duration(head[0]), datagrams: head[1], first: time.Duration(head[2]), last: time.Duration(head[3]),
		streams: make([]uint64, head[4]),
	}
	return c, binary.Read(r, binary.BigEndian, c.streams)
}

// count asks the sink what came for a run.
func (p *path) count(run uint64) (count, error) {
	c, err := p.dial(portBulk)
	if err != nil {
		return count{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return count{}, err
	}
	if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{askCount}, run)); err != nil {
		return count{}, err
	}
	return readCount(c)
}

// serveHTTP answers GET /SIZE with so many bytes.
func serveHTTP(c net.Conn) {
	in := bufio.NewReaderSize(c, 512)
	answers := make(map[int][]byte)
	for {
		size, last, first := getSize, false, true
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			line = strings.TrimRight(line, "\r\n")
			if line == "" {
				break
			}
			if first {
				first = false
				if f := strings.Fields(line); len(f) >= 2 {
					if n, err := strconv.Atoi(strings.TrimPrefix(f[1], "/")); err == nil && n >= 0 && n <= bulkBuffer {
						size = n
					}
				}
			}
			last = last || strings.EqualFold(line, "connection: close")
		}
		if answers[size] == nil {
			answers[size] = append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size), filler[:size]...)
		}
		if _, err := c.Write(answers[size]); err != nil || last {
			return
		}
	}
}

// datagramLoop serves one UDP socket.
func (s *sink) datagramLoop(u *ipv4.PacketConn) error {
	in := messages(batchSize, 65536)
	var echo []ipv4.Message
	var run *arrivals
	var runNumber uint64
	for {
		n, err := u.ReadBatch(in, 0)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			continue // what the kernel has to say about answers
		}
		now := time.Since(s.began)
		echo = echo[:0]
		for _, m := range in[:n] {
			b := m.Buffers[0][:m.N]
			switch {
			case len(b) < 9:
			case b[0] == askEcho:
				echo = append(echo, ipv4.Message{Buffers: [][]byte{b}, Addr: m.Addr})
			case b[0] == askTake:
				if number := binary.BigEndian.Uint64(b[1:]); run == nil || number != runNumber {
					run, runNumber = s.of(number), number
				}
				run.datagram(now)
			case b[0] == askBlast:
				d := time.Duration(binary.BigEndian.Uint32(b[1:])) * time.Millisecond
				go blast(u, m.Addr, int(binary.BigEndian.Uint16(b[5:])), d)
			}
		}
		writeAll(u, echo)
	}
}

func (a *arrivals) datagram(now time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.datagrams == 0 {
		a.first = now
	}
	a.datagrams++
	a.last = now
}

// blast sends datagrams as fast as it can.
func blast(u *ipv4.PacketConn, to net.Addr, size int, d time.Duration) {
	all := make([]ipv4.Message, blastSize)
	for i := range all {
		all[i] = ipv4.Message{Buffers: [][]byte{filler[:size]}, Addr: to}
	}
	for end := time.Now().Add(d); time.Now().Before(end); {
		writeAll(u, all)
	}
}
