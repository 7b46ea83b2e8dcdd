package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/anytun-go/anytun/netstack/splice"
)

// ErrHangUp says that the application closed its connection while something was done in its name.
var ErrHangUp = errors.New("the application hung up")

const (
	// earlyBytes bounds what an application may send before it has the reply (optimistic data, a TLS ClientHello). At
	// the bound reading stops until the connection stands; a hang-up is then not noticed before the dial has ended.
	earlyBytes = 64 << 10
	// replyTimeout bounds the writing of a reply.
	replyTimeout = 10 * time.Second
	// lingerTimeout and lingerBytes bound how long a refused application is still listened to, see CloseWith.
	lingerTimeout = time.Second
	lingerBytes   = 256 << 10

	// watchDelay is after what time Watch begins: most of what is done in an application's name is over sooner.
	watchDelay = 50 * time.Millisecond
)

// aLongTimeAgo, as a deadline, ends a read in progress.
var aLongTimeAgo = time.Unix(1, 0)

// Conn is a connection from an application. First the handshake is read from Reader; EndHandshake then gives the
// reader's buffer back, keeping the bytes behind the handshake, and the rest goes through Watch, Tunnel, WaitHangUp and
// CloseWith. Not safe for concurrent use, except Abort.
type Conn struct {
	net.Conn
	br     *bufio.Reader // until EndHandshake
	idle   *splice.Reader
	early  []byte                // read ahead of the relay
	tunnel atomic.Pointer[relay] // set by Server.Tunnel

	deadline time.Time // of the handshake
}

func newConn(nc net.Conn) *Conn {
	return &Conn{Conn: nc, br: getReader(nc), idle: splice.NewReader(nc)}
}

// Reader is where the handshake is read from; nil after EndHandshake.
func (c *Conn) Reader() *bufio.Reader { return c.br }

// begin starts the handshake's time.
func (c *Conn) begin(limit time.Duration) error {
	c.deadline = time.Now().Add(limit)
	return c.SetDeadline(c.deadline)
}

// Unfinished is the reason of a handshake that could not be read to its end: out of time, or malformed, which includes
// cut short. It asks the clock since not every parser wraps the errors it meets.
func (c *Conn) Unfinished() Reason {
	if !time.Now().Before(c.deadline) {
		return ReasonHandshakeSlow
	}
	return ReasonMalformed
}

// EndHandshake keeps what is buffered behind the handshake and clears the handshake's deadline.
func (c *Conn) EndHandshake() {
	if c.br != nil {
		if n := c.br.Buffered(); n > 0 {
			p, _ := c.br.Peek(n) // can't fail: it is buffered
			c.early = append(c.early, p...)
		}
		putReader(c.br)
		c.br = nil
	}
	_ = c.SetDeadline(time.Time{}) // fails on a closed connection only; the next read says so
}

// TakeEarly takes over what has been read ahead, for a reader that is not ours.
func (c *Conn) TakeEarly() []byte {
	p := c.early
	c.early = nil
	return p
}

// GiveEarly gives bytes back that the application sent before what is still to be read.
func (c *Conn) GiveEarly(p []byte) { c.early = append(c.early, p...) }

// RemoteIP is the application's address, without zone; the loopback address for a unix socket.
func (c *Conn) RemoteIP() netip.Addr { return addrOf(c.RemoteAddr()).WithZone("") }

// LocalIP is the address at which the application reached us, with its zone; the loopback address for a unix socket.
func (c *Conn) LocalIP() netip.Addr { return addrOf(c.LocalAddr()) }

func addrOf(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// AddrPortOf is the address of a TCP or UDP socket; not valid for others.
func AddrPortOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return unmap(a.AddrPort())
	case *net.UDPAddr:
		return unmap(a.AddrPort())
	}
	return netip.AddrPort{}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// Watch reads from the application while something is done in its name, after EndHandshake, if it turns out to be
// slow. The context it returns is cancelled when the application hangs up: on a reset, and on an end of its stream with nothing sent before.
// (An end behind early data is taken for a half-close: such an application may well wait for the answer.) What it
// sends is kept for Tunnel. stop must be called; it returns ErrHangUp if that is what happened.
func (c *Conn) Watch(ctx context.Context) (watched context.Context, stop func() error) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan error, 1)
	timer := time.AfterFunc(watchDelay, func() { c.watch(cancel, done) })
	return ctx, func() error {
		if timer.Stop() { // it hasn't begun
			cancel(nil)
			return nil
		}
		_ = c.SetReadDeadline(aLongTimeAgo) // fails on a closed connection only, which has ended the loop
		err := <-done
		_ = c.SetReadDeadline(time.Time{})
		cancel(nil)
		return err
	}
}

func (c *Conn) watch(cancel context.CancelCauseFunc, done chan<- error) {
	err := c.readEarly()
	if err != nil {
		cancel(err)
	}
	done <- err
}

func (c *Conn) readEarly() error {
	for len(c.early) < earlyBytes {
		b, n, err := c.idle.Next()
		switch {
		case err == nil:
			c.early = append(c.early, b[:n]...)
			splice.Put(b)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil // stopped
		case errors.Is(err, io.EOF) && len(c.early) > 0:
			return nil // the relay finds the end again
		default:
			return ErrHangUp
		}
	}
	return nil
}

// WaitHangUp discards what the application sends until its connection ends, holding no buffer. It returns nil at a
// proper end.
func (c *Conn) WaitHangUp() error {
	c.early = nil
	for {
		b, _, err := c.idle.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		splice.Put(b)
	}
}

// Reply writes within a deadline.
func (c *Conn) Reply(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_ = c.SetWriteDeadline(time.Now().Add(replyTimeout))
	_, err := c.Write(p)
	_ = c.SetWriteDeadline(time.Time{})
	return err
}

// CloseWith writes a last reply and closes. A socket closed with unread bytes in it resets the connection, and the
// reset can overtake the reply; so what the application still sends is read for a moment.
func (c *Conn) CloseWith(reply []byte) {
	defer c.Close()
	if err := c.Reply(reply); err != nil {
		return
	}
	if half, ok := c.Conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		return
	}
	if c.br != nil {
		putReader(c.br)
		c.br = nil
	}
	_ = c.SetReadDeadline(time.Now().Add(lingerTimeout))
	for left := lingerBytes; left > 0; {
		b, n, err := c.idle.Next()
		if err != nil {
			return
		}
		splice.Put(b)
		left -= n
	}
}

// Abort resets the application's connection, which ends whatever is done for it.
func (c *Conn) Abort() { Abort(c.Conn) }

func (c *Conn) release() {
	if c.br != nil {
		putReader(c.br)
		c.br = nil
	}
	c.early = nil
}
