package server

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestEgressUDPGRO has the host send trains (UDP_SEGMENT), which the mapping's
// socket reads as one and the client gets as the datagrams they are.
func TestEgressUDPGRO(t *testing.T) {
	r := newEgressRig(t)
	h, to := egressListenUDP(t, "127.0.0.1:0")
	c := r.socket()
	sendUDP(t, c, to, []byte("hello"))
	_, from := receiveUDP(t, h)
	const size, total = 1200, 20*1200 + 7
	raw, err := h.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size)
	}); err != nil {
		t.Fatal(err)
	}
	if optErr != nil {
		t.Skipf("this kernel has no UDP_SEGMENT: %v", optErr)
	}
	data := make([]byte, total)
	for i := range data {
		data[i] = byte(i / size)
	}
	sendUDP(t, h, from, data)
	for i := range total/size + 1 {
		want := data[i*size : min((i+1)*size, total)]
		if got, peer := receiveUDP(t, c); got != string(want) || peer != to {
			t.Fatalf("datagram %d: %d bytes from %s, want %d", i, len(got), peer, len(want))
		}
	}
}
