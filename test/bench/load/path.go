package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/ipv4"
)

// A path is the way to the sink: direct, or through a SOCKS5 proxy.
type path struct {
	dst     string
	socks   string
	timeout time.Duration // for a connection to open
}

// dial opens a TCP connection to a port of the sink.
func (p *path) dial(port int) (*net.TCPConn, error) {
	to := p.socks
	if to == "" {
		to = net.JoinHostPort(p.dst, strconv.Itoa(port))
	}
	conn, err := net.DialTimeout("tcp", to, p.timeout)
	if err != nil {
		return nil, err
	}
	c := conn.(*net.TCPConn)
	if p.socks != "" {
		if err := c.SetDeadline(time.Now().Add(p.timeout)); err != nil {
			c.Close()
			return nil, err
		}
		if _, err := socksRequest(c, socksConnect, p.dst, port); err != nil {
			c.Close()
			return nil, err
		}
		if err := c.SetDeadline(time.Time{}); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

const (
	socksConnect   = 1
	socksAssociate = 3
)

// socksRequest does the greeting and one request of RFC 1928, without a
// password, and returns the address in the reply, if that is an IP address.
func socksRequest(c io.ReadWriter, command byte, host string, port int) (bound netip.AddrPort, err error) {
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Is4() {
		return bound, fmt.Errorf("%s is not an IPv4 address", host)
	}
	if _, err := c.Write([]byte{5, 1, 0}); err != nil {
		return bound, err
	}
	var b [4]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return bound, fmt.Errorf("socks greeting: %w", err)
	}
	if b[0] != 5 || b[1] != 0 {
		return bound, fmt.Errorf("socks greeting was answered with %x", b[:2])
	}
	request := append([]byte{5, command, 0, 1}, ip.AsSlice()...)
	if _, err := c.Write(binary.BigEndian.AppendUint16(request, uint16(port))); err != nil {
		return bound, err
	}
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return bound, fmt.Errorf("socks reply: %w", err)
	}
	if b[1] != 0 {
		return bound, fmt.Errorf("socks reply %d", b[1])
	}
	var size byte
	switch b[3] {
	case 1:
		size = 4
	case 4:
		size = 16
	case 3:
		if _, err := io.ReadFull(c, b[:1]); err != nil {
			return bound, fmt.Errorf("socks reply: %w", err)
		}
		size = b[0]
	default:
		return bound, fmt.Errorf("socks reply has an address of type %d", b[3])
	}
	address := make([]byte, int(size)+2)
	if _, err := io.ReadFull(c, address); err != nil {
		return bound, fmt.Errorf("socks reply: %w", err)
	}
	at, _ := netip.AddrFromSlice(address[:size]) // a name, whatever its length, is of no use to us
	if b[3] == 3 {
		at = netip.Addr{}
	}
	return netip.AddrPortFrom(at.Unmap(), binary.BigEndian.Uint16(address[size:])), nil
}

// A datagramPath is a UDP path to the sink. Not safe for concurrent use.
type datagramPath struct {
	*ipv4.PacketConn
	udp    *net.UDPConn
	socks  net.Conn // while this is open the proxy keeps the association
	header []byte   // of SOCKS5, before each payload
}

// dialUDP opens a UDP path.
func (p *path) dialUDP() (*datagramPath, error) {
	dst, err := netip.ParseAddr(p.dst)
	if err != nil || !dst.Is4() {
		return nil, fmt.Errorf("%s is not an IPv4 address", p.dst)
	}
	var socks net.Conn
	var header []byte
	to := netip.AddrPortFrom(dst, portUDP)
	if p.socks != "" {
		if socks, err = net.DialTimeout("tcp", p.socks, p.timeout); err != nil {
			return nil, err
		}
		relay, err := associate(socks, p.timeout)
		if err != nil {
			socks.Close()
			return nil, err
		}
		header = append([]byte{0, 0, 0, 1}, dst.AsSlice()...)
		header = binary.BigEndian.AppendUint16(header, portUDP)
		to = relay
	}
	udp, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
	if err == nil {
		err = udp.SetReadBuffer(readBuffer)
	}
	if err != nil {
		if socks != nil {
			socks.Close()
		}
		return nil, err
	}
	d := newDatagramPath(udp, header)
	d.socks = socks
	return d, nil
}

// associate asks for a UDP association and returns where datagrams go.
func associate(c net.Conn, timeout time.Duration) (netip.AddrPort, error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return netip.AddrPort{}, err
	}
	relay, err := socksRequest(c, socksAssociate, "0.0.0.0", 0)
	if err != nil {
		return relay, err
	}
	if !relay.Addr().IsValid() || relay.Addr().IsUnspecified() {
		proxy := c.RemoteAddr().(*net.TCPAddr).AddrPort()
		relay = netip.AddrPortFrom(proxy.Addr().Unmap(), relay.Port())
	}
	return relay, nil
}

func newDatagramPath(udp *net.UDPConn, header []byte) *datagramPath {
	return &datagramPath{PacketConn: ipv4.NewPacketConn(udp), udp: udp, header: header}
}

func (d *datagramPath) close() {
	d.udp.Close()
	if d.socks != nil {
		d.socks.Close()
	}
}

// packet makes a packet for this path: whole is what is sent, payload the part
// of it that the sink sees.
func (d *datagramPath) packet(kind byte, size int) (whole, payload []byte) {
	whole = make([]byte, len(d.header)+size)
	copy(whole, d.header)
	payload = whole[len(d.header):]
	copy(payload, filler)
	payload[0] = kind
	return whole, payload
}

// writeAll sends all messages, in as many calls as it takes. Lost packets are
// no errors: nor is what the kernel says of earlier ones.
func (d *datagramPath) writeAll(all []ipv4.Message) {
	writeAll(d.PacketConn, all)
}

func writeAll(c *ipv4.PacketConn, all []ipv4.Message) {
	for len(all) > 0 {
		n, err := c.WriteBatch(all, 0)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		all = all[max(n, 1):] // the first was refused
	}
}

// messages makes n messages with buffers of so many bytes.
func messages(n, size int) []ipv4.Message {
	all := make([]ipv4.Message, n)
	for i := range all {
		all[i].Buffers = [][]byte{make([]byte, size)}
	}
	return all
}

// get asks for size bytes and reads the answer.
func get(c io.Writer, answer *bufio.Reader, size int, last bool) error {
	ask := "GET /" + strconv.Itoa(size) + " HTTP/1.1\r\nHost: sink\r\n"
	if last {
		ask += "Connection: close\r\n"
	}
	if _, err := io.WriteString(c, ask+"\r\n"); err != nil {
		return err
	}
	length := -1
	for {
		line, err := answer.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if text, ok := strings.CutPrefix(string(line), "Content-Length: "); ok {
			if length, err = strconv.Atoi(strings.TrimSpace(text)); err != nil {
				return err
			}
		}
	}
	if length != size {
		return fmt.Errorf("answer of %d bytes, not %d", length, size)
	}
	_, err := answer.Discard(length)
	return err
}

// tryOnce makes a connection and one request.
func (p *path) tryOnce() error {
	c, err := p.dial(portHTTP)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(p.timeout)); err != nil {
		return err
	}
	return get(c, bufio.NewReader(c), getSize, true)
}
