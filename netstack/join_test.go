package netstack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// tcpSpec says how a segment of the tests looks.
type tcpSpec struct {
	v4        bool
	tos       byte
	ttl       byte
	sport     uint16
	seq, ack  uint32
	flags     byte
	window    uint16
	options   []byte
	payload   []byte
	fragment  uint16 // the field of IPv4
	ipOptions bool
}

// tcpPacket builds the segment with gVisor's header package.
func tcpPacket(s tcpSpec) []byte {
	from, to := client6, server6
	ipLen := 40
	if s.v4 {
		from, to = client4, server4
		ipLen = 20
		if s.ipOptions {
			ipLen = 24
		}
	}
	hl := ipLen + 20 + len(s.options)
	b := make([]byte, hl+len(s.payload))
	if s.v4 {
		header.IPv4(b).Encode(&header.IPv4Fields{
			TOS: s.tos, TotalLength: uint16(len(b)), ID: uint16(s.seq), Flags: uint8(s.fragment >> 13), FragmentOffset: s.fragment & 0x1fff * 8,
			TTL: s.ttl, Protocol: 6, SrcAddr: tcpipAddr(from), DstAddr: tcpipAddr(to),
		})
		if s.ipOptions {
			b[0] = 0x46
			copy(b[20:24], []byte{1, 1, 1, 0})
		}
		setIPv4Checksum(b[:ipLen])
	} else {
		header.IPv6(b).Encode(&header.IPv6Fields{
			TrafficClass: s.tos, PayloadLength: uint16(len(b) - 40), TransportProtocol: 6, HopLimit: s.ttl,
			SrcAddr: tcpipAddr(from), DstAddr: tcpipAddr(to),
		})
	}
	header.TCP(b[ipLen:]).Encode(&header.TCPFields{
		SrcPort: s.sport, DstPort: 443, SeqNum: s.seq, AckNum: s.ack, DataOffset: uint8(20 + len(s.options)),
		Flags: header.TCPFlags(s.flags), WindowSize: s.window,
	})
	copy(b[ipLen+20:], s.options)
	copy(b[hl:], s.payload)
	return b
}

// capture is a dispatcher that keeps what is delivered.
type capture struct{ got [][]byte }

func (c *capture) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, p *stack.PacketBuffer) {
	v := p.ToView()
	c.got = append(c.got, bytes.Clone(v.AsSlice()))
	v.Release()
}

func (*capture) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// captureStack is a Stack of which only Input works.
func captureStack() (*Stack, *capture) {
	c := new(capture)
	s := &Stack{st: stack.New(stack.Options{}), dev: newDevice(&Config{MTU: 1400, Headroom: 20, Tailroom: 16, Output: func([][]byte) {}})}
	s.own.Store(new([]netip.Addr))
	var n stack.NetworkDispatcher = c
	s.dev.dispatcher.Store(&n)
	return s, c
}

// joinTwin is the obvious implementation: it decodes every packet with
// gVisor's header package, and joins two neighbours if they differ only in
// what may differ.
func joinTwin(pkts [][]byte) [][]byte {
	type seg struct {
		key     string
		v4      bool
		ipLen   int
		head    []byte
		payload []byte
		seq     uint32
		psh     bool
		can     bool
	}
	read := func(b []byte) seg {
		s := seg{v4: b[0]>>4 == 4, ipLen: 40}
		if s.v4 {
			s.ipLen = int(header.IPv4(b).HeaderLength())
		}
		tcp := header.TCP(b[s.ipLen:])
		hl := s.ipLen + int(tcp.DataOffset())
		s.head, s.payload = b[:hl], b[hl:]
		s.seq = tcp.SequenceNumber()
		f := tcp.Flags()
		s.psh = f&header.TCPFlagPsh != 0
		s.can = len(s.payload) > 0 && f&^(header.TCPFlagPsh|0x40) == header.TCPFlagAck
		var ip any
		if s.v4 {
			h := header.IPv4(b)
			tos, _ := h.TOS()
			s.can = s.can && s.ipLen == 20 && !h.More() && h.FragmentOffset() == 0
			ip = []any{4, tos, h.TTL(), h.Flags(), h.SourceAddress(), h.DestinationAddress()}
		} else {
			h := header.IPv6(b)
			tos, flow := h.TOS()
			ip = []any{6, tos, flow, h.HopLimit(), h.SourceAddress(), h.DestinationAddress()}
		}
		s.key = fmt.Sprint(ip, tcp.SourcePort(), tcp.DestinationPort(), tcp.AckNumber(), f&^header.TCPFlagPsh, tcp.WindowSize(), string(tcp.Options()))
		return s
	}
	var out [][]byte
	var cur seg
	for _, b := range pkts {
		s := read(b)
		if n := len(out); n > 0 && cur.can && s.can && !cur.psh && cur.key == s.key &&
			s.seq == cur.seq+uint32(len(cur.payload)) && len(out[n-1])+len(s.payload) <= 65535 {
			cur.payload = append(bytes.Clone(cur.payload), s.payload...)
			cur.psh = s.psh
			p := append(bytes.Clone(cur.head), cur.payload...)
			if s.psh {
				p[cur.ipLen+13] |= 8
			}
			if cur.v4 {
				h := header.IPv4(p)
				h.SetTotalLength(uint16(len(p)))
				h.SetChecksum(0)
				h.SetChecksum(^h.CalculateChecksum())
			} else {
				header.IPv6(p).SetPayloadLength(uint16(len(p) - 40))
			}
			out[n-1] = p
			continue
		}
		out = append(out, bytes.Clone(b))
		cur = s
	}
	return out
}

// orderTwin is the obvious implementation of the order in which Input takes
// segments: those of a flow that have data come together, where the first of them
// was, and as long as one precedes one that belongs before it, these two change
// places. It returns the number of flows, too.
func orderTwin(pkts [][]byte) ([][]byte, int) {
	type seg struct {
		flow string
		seq  uint32
	}
	read := func(b []byte) (s seg, ok bool) {
		ipLen := 40
		if b[0]>>4 == 4 {
			h := header.IPv4(b)
			if ipLen = int(h.HeaderLength()); ipLen != 20 || h.More() || h.FragmentOffset() != 0 {
				return s, false
			}
			s.flow = fmt.Sprint(h.SourceAddress(), h.DestinationAddress())
		} else {
			s.flow = fmt.Sprint(header.IPv6(b).SourceAddress(), header.IPv6(b).DestinationAddress())
		}
		tcp := header.TCP(b[ipLen:])
		s.flow += fmt.Sprint(tcp.SourcePort(), tcp.DestinationPort())
		s.seq = tcp.SequenceNumber()
		f := tcp.Flags()
		return s, len(tcp) > int(tcp.DataOffset()) && f&header.TCPFlagAck != 0 &&
			f&(header.TCPFlagSyn|header.TCPFlagRst|header.TCPFlagUrg) == 0
	}
	flows := make(map[string][][]byte)
	for _, b := range pkts {
		if s, ok := read(b); ok {
			flows[s.flow] = append(flows[s.flow], b)
		}
	}
	for _, f := range flows {
		for again := true; again; {
			again = false
			for i := range f[1:] {
				x, _ := read(f[i])
				y, _ := read(f[i+1])
				if int32(y.seq-x.seq) < 0 {
					f[i], f[i+1] = f[i+1], f[i]
					again = true
				}
			}
		}
	}
	n := len(flows)
	var out [][]byte
	for _, b := range pkts {
		s, ok := read(b)
		if !ok {
			out = append(out, b)
			continue
		}
		out = append(out, flows[s.flow]...)
		delete(flows, s.flow)
	}
	return out, n
}

// randomSegments makes a batch in which most neighbours belong together and
// every reason not to join occurs.
func randomSegments(rng *rand.Rand) [][]byte {
	ts := func(v uint32) []byte {
		return binary.BigEndian.AppendUint32([]byte{1, 1, 8, 10, 0, 0, 0, 9}, v)
	}
	s := tcpSpec{v4: rng.IntN(2) == 0, ttl: 64, sport: 1000, seq: rng.Uint32(), ack: 5, flags: 0x10, window: 500}
	if rng.IntN(2) == 0 {
		s.options = ts(1)
	}
	var out [][]byte
	for range rng.IntN(60) {
		one := s
		size := 1300
		if rng.IntN(8) == 0 {
			size = rng.IntN(1300)
		}
		one.payload = make([]byte, size)
		(&pattern{at: uint64(one.seq)}).fill(one.payload)
		switch rng.IntN(40) {
		case 0:
			s.v4 = !s.v4
		case 1:
			s.tos ^= 3 // congestion experienced
		case 2:
			s.ttl--
		case 3:
			s.sport++
		case 4:
			one.seq++
		case 5:
			s.ack += 100
		case 6:
			one.flags |= 1 << rng.IntN(8)
		case 7:
			s.window++
		case 8:
			s.options = ts(rng.Uint32())
		case 9:
			one.fragment = [...]uint16{0x4000, 0x2000, 5}[rng.IntN(3)]
		case 10:
			one.ipOptions = true
		case 11:
			s.flags ^= 0x40
		case 12:
			s.seq -= 1300 // a retransmission
		case 13, 14:
			one.flags |= 8
		}
		one.v4 = s.v4
		out = append(out, tcpPacket(one))
		s.seq += uint32(len(one.payload))
	}
	return out
}

func TestJoinAgainstTwin(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	joined := 0
	for round := range 3000 {
		pkts := randomSegments(rng)
		before := make([][]byte, len(pkts))
		for i, b := range pkts {
			before[i] = bytes.Clone(b)
		}
		if rng.IntN(2) == 0 { // another server's part comes too early
			for range rng.IntN(4) {
				if i, j := rng.IntN(len(pkts)+1), rng.IntN(len(pkts)+1); i < j {
					rand.Shuffle(j-i, func(a, b int) {
						pkts[i+a], pkts[i+b] = pkts[i+b], pkts[i+a]
						before[i+a], before[i+b] = before[i+b], before[i+a]
					})
				}
			}
		}
		inOrder, flows := orderTwin(before)
		if flows > orderedFlows {
			continue
		}
		s, c := captureStack()
		s.Input(pkts)
		want := joinTwin(ackTwin(inOrder))
		sameFlows(t, c.got, want)
		for i := range pkts {
			if !bytes.Equal(pkts[i], before[i]) {
				t.Fatalf("round %d: Input changed packet %d", round, i)
			}
		}
		joined += len(pkts) - len(want)
	}
	if joined < 10000 {
		t.Errorf("only %d segments were joined", joined)
	}
}

// Segments of many flows lie between each other: those that are watched are put
// together, and of each flow all arrives.
func TestJoinManyFlows(t *testing.T) {
	for _, flows := range []int{2, orderedFlows, orderedFlows + 10} {
		rng := rand.New(rand.NewPCG(7, uint64(flows)))
		const each = 6
		var pkts [][]byte
		for n := range flows * each {
			spec := tcpSpec{v4: n%2 == 0, ttl: 64, sport: uint16(n % flows), seq: uint32(n / flows * 100), flags: flagACK, window: 9}
			spec.payload = make([]byte, 100)
			(&pattern{at: uint64(spec.seq)}).fill(spec.payload)
			spec.v4 = spec.sport%2 == 0
			pkts = append(pkts, tcpPacket(spec))
		}
		if flows <= orderedFlows {
			rng.Shuffle(len(pkts), func(i, j int) { pkts[i], pkts[j] = pkts[j], pkts[i] })
		}
		s, c := captureStack()
		s.Input(pkts)
		if want := min(flows, orderedFlows) + max(flows-orderedFlows, 0)*each; len(c.got) != want {
			t.Errorf("%d flows: %d packets, want %d", flows, len(c.got), want)
		}
		total := 0
		for _, b := range c.got {
			p, ok := parseIP(b)
			if !ok {
				t.Fatal("not an IP packet")
			}
			data := p.payload()[20:]
			total += len(data)
			want := make([]byte, len(data))
			(&pattern{at: uint64(binary.BigEndian.Uint32(p.payload()[4:]))}).fill(want)
			if !bytes.Equal(data, want) {
				t.Fatalf("%d flows: flow %x is not what was sent", flows, flowOf(b))
			}
		}
		if total != flows*each*100 {
			t.Errorf("%d flows: %d bytes, want %d", flows, total, flows*each*100)
		}
	}
}

// A joined packet is never larger than a length field can say.
func TestJoinLimit(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		var pkts [][]byte
		spec := tcpSpec{v4: v4, ttl: 64, flags: 0x10, payload: make([]byte, 1360)}
		for range 200 {
			pkts = append(pkts, tcpPacket(spec))
			spec.seq += 1360
		}
		s, c := captureStack()
		s.Input(pkts)
		payload := 0
		for _, b := range c.got {
			if len(b) > 65535 {
				t.Errorf("%d bytes", len(b))
			}
			p, ok := parseIP(b)
			if !ok || len(p.b) != len(b) {
				t.Fatalf("length field of a packet of %d bytes is wrong", len(b))
			}
			payload += len(b) - p.l4 - 20
		}
		if payload != 200*1360 || len(c.got) != 5 {
			t.Errorf("%d bytes in %d packets", payload, len(c.got))
		}
	}
}

func TestParseIP(t *testing.T) {
	seg4 := tcpPacket(tcpSpec{v4: true, flags: 0x10, payload: []byte("x")})
	seg6 := tcpPacket(tcpSpec{flags: 0x10, payload: []byte("x")})
	for _, b := range [][]byte{seg4, seg6} {
		for n := range b { // every truncation
			if _, ok := parseIP(b[:n]); ok {
				t.Errorf("the first %d bytes of %d were taken", n, len(b))
			}
		}
		p, ok := parseIP(append(bytes.Clone(b), "behind"...))
		if !ok || !bytes.Equal(p.b, b) || p.proto != protoTCP || string(p.payload()[20:]) != "x" {
			t.Errorf("%+v", p)
		}
	}
	ext := func(next byte, headers ...byte) []byte {
		b := make([]byte, 40+len(headers)+8)
		putIPv6(b, next, client6, server6)
		copy(b[40:], headers)
		return b
	}
	for _, tt := range []struct {
		name        string
		b           []byte
		ok          bool
		proto       byte
		frag, first bool
	}{
		{"udp", ext(17), true, 17, false, true},
		{"options, udp", ext(0, 17, 0, 0, 0, 0, 0, 0, 0), true, 17, false, true},
		{"options, destination, icmp", ext(0, 60, 0, 0, 0, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0, 0, 0), true, 58, false, true},
		{"first fragment", ext(44, 17, 0, 0, 1, 0, 0, 0, 9), true, 17, true, true},
		{"later fragment", ext(44, 58, 0, 0, 0x08, 0, 0, 0, 9), true, 58, true, false},
		{"atomic fragment", ext(44, 58, 0, 0, 0, 0, 0, 0, 9), true, 58, false, true},
		{"two fragment headers", ext(44, 44, 0, 0, 1, 0, 0, 0, 9, 17, 0, 0, 1, 0, 0, 0, 9), false, 0, false, false},
		{"options too long", ext(0, 17, 9), false, 0, false, false},
		{"endless options", ext(0, make([]byte, 8*9)...), false, 0, false, false},
	} {
		p, ok := parseIP(tt.b)
		if ok != tt.ok || ok && (p.proto != tt.proto || p.frag != tt.frag || p.first != tt.first) {
			t.Errorf("%s: %v, %+v", tt.name, ok, p)
		}
	}
}

// superSegment makes what gVisor's TCP gives to WritePackets: headers in one
// view, payload in others.
func superSegment(spec tcpSpec, mss int, views int) *stack.PacketBuffer {
	payload := spec.payload
	spec.payload = nil
	h := tcpPacket(spec)
	ipLen := 40
	gso := stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, MSS: uint16(mss), L3HdrLen: 40, MaxSize: gsoMaxSize}
	if spec.v4 {
		ipLen = 20
		gso.Type, gso.L3HdrLen = stack.GSOTCPv4, 20
	}
	var data buffer.Buffer
	for i := range views {
		from, to := i*len(payload)/views, (i+1)*len(payload)/views
		_ = data.Append(buffer.NewViewWithData(payload[from:to]))
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: 100, Payload: data})
	copy(p.TransportHeader().Push(len(h)-ipLen), h[ipLen:])
	ip := p.NetworkHeader().Push(ipLen)
	copy(ip, h[:ipLen])
	if spec.v4 {
		header.IPv4(ip).SetTotalLength(uint16(len(h) + len(payload)))
		setIPv4Checksum(ip)
	} else {
		header.IPv6(ip).SetPayloadLength(uint16(len(h) + len(payload) - 40))
	}
	p.GSOOptions = gso
	return p
}

// Segments are judged by gVisor's header package, and joining them again gives
// the super-segment back.
func TestCut(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for round := range 400 {
		spec := tcpSpec{
			v4: round%2 == 0, ttl: 64, sport: 99, seq: rng.Uint32(), ack: rng.Uint32(), window: 77,
			flags: 0x10 | byte(rng.Uint32())&(flagFIN|flagPSH|flagCWR|flagECE), payload: make([]byte, 1+rng.IntN(gsoMaxSize)), fragment: 0x4000,
		}
		if rng.IntN(2) == 0 {
			spec.options = []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
		}
		(&pattern{at: uint64(round)}).fill(spec.payload)
		mss := 1400 - 40 - 20 - 12 - rng.IntN(1000)
		var got [][]byte
		d := newDevice(&Config{MTU: 1400, Headroom: 20, Tailroom: 16, Output: func(pkts [][]byte) {
			for _, p := range pkts {
				got = append(got, bytes.Clone(p[20:len(p)-16]))
			}
		}})
		var list stack.PacketBufferList
		p := superSegment(spec, mss, 1+rng.IntN(5))
		list.PushBack(p)
		if n, err := d.WritePackets(list); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		d.small.flush()
		p.DecRef()
		if want := (len(spec.payload) + mss - 1) / mss; len(got) != want {
			t.Fatalf("%d segments of %d bytes, want %d", len(got), len(spec.payload), want)
		}
		var stream []byte
		for i, b := range got {
			tcp := header.TCP(nil)
			if spec.v4 {
				ip := header.IPv4(b)
				if !ip.IsValid(len(b)) || !ip.IsChecksumValid() || int(ip.TotalLength()) != len(b) {
					t.Fatalf("segment %d: bad IPv4 header %x", i, b[:20])
				}
				if want := uint16(spec.seq) + uint16(i); ip.ID() != want {
					t.Errorf("segment %d: id %d, want %d", i, ip.ID(), want)
				}
				tcp = header.TCP(ip.Payload())
			} else {
				ip := header.IPv6(b)
				if !ip.IsValid(len(b)) || int(ip.PayloadLength()) != len(b)-40 {
					t.Fatalf("segment %d: bad IPv6 header %x", i, b[:40])
				}
				tcp = header.TCP(ip.Payload())
			}
			if want := spec.seq + uint32(len(stream)); tcp.SequenceNumber() != want {
				t.Errorf("segment %d: sequence number %d, want %d", i, tcp.SequenceNumber(), want)
			}
			want := spec.flags
			if i > 0 {
				want &^= flagCWR
			}
			if i < len(got)-1 {
				want &^= flagFIN | flagPSH
			}
			if byte(tcp.Flags()) != want {
				t.Errorf("segment %d of %d: flags %02x, want %02x", i, len(got), byte(tcp.Flags()), want)
			}
			if tcp.AckNumber() != spec.ack || tcp.WindowSize() != spec.window || !bytes.Equal(tcp.Options(), spec.options) {
				t.Errorf("segment %d: header %x", i, tcp[:tcp.DataOffset()])
			}
			if n := len(tcp.Payload()); n > mss || n == 0 {
				t.Errorf("segment %d: %d bytes", i, n)
			}
			stream = append(stream, tcp.Payload()...)
		}
		if !bytes.Equal(stream, spec.payload) {
			t.Fatal("the payload is not the same")
		}
	}
}

// The batch is handed over before it overflows, and a packet of any size fits.
func TestBatchFull(t *testing.T) {
	for _, mtu := range []int{1280, 65535} {
		packets, calls := 0, 0
		d := newDevice(&Config{MTU: mtu, Headroom: 4096, Tailroom: 4096, Output: func(pkts [][]byte) {
			packets += len(pkts)
			calls++
		}})
		b := d.batch()
		for range 100 {
			p := b.next(mtu)
			p[0], p[mtu-1] = 1, 1
		}
		b.done()
		if packets != 100 || calls < 2 || d.counters.bytesOut.Load() != uint64(100*mtu) {
			t.Errorf("MTU %d: %d packets in %d calls, %d bytes", mtu, packets, calls, d.counters.bytesOut.Load())
		}
	}
}

func TestOversize(t *testing.T) {
	d := newDevice(&Config{MTU: 1280, Output: func([][]byte) { t.Error("sent") }})
	for _, p := range []*stack.PacketBuffer{
		superSegment(tcpSpec{v4: true, payload: make([]byte, 1300)}, 1300, 1),
		superSegment(tcpSpec{payload: make([]byte, 3000)}, 1300, 1),
	} {
		var list stack.PacketBufferList
		list.PushBack(p)
		d.WritePackets(list)
		p.DecRef()
	}
	if n := d.counters.dropOversize.Load(); n != 2 {
		t.Errorf("%d dropped, want 2", n)
	}
}

// discard takes deliveries without keeping them.
type discard struct{}

func (discard) DeliverNetworkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}
func (discard) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer)    {}

// bulk is a batch as a receiver of UDP gets it: 44 segments of one flow.
func bulk(v4 bool) [][]byte {
	var pkts [][]byte
	spec := tcpSpec{v4: v4, ttl: 64, flags: 0x10, payload: make([]byte, 1348), options: []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}}
	for range 44 {
		pkts = append(pkts, tcpPacket(spec))
		spec.seq += uint32(len(spec.payload))
	}
	return pkts
}

func discardStack() *Stack {
	s, _ := captureStack()
	var n stack.NetworkDispatcher = discard{}
	s.dev.dispatcher.Store(&n)
	return s
}

func TestJoinAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, v4 := range []bool{true, false} {
		s, pkts := discardStack(), bulk(v4)
		s.Input(pkts) // fills gVisor's pools
		// gVisor's pools may lose an element to the collector, hence not 0 but
		// less than one.
		if n := testing.AllocsPerRun(200, func() { s.Input(pkts) }); n >= 1 {
			t.Errorf("%v allocations for %d segments", n, len(pkts))
		}
	}
}

func TestCutAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, v4 := range []bool{true, false} {
		d := newDevice(&Config{MTU: 1400, Headroom: 20, Tailroom: 16, Output: func([][]byte) {}})
		p := superSegment(tcpSpec{v4: v4, flags: 0x10, payload: make([]byte, 60000)}, 1348, 4)
		defer p.DecRef()
		var list stack.PacketBufferList
		list.PushBack(p)
		d.WritePackets(list)
		if n := testing.AllocsPerRun(200, func() { d.WritePackets(list) }); n >= 1 {
			t.Errorf("%v allocations for a super-segment", n)
		}
	}
}

func TestUDPAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	s := discardStack()
	s.forward, s.udp = true, func(_, _ netip.AddrPort, _ []byte) {}
	from, to := netip.AddrPortFrom(client4, 1), netip.AddrPortFrom(world4, 2)
	payload := make([]byte, 1200)
	pkt := make([]byte, 28+len(payload))
	putIPv4(pkt, protoUDP, client4, world4, 0, 0)
	putUDPHeader(pkt[20:], from, to, len(payload))
	batch := [][]byte{pkt}
	if n := testing.AllocsPerRun(200, func() {
		s.Input(batch)
		if err := s.WriteUDP(to, from, payload); err != nil {
			t.Error(err)
		}
	}); n >= 1 {
		t.Errorf("%v allocations for a datagram in and one out", n)
	}
}

func BenchmarkJoin(b *testing.B) {
	s, pkts := discardStack(), bulk(true)
	b.SetBytes(int64(len(pkts) * len(pkts[0])))
	b.ReportAllocs()
	for b.Loop() {
		s.Input(pkts)
	}
}

func BenchmarkCut(b *testing.B) {
	d := newDevice(&Config{MTU: 1400, Headroom: 20, Tailroom: 16, Output: func([][]byte) {}})
	p := superSegment(tcpSpec{v4: true, flags: 0x10, payload: make([]byte, 60000)}, 1348, 4)
	var list stack.PacketBufferList
	list.PushBack(p)
	b.SetBytes(60000)
	b.ReportAllocs()
	for b.Loop() {
		d.WritePackets(list)
	}
}

func BenchmarkTransfer(b *testing.B) {
	p := newPair(b)
	c, s := p.connect(b, server4)
	const size = 64 << 10
	b.SetBytes(size)
	go func() {
		buf := make([]byte, size)
		for range b.N {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
		_ = c.CloseWrite()
	}()
	buf := make([]byte, size)
	b.ResetTimer()
	for {
		if _, err := s.Read(buf); err != nil {
			return
		}
	}
}
