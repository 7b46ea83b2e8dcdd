package udp

import (
	"net"
	"net/netip"
	"testing"
)

// TestReadAdapts: of datagrams that nothing has joined many are read at once, of
// large ones few. What is sent fits into the receive buffer of any user.
func TestReadAdapts(t *testing.T) {
	c, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	app, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(c.LocalAddr()))
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	// read sends n datagrams of size bytes and returns how many came in each batch.
	read := func(n, size int) (batches []int) {
		t.Helper()
		for i := range n {
			b := make([]byte, size)
			b[0] = byte(i)
			if _, err := app.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		for got := 0; got < n; {
			groups, err := c.ReadBatch()
			if err != nil {
				t.Fatal(err)
			}
			k := 0
			for _, g := range groups {
				for _, p := range g.Packets {
					if len(p) != size || p[0] != byte(got) {
						t.Fatalf("datagram %d: %d bytes, number %d", got, len(p), p[0])
					}
					got++
					k++
				}
			}
			batches = append(batches, k)
		}
		return batches
	}
	for _, tt := range []struct {
		n, size     int
		first, next int
	}{
		{200, 100, defaultMessages, smallMessages},
		{70, 1400, smallMessages, 6},
		{16, 5000, 16, 0}, // asked for while they still were small
		{16, 5000, defaultMessages, defaultMessages},
		{70, 1400, defaultMessages, 62},
	} {
		got := read(tt.n, tt.size)
		if got[0] != tt.first || len(got) > 1 && got[1] != tt.next {
			t.Errorf("%d datagrams of %d bytes came in batches of %v, want %d and then %d", tt.n, tt.size, got, tt.first, tt.next)
		}
	}
}
