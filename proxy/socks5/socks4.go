package socks5

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/anytun-go/anytun/proxy"
)

const (
	version4 = 4
	// max4Bytes bounds the user id and the name of a SOCKS4 request, each without its final zero.
	max4Bytes = 255
)

var errTooLong = errors.New("field too long")

// serve4 speaks SOCKS4 and SOCKS4a:
//
//	VN(1)=4 CD(1) DSTPORT(2) DSTIP(4) USERID 00 [NAME 00]
//
// where an address 0.0.0.x with x other than 0 announces a name (4a). The user id is anybody's claim, no password, so
// version 4 is refused (0x5d) when the proxy wants passwords.
func (h *Handler) serve4(ctx context.Context, s *proxy.Server, c *proxy.Conn) {
	kind, target, reason := parse4(c.Reader())
	if reason == proxy.ReasonNone && s.Auth() != nil {
		reason = proxy.ReasonAuth
	}
	if reason != proxy.ReasonNone {
		if reason == proxy.ReasonMalformed {
			reason = c.Unfinished()
		}
		s.Counters().Failure(reason)
		c.CloseWith(reply4(reason, netip.AddrPort{}))
		return
	}
	c.EndHandshake()
	s.Counters().Request(kind)
	if kind == proxy.KindSOCKS4Bind {
		h.bind(ctx, s, c, target, reply4)
		return
	}
	connect(ctx, s, c, target, reply4)
}

func parse4(r *bufio.Reader) (proxy.Kind, proxy.Target, proxy.Reason) {
	head, err := r.Peek(8)
	if err != nil {
		return 0, proxy.Target{}, proxy.ReasonMalformed
	}
	command, port, ip := head[1], binary.BigEndian.Uint16(head[2:]), netip.AddrFrom4([4]byte(head[4:8]))
	_, _ = r.Discard(8) // can't fail: they were peeked
	if _, err := readZeroEnded(r); err != nil {
		return 0, proxy.Target{}, proxy.ReasonMalformed
	}
	target := proxy.Target{Addr: ip, Port: port}
	if a := ip.As4(); a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] != 0 {
		name, err := readZeroEnded(r)
		if err != nil {
			return 0, proxy.Target{}, proxy.ReasonMalformed
		}
		if target, err = proxy.NewTarget(name, port); err != nil {
			return 0, proxy.Target{}, proxy.ReasonUnknownName
		}
	}
	switch command {
	case 1:
		return proxy.KindSOCKS4Connect, target, proxy.ReasonNone
	case 2:
		return proxy.KindSOCKS4Bind, target, proxy.ReasonNone
	}
	return 0, proxy.Target{}, proxy.ReasonCommand
}

func readZeroEnded(r *bufio.Reader) (string, error) {
	var field []byte
	for {
		b, err := r.ReadByte()
		if err != nil {
			return "", err
		}
		if b == 0 {
			return string(field), nil
		}
		if len(field) == max4Bytes {
			return "", errTooLong
		}
		field = append(field, b)
	}
}

// reply4 is VN(1)=0 CD(1) DSTPORT(2) DSTIP(4). There is no room for an IPv6 address; it becomes 0.0.0.0.
func reply4(reason proxy.Reason, bound netip.AddrPort) []byte {
	b := []byte{0, reason.SOCKS4()}
	b = binary.BigEndian.AppendUint16(b, bound.Port())
	var ip [4]byte
	if bound.Addr().Is4() {
		ip = bound.Addr().As4()
	}
	return append(b, ip[:]...)
}
