package udp

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"
)

// socket is ListenSocket on an implementation.
func socket(t testing.TB, im implementation, bind netip.Addr, o Options) *Socket {
	t.Helper()
	return &Socket{conn: open(t, im, bind, o).(countedConn)}
}

// Datagrams pass between sockets, each from its sender, in order; and what the
// kernel refuses is not among those sent.
func TestSocket(t *testing.T) {
	for _, im := range implementations() {
		for _, share := range []bool{false, true} {
			for _, f := range families {
				t.Run(im.name+map[bool]string{true: ", shared"}[share]+"/"+f.name, func(t *testing.T) {
					skipWithoutIPv6(t, f)
					a := socket(t, im, f.bind, Options{ShareBuffers: share})
					b := socket(t, im, f.bind, Options{ShareBuffers: share})
					c := plain(t, f.target)
					at := func(s *Socket) netip.AddrPort { return netip.AddrPortFrom(f.target, addrPort(s.LocalAddr()).Port()) }
					for round := range 3 {
						want := makePackets(repeat(1200, 10, 7, 0, 1300, 1300, 9000), round)
						if n, err := a.WriteBatch(want, at(b)); n != len(want) || err != nil {
							t.Fatalf("%d of %d datagrams sent, %v", n, len(want), err)
						}
						if _, err := c.WriteToUDPAddrPort([]byte("other"), at(b)); err != nil {
							t.Fatal(err)
						}
						senders := map[netip.AddrPort][][]byte{}
						for n := 0; n <= len(want); {
							list, from, err := b.ReadBatch()
							if err != nil {
								t.Fatal(err)
							}
							for _, p := range list {
								senders[from] = append(senders[from], bytes.Clone(p))
							}
							n += len(list)
						}
						compare(t, senders[at(a)], want)
						compare(t, senders[addrPort(c.LocalAddr())], [][]byte{[]byte("other")})
					}
					mixed := [][]byte{[]byte("one"), make([]byte, 65528), []byte("two")}
					if n, err := a.WriteBatch(mixed, at(b)); n != 2 || err != nil {
						t.Errorf("%d datagrams sent, %v; want 2", n, err)
					}
					if n, err := a.WriteBatch(mixed, netip.AddrPort{}); n != 0 || err != nil {
						t.Errorf("%d datagrams sent to nobody, %v", n, err)
					}
					b.Close()
					if _, _, err := b.ReadBatch(); !errors.Is(err, net.ErrClosed) {
						t.Errorf("read: %v", err)
					}
					if n, err := b.WriteBatch(mixed, at(a)); n != 0 || !errors.Is(err, net.ErrClosed) {
						t.Errorf("write: %d, %v", n, err)
					}
				})
			}
		}
	}
}

func addrPort(a net.Addr) netip.AddrPort { return unmap(a.(*net.UDPAddr).AddrPort()) }
