package netstack

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// FuzzInput feeds arbitrary packets to a stack with everything switched on:
// forwarders, a listener, a UDP socket. Since the stack keeps state between the
// inputs, what a single one covers changes, and minimizing it never ends: run
// with -fuzzminimizetime 1x.
func FuzzInput(f *testing.F) {
	seeds := [][]byte{
		echoRequest(client4, server4), echoRequest(client6, world6),
		tcpPacket(tcpSpec{v4: true, ttl: 9, flags: flagSYN}), tcpPacket(tcpSpec{ttl: 9, flags: flagSYN, options: []byte{2, 4, 5, 0xb4}}),
		tcpPacket(tcpSpec{v4: true, ttl: 9, flags: flagACK, payload: []byte("payload")}),
		tcpPacket(tcpSpec{v4: true, ttl: 9, flags: flagACK, payload: []byte("payload"), fragment: 0x2000}),
		tcpPacket(tcpSpec{v4: true, ttl: 9, flags: flagRST, ipOptions: true}),
	}
	for _, from := range []netip.Addr{client4, client6} {
		to := world4
		if from.Is6() {
			to = world6
		}
		var sent [][]byte
		d := newDevice(&Config{MTU: 1280, Output: func(pkts [][]byte) {
			for _, p := range pkts {
				sent = append(sent, bytes.Clone(p))
			}
		}})
		b := d.batch()
		b.putUDP(netip.AddrPortFrom(from, 5), netip.AddrPortFrom(to, 53), make([]byte, 2000))
		b.done()
		d.unreachable(UnreachableProhibited, from, to, tcpPacket(tcpSpec{v4: from.Is4()}), nil)
		seeds = append(seeds, sent...)
	}
	for i, b := range seeds {
		f.Add(b, seeds[(i+1)%len(seeds)])
		f.Add(b, b[:len(b)-1])
	}
	s, err := New(Config{MTU: 1400, Forward: true, Output: func([][]byte) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	if err := s.SetAddresses([]netip.Addr{server4, server6}); err != nil {
		f.Fatal(err)
	}
	s.ForwardTCP(100, func(r *TCPRequest) { r.Reject(syscall.EHOSTUNREACH) })
	s.ForwardUDP(func(from, to netip.AddrPort, b []byte) {
		s.RejectUDP(from, to, b, UnreachableNet)
		_ = s.WriteUDP(to, from, b)
	})
	if _, err := s.ListenTCP(netip.AddrPortFrom(server4, 443)); err != nil {
		f.Fatal(err)
	}
	if _, err := s.ListenUDP(netip.AddrPortFrom(server6, 53)); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		ca, cb := bytes.Clone(a), bytes.Clone(b)
		s.Input([][]byte{a, b, a})
		if !bytes.Equal(a, ca) || !bytes.Equal(b, cb) {
			t.Error("Input changed a packet")
		}
	})
}

// FuzzJoin compares joining with its twin for batches made from the numbers.
func FuzzJoin(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Add(uint64(0), ^uint64(0))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		pkts := randomSegments(rand.New(rand.NewPCG(a, b)))
		s, c := captureStack()
		s.Input(pkts)
		inOrder, flows := orderTwin(pkts)
		if flows <= orderedFlows {
			sameFlows(t, c.got, joinTwin(ackTwin(inOrder)))
		}
	})
}

// FuzzAnswer parses arbitrary DNS messages; what is taken is an answer to the
// question that was asked.
func FuzzAnswer(f *testing.F) {
	n, _ := dnsName("www.example.com")
	q := dnsmessage.Question{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	f.Add(dnsReply{question: q, id: 7, records: []dnsRecord{cname("www.example.com", "example.com"), {"example.com", "192.0.2.1", 60}}}.bytes(f))
	f.Add(dnsReply{question: q, id: 7, rcode: dnsmessage.RCodeNameError, soa: 30}.bytes(f))
	f.Add(dnsReply{question: q, id: 7, truncated: true}.bytes(f))
	query, err := appendQuestion(nil, 7, q, true)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(query)
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok, err := parseAnswer(b, 7, q)
		if !ok {
			if err != nil || a.found() {
				t.Errorf("ignored, but %+v, %v", a, err)
			}
			return
		}
		if b[0] != 0 || b[1] != 7 || b[2]&0x80 == 0 {
			t.Errorf("taken for an answer: %x", b[:4])
		}
		for _, x := range a.addrs {
			if !x.Is4() {
				t.Errorf("%v answers a question for A", x)
			}
		}
		if a.ttl < 0 {
			t.Errorf("TTL %v", a.ttl)
		}
	})
}
