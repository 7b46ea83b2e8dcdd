package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// pair is a Device on one end of a socket pair, which keeps messages apart as a
// TUN device does, and the test in the kernel's place on the other end.
type pair struct {
	*Device
	kernel int
}

func newPair(tb testing.TB, cfg Config) *pair {
	tb.Helper()
	cfg, err := cfg.withDefaults()
	if err != nil {
		tb.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
	}
	p := &pair{&Device{name: "pair", uso: true, file: os.NewFile(uintptr(fds[0]), "pair"), free: make(chan *writer, freeWriters)}, fds[1]}
	if p.rc, err = p.file.SyscallConn(); err != nil {
		tb.Fatal(err)
	}
	p.reader = newReader(p.Device, cfg)
	tb.Cleanup(func() {
		_ = p.Close()
		_ = unix.Close(p.kernel)
	})
	return p
}

// give hands a message to the device.
func (p *pair) give(tb testing.TB, v vnet, pkt []byte) {
	tb.Helper()
	b := make([]byte, vnetSize, vnetSize+len(pkt))
	v.put(b)
	if _, err := unix.Write(p.kernel, append(b, pkt...)); err != nil {
		tb.Fatal(err)
	}
}

// got returns what the device has written since.
func (p *pair) got(tb testing.TB) (vs []vnet, pkts [][]byte) {
	tb.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(p.kernel, b)
		if errors.Is(err, unix.EAGAIN) {
			return vs, pkts
		}
		if err != nil || n < vnetSize {
			tb.Fatalf("read %d: %v", n, err)
		}
		vs = append(vs, getVnet(b))
		pkts = append(pkts, bytes.Clone(b[vnetSize:n]))
	}
}

// checkPartial verifies what the kernel needs for a checksum.
func checkPartial(tb testing.TB, v vnet, b []byte) {
	tb.Helper()
	_, l, ok := examine(b)
	if !ok {
		tb.Fatalf("malformed packet written: %x", b)
	}
	at := checksumAt(&l)
	if v.flags&vnetNeedsChecksum == 0 {
		if at > 0 && l.covered && !(l.proto == protoUDP && int(binary.BigEndian.Uint16(b[l.l4+4:])) < len(b)-l.l4) {
			tb.Fatalf("no checksum asked for: %x", b)
		}
		if v.gso != gsoNone {
			tb.Fatalf("super-packet without checksum")
		}
		return
	}
	if int(v.start) != l.l4 || int(v.offset) != at {
		tb.Fatalf("checksum at %d+%d, want %d+%d", v.start, v.offset, l.l4, at)
	}
	if l.v4 && l.l4 >= 20 || l.l4 == 40 {
		want := ^twinSum(twinPseudo(b, len(b)-l.l4))
		if got := binary.BigEndian.Uint16(b[l.l4+at:]); got != want {
			tb.Fatalf("sum of the pseudo header %#x, want %#x", got, want)
		}
	}
	if l.v4 && v.gso != gsoNone && twinSum(b[:l.l4]) != 0 {
		tb.Fatalf("IPv4 checksum of a super-packet is wrong")
	}
}

// alike is whether the kernel sends what was written. Identifications may differ
// where they mean nothing.
func alike(sent, written []byte) bool {
	sent, written = blank(sent), blank(written)
	if len(sent) > 20 && sent[0]>>4 == 4 && sent[6]&0x40 != 0 && len(sent) == len(written) {
		copy(sent[4:6], written[4:6])
		copy(sent[10:12], written[10:12])
	}
	return bytes.Equal(sent, written)
}

// TestWriteTwin cuts what WriteBatch has joined, and must get what it was given.
func TestWriteTwin(t *testing.T) {
	p := newPair(t, Config{})
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	given, messages := 0, 0
	for round := range 600 {
		var pkts [][]byte
		for range 1 + r.IntN(3) {
			odd := 0
			if r.IntN(2) == 0 {
				odd = 5
			}
			pkts = append(pkts, newFlow(r, odd).packets(1+r.IntN(60))...)
		}
		switch r.IntN(4) {
		case 0: // out of order, duplicated, flows mixed
			r.Shuffle(len(pkts)/2, func(i, j int) { pkts[i], pkts[j] = pkts[j], pkts[i] })
		case 1: // more flows than can be open, in turns
			pkts = pkts[:0]
			flows := make([]*flow, 1+r.IntN(2*maxOpen))
			for i := range flows {
				flows[i] = newFlow(r, 5*r.IntN(2))
			}
			for range 2 + r.IntN(200) {
				f := flows[r.IntN(len(flows))]
				pkts = append(pkts, f.packets(1+r.IntN(3))...)
			}
		}
		var want, batch [][]byte
		for _, b := range pkts {
			batch = append(batch, bytes.Clone(b))
			if _, _, ok := examine(b); ok {
				want = append(want, b)
			}
		}
		p.WriteBatch(batch)
		vs, supers := p.got(t)
		var sent [][]byte
		for i, b := range supers {
			checkPartial(t, vs[i], b)
			sent = append(sent, twinCut(b, vs[i])...)
		}
		if len(sent) != len(want) {
			t.Fatalf("seed %d round %d: %d packets, want %d", seed, round, len(sent), len(want))
		}
		sent, want = twinOrder(sent), twinOrder(want)
		for i := range sent {
			if !alike(sent[i], want[i]) {
				t.Fatalf("seed %d round %d: packet %d\n%x, want\n%x", seed, round, i, sent[i], want[i])
			}
		}
		given += len(sent)
		messages += len(supers)
	}
	if messages*2 > given {
		t.Errorf("%d packets in %d messages: too few are joined", given, messages)
	}
	s := p.counters.snapshot()
	if s.Written.Packets != uint64(given) || s.Written.Messages != uint64(messages) {
		t.Errorf("counted %+v, want %d in %d", s.Written, given, messages)
	}
}

// TestReadTwin compares the cut of random super-packets with the twin's.
func TestReadTwin(t *testing.T) {
	for _, cfg := range []Config{{Headroom: 20, Tailroom: 16}, {}, {Headroom: 3, Tailroom: 1}} {
		p := newPair(t, cfg)
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 0))
		for round := range 500 {
			var want [][]byte
			for range 1 + r.IntN(8) {
				v, b := superPacket(r)
				p.give(t, v, b)
				want = append(want, twinCut(b, v)...)
			}
			var got [][]byte
			for len(got) < len(want) {
				bufs, err := p.ReadBatch()
				if err != nil {
					t.Fatal(err)
				}
				for i, b := range bufs {
					for j := range b { // buffers must not overlap
						b[j] ^= byte(i)
					}
				}
				for i, b := range bufs {
					for j := range b {
						b[j] ^= byte(i)
					}
					if cap(b) != len(b) {
						t.Fatalf("buffer of %d bytes has room for %d", len(b), cap(b))
					}
					got = append(got, bytes.Clone(b[cfg.Headroom:len(b)-cfg.Tailroom]))
				}
			}
			for i := range want {
				if !bytes.Equal(blank(got[i]), blank(want[i])) {
					t.Fatalf("seed %d round %d: packet %d of %d\n%x, want\n%x", seed, round, i, len(want), got[i], want[i])
				}
			}
		}
		if s := p.counters.snapshot(); s.Drops != [NumDropReasons]uint64{} {
			t.Errorf("drops: %v", s.Drops)
		}
	}
}

// superPacket makes one as a kernel would, sometimes of tiny pieces.
func superPacket(r *rand.Rand) (vnet, []byte) {
	f := newFlow(r, 0)
	n := r.IntN(65535 - 100)
	v := vnet{gsoSize: uint16(1 + r.IntN(1400))}
	switch r.IntN(4) {
	case 0:
		v.gsoSize = 0
		n = r.IntN(1300)
	case 1:
		v.gsoSize = uint16(1 + r.IntN(40))
		n = r.IntN(20000)
	}
	n = max(n, 1)
	b := f.packet(n)
	l4 := 40
	if f.v4 {
		l4 = 20
	}
	v.flags, v.start = vnetNeedsChecksum, uint16(l4)
	switch {
	case f.udp:
		v.offset = 6
	default:
		v.offset = 16
		b[l4+13] = byte(r.Uint32()) // all flags
	}
	switch {
	case v.gsoSize == 0:
	case f.udp:
		v.gso = gsoUDP
	case f.v4:
		v.gso = gsoTCPv4
	default:
		v.gso = gsoTCPv6
	}
	if v.gso != gsoNone && r.IntN(5) == 0 && !f.udp {
		v.gso |= gsoECN
	}
	return v, b
}

// TestReadForeignChecksum finishes the checksums that the tunnel can't do without.
func TestReadForeignChecksum(t *testing.T) {
	p := newPair(t, Config{})
	f := newFlow(rand.New(rand.NewPCG(1, 2)), 0)
	f.v4, f.udp = false, true
	b := f.packet(33)
	b[6] = protoICMPv6
	sum := twinSum(twinPseudo(b, len(b)-40))
	binary.BigEndian.PutUint16(b[42:], ^sum)
	p.give(t, vnet{flags: vnetNeedsChecksum, start: 40, offset: 2}, b)
	got, err := p.ReadBatch()
	if err != nil || len(got) != 1 {
		t.Fatalf("%d packets: %v", len(got), err)
	}
	if c := twinSum(append(twinPseudo(b, len(b)-40), got[0][40:]...)); c != 0 {
		t.Errorf("checksum is off by %#x", c)
	}
}

// TestWriteDrops counts what can't be delivered.
func TestWriteDrops(t *testing.T) {
	p := newPair(t, Config{})
	r := rand.New(rand.NewPCG(1, 2))
	v4, v6 := newFlow(r, 0), newFlow(r, 0)
	v4.v4, v4.udp, v6.v4, v6.udp = true, false, false, true
	tcp, udp := v4.packet(100), v6.packet(100)
	bad := map[string][]byte{
		"empty":          {},
		"one byte":       {0x45},
		"version 5":      append([]byte{0x55}, tcp[1:]...),
		"cut":            tcp[:len(tcp)-1],
		"cut v6":         udp[:len(udp)-1],
		"ihl":            change(tcp, 0, 0x44),
		"ihl too long":   change(change(tcp, 2, 0), 3, 19),
		"tcp offset":     change(tcp, 32, 0x40),
		"tcp offset end": change(change(change(tcp, 2, 0), 3, 40), 32, 0xf0),
		"tcp short":      change(change(tcp, 2, 0), 3, 39),
		"udp too long":   change(udp, 45, 255),
		"udp too short":  change(udp, 45, 7),
		"extension":      change(udp[:44:44], 6, protoHopByHop),
		"extension end":  change(change(udp, 6, protoHopByHop), 41, 0xff),
	}
	bad["extension"][5] = 4
	n := uint64(0)
	for name, b := range bad {
		p.WriteBatch([][]byte{bytes.Clone(b)})
		n++
		if got := p.counters.snapshot().Drops[DropMalformed]; got != n {
			t.Errorf("%s: %d drops, want %d", name, got, n)
			n = got
		}
	}
	if _, pkts := p.got(t); len(pkts) != 0 {
		t.Errorf("%d of them were written", len(pkts))
	}
	_ = p.Close()
	p.WriteBatch([][]byte{tcp, udp})
	if s := p.counters.snapshot(); s.Drops[DropClosed] != 2 {
		t.Errorf("after Close: %v", s.Drops)
	}
}

func change(b []byte, at int, to byte) []byte {
	b = bytes.Clone(b)
	b[at] = to
	return b
}

// TestWriteAsItIs has packets that are not joined nor given a checksum.
func TestWriteAsItIs(t *testing.T) {
	p := newPair(t, Config{})
	r := rand.New(rand.NewPCG(3, 4))
	f := newFlow(r, 0)
	f.v4, f.udp, f.df = true, true, false
	fragment := change(f.packet(80), 7, 1)
	gre := change(f.packet(80), 9, 47)
	icmp := change(f.packet(80), 9, 1)
	f.v4 = false
	later := change(f.packet(80), 6, protoFragment)
	later[40], later[43] = protoTCP, 8 // at 8
	routed := change(f.packet(80), 6, protoRouting)
	copy(routed[40:], []byte{protoUDP, 0, 0, 1})
	for _, b := range [][]byte{fragment, gre, icmp, later, routed} {
		p.WriteBatch([][]byte{bytes.Clone(b), bytes.Clone(b)})
		vs, pkts := p.got(t)
		if len(pkts) != 2 {
			t.Fatalf("%d packets written of %x", len(pkts), b)
		}
		for i := range pkts {
			if vs[i] != (vnet{}) || !bytes.Equal(pkts[i], b) {
				t.Errorf("%+v %x, want %x", vs[i], pkts[i], b)
			}
		}
	}
	// What follows the packet in its buffer is no part of it.
	f.v4 = true
	b := f.packet(10)
	p.WriteBatch([][]byte{append(bytes.Clone(b), 1, 2, 3)})
	if _, pkts := p.got(t); len(pkts) != 1 || !alike(pkts[0], b) {
		t.Errorf("with a trailer: %x, want %x", pkts, b)
	}
	// A UDP datagram that ends before its packet has its checksum computed here.
	for range 50 {
		b := f.packet(1 + r.IntN(100))
		n := udpSize + r.IntN(len(b)-28)
		binary.BigEndian.PutUint16(b[24:], uint16(n))
		p.WriteBatch([][]byte{b})
		vs, pkts := p.got(t)
		if len(pkts) != 1 || vs[0] != (vnet{}) || twinSum(append(twinPseudo(b, n), pkts[0][20:20+n]...)) != 0 {
			t.Errorf("%+v %x", vs, pkts)
		}
	}
}

// TestJoinRules has, for each rule, two packets that must stay apart, and the
// pairs that must not.
func TestJoinRules(t *testing.T) {
	type change func(a, b []byte, l4 int)
	set := func(at int, to byte) change { return func(_, b []byte, l4 int) { b[l4+at] = to } }
	flag := func(f byte) change { return func(_, b []byte, l4 int) { b[l4+13] |= f } }
	for _, c := range []struct {
		name     string
		v4, v6   bool
		udp, tcp bool
		join     bool
		change   change
	}{
		{"nothing", true, true, true, true, true, func(_, _ []byte, _ int) {}},
		{"psh", true, true, false, true, true, flag(flagPSH)},
		{"psh before", true, true, false, true, false, func(a, _ []byte, l4 int) { a[l4+13] |= flagPSH }},
		{"ece both", true, true, false, true, true, func(a, b []byte, l4 int) { a[l4+13] |= flagECE; b[l4+13] |= flagECE }},
		{"ece", true, true, false, true, false, flag(flagECE)},
		{"fin", true, true, false, true, false, flag(flagFIN)},
		{"syn", true, true, false, true, false, flag(2)},
		{"rst", true, true, false, true, false, flag(4)},
		{"urg", true, true, false, true, false, flag(0x20)},
		{"cwr", true, true, false, true, false, flag(flagCWR)},
		{"cwr both", true, true, false, true, false, func(a, b []byte, l4 int) { a[l4+13] |= flagCWR; b[l4+13] |= flagCWR }},
		{"window", true, true, false, true, false, set(15, 0)},
		{"ack", true, true, false, true, false, set(11, 0)},
		{"option", true, true, false, true, false, set(21, 0)},
		{"port", true, true, true, true, false, set(1, 0)},
		{"sequence", true, true, false, true, false, func(_, b []byte, l4 int) { b[l4+7]++ }},
		{"tos", true, false, true, true, false, func(_, b []byte, _ int) { b[1] = 1 }},
		{"ttl", true, false, true, true, false, func(_, b []byte, _ int) { b[8]-- }},
		{"df", true, false, true, true, false, func(_, b []byte, _ int) { b[6] ^= 0x40 }},
		{"more fragments", true, false, true, true, false, func(_, b []byte, _ int) { b[6] |= 0x20 }},
		{"offset", true, false, true, true, false, func(_, b []byte, _ int) { b[7] = 1 }},
		{"fragments", true, false, true, true, false, func(a, b []byte, _ int) { a[6] |= 0x20; b[6] |= 0x20 }},
		{"id", true, false, true, true, false, func(_, b []byte, _ int) { b[5]++ }},
		{"id with df", true, false, true, true, true, func(a, b []byte, _ int) { a[6], b[6] = 0x40, 0x40; b[5]++ }},
		{"source", true, false, true, true, false, func(_, b []byte, _ int) { b[15]++ }},
		{"flow label", false, true, true, true, false, func(_, b []byte, _ int) { b[3]++ }},
		{"hop limit", false, true, true, true, false, func(_, b []byte, _ int) { b[7]-- }},
		{"destination", false, true, true, true, false, func(_, b []byte, _ int) { b[39]++ }},
	} {
		for _, v4 := range []bool{true, false} {
			for _, udp := range []bool{true, false} {
				if v4 && !c.v4 || !v4 && !c.v6 || udp && !c.udp || !udp && !c.tcp {
					continue
				}
				f := newFlow(rand.New(rand.NewPCG(5, 6)), 0)
				f.v4, f.udp, f.df, f.options, f.psh, f.port = v4, udp, false, 12, 1<<30, 999
				a, b := f.packet(700), f.packet(700)
				l4 := 40
				if v4 {
					l4 = 20
				}
				c.change(a, b, l4)
				_, l, ok := examine(a)
				if !ok {
					t.Fatalf("%s: malformed", c.name)
				}
				r := startRun(a, &l, true)
				if got := r.add(b); got != c.join {
					t.Errorf("%s: v4 %v udp %v: joined %v", c.name, v4, udp, got)
				}
				if r := startRun(a, &l, false); udp && r.add(b) {
					t.Errorf("%s: joined without USO", c.name)
				}
			}
		}
	}
}

// TestJoinLimits has the longest runs.
func TestJoinLimits(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		for _, size := range []int{0, 1, 400, 1348, 9000} {
			p := newPair(t, Config{})
			f := newFlow(rand.New(rand.NewPCG(7, 8)), 0)
			f.v4, f.udp, f.psh = v4, false, 1<<30
			var pkts [][]byte
			for range 400 {
				pkts = append(pkts, f.packet(size))
			}
			p.WriteBatch(pkts)
			vs, supers := p.got(t)
			n := 0
			for i, b := range supers {
				checkPartial(t, vs[i], b)
				n += len(twinCut(b, vs[i]))
			}
			if n != 400 || size > 0 && len(supers) > 1+400/min(maxRun, 60000/(size+1)) {
				t.Errorf("v4 %v, %d bytes each: %d packets in %d messages", v4, size, n, len(supers))
			}
		}
	}
}

// TestInterleaved has flows whose packets lie between each other's.
func TestInterleaved(t *testing.T) {
	for _, c := range []struct{ flows, each, most int }{
		{1, 40, 1},
		{2, 40, 2},
		{maxOpen, 10, maxOpen},
		{maxOpen + 1, 10, 10 * (maxOpen + 1)}, // one too many to be joined, in the worst order
	} {
		p := newPair(t, Config{})
		var pkts [][]byte
		flows := make([]*flow, c.flows)
		for i := range flows {
			f := newFlow(rand.New(rand.NewPCG(17, uint64(i))), 0)
			f.udp, f.psh, f.port = false, 1<<30, uint16(i)
			flows[i] = f
		}
		for range c.each {
			for _, f := range flows {
				pkts = append(pkts, f.packet(100))
			}
		}
		p.WriteBatch(pkts)
		vs, supers := p.got(t)
		n := 0
		for i, b := range supers {
			n += len(twinCut(b, vs[i]))
		}
		if n != len(pkts) || len(supers) > c.most {
			t.Errorf("%d flows: %d of %d packets in %d messages, want at most %d", c.flows, n, len(pkts), len(supers), c.most)
		}
	}
}

// TestBarrier: what may belong to any flow overtakes none, and none overtakes it.
func TestBarrier(t *testing.T) {
	p := newPair(t, Config{})
	a, b := newFlow(rand.New(rand.NewPCG(18, 1)), 0), newFlow(rand.New(rand.NewPCG(18, 2)), 0)
	for _, f := range []*flow{a, b} {
		f.v4, f.udp, f.df, f.psh = true, false, true, 1<<30
	}
	fragment := a.packet(80)
	fragment[6] |= 0x20
	p.WriteBatch([][]byte{a.packet(50), b.packet(50), bytes.Clone(fragment), b.packet(50), a.packet(50)})
	_, pkts := p.got(t)
	if len(pkts) != 5 || !bytes.Equal(pkts[2], fragment) {
		t.Errorf("%d messages, the fragment is not the third", len(pkts))
	}
}

// FuzzWrite gives WriteBatch anything twice, so that it may be joined with itself.
func FuzzWrite(f *testing.F) {
	r := rand.New(rand.NewPCG(9, 10))
	for range 20 {
		fl := newFlow(r, 3)
		f.Add(fl.packet(r.IntN(50)), fl.packet(r.IntN(50)))
	}
	f.Add([]byte{}, []byte{0x60})
	p := newPair(f, Config{})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) > maxPacket || len(b) > maxPacket {
			return
		}
		batch := [][]byte{bytes.Clone(a), bytes.Clone(b), bytes.Clone(b)}
		p.WriteBatch(batch)
		vs, pkts := p.got(t)
		var want, sent [][]byte
		for _, b := range [][]byte{a, b, b} {
			if b, _, ok := examine(b); ok {
				want = append(want, b)
			}
		}
		for i := range pkts {
			checkPartial(t, vs[i], pkts[i])
			sent = append(sent, twinCut(pkts[i], vs[i])...)
		}
		if len(sent) != len(want) {
			t.Fatalf("%d packets, want %d", len(sent), len(want))
		}
		sent, want = twinOrder(sent), twinOrder(want)
		for i := range sent {
			// IPv4 checksums of joined packets are made anew.
			if sent[i][0]>>4 == 4 && len(pkts) != len(sent) {
				copy(sent[i][10:12], want[i][10:12])
			}
			if !alike(sent[i], want[i]) {
				t.Fatalf("packet %d: %x, want %x", i, sent[i], want[i])
			}
		}
	})
}

// FuzzRead gives ReadBatch anything that a kernel could only give by mistake.
func FuzzRead(f *testing.F) {
	r := rand.New(rand.NewPCG(11, 12))
	for range 20 {
		v, b := superPacket(r)
		h := make([]byte, vnetSize)
		v.put(h)
		f.Add(append(h, b[:min(len(b), 300)]...))
	}
	const head, tail = 20, 16
	p := newPair(f, Config{Headroom: head, Tailroom: tail})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 || len(b) > vnetSize+maxPacket {
			return
		}
		if _, err := unix.Write(p.kernel, b); err != nil {
			t.Fatal(err)
		}
		rd := p.reader
		_ = p.rc.Control(rd.now)
		if rd.errno != 0 {
			t.Fatalf("%d packets, %v", len(rd.packets), rd.errno)
		}
		payload := 0
		for _, q := range rd.packets {
			q = q[head : len(q)-tail]
			l, ok := parse(q)
			if !ok || l.size != len(q) {
				t.Fatalf("malformed piece %x", q)
			}
			payload += len(q) - l.l4
		}
		if len(rd.packets) == 0 {
			return
		}
		l, ok := parse(b[vnetSize:])
		if !ok || payload < l.size-l.l4 {
			t.Fatalf("%d bytes of %d came through", payload, l.size-l.l4)
		}
	})
}

// FuzzParse holds the parser to its promise: offsets inside the packet.
func FuzzParse(f *testing.F) {
	r := rand.New(rand.NewPCG(13, 14))
	for range 10 {
		f.Add(newFlow(r, 2).packet(r.IntN(20)))
	}
	ext := newFlow(r, 0)
	ext.v4 = false
	for _, proto := range []byte{protoHopByHop, protoRouting, protoFragment, protoAH, protoDestination} {
		b := ext.packet(60)
		b[6], b[40], b[41] = proto, protoTCP, 1
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, ok := parse(b)
		if !ok {
			return
		}
		if l.size > len(b) || l.l4 > l.size || l.l4 < 20 || l.v4 != (b[0]>>4 == 4) {
			t.Fatalf("%+v of %d bytes", l, len(b))
		}
		for n := range l.size {
			if _, ok := parse(b[:n]); ok {
				t.Fatalf("a prefix of %d bytes passes for all %d", n, l.size)
			}
		}
	})
}

func TestNoAllocation(t *testing.T) {
	p := newPair(t, Config{Headroom: 20, Tailroom: 16})
	f := newFlow(rand.New(rand.NewPCG(15, 16)), 0)
	f.v4, f.udp, f.piece = true, false, 1360
	var pkts [][]byte
	for range 40 {
		pkts = append(pkts, f.packet(1360))
	}
	buf := make([]byte, 1<<17)
	if n := testing.AllocsPerRun(100, func() {
		p.WriteBatch(pkts)
		for {
			if n, _ := unix.Read(p.kernel, buf); n <= 0 {
				break
			}
		}
	}); n != 0 {
		t.Errorf("WriteBatch allocates %v times", n)
	}
	msg := make([]byte, vnetSize)
	v := vnet{flags: vnetNeedsChecksum, gso: gsoTCPv4, gsoSize: 1360, start: 20, offset: 16}
	v.put(msg)
	msg = append(msg, f.packet(60000)...)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := unix.Write(p.kernel, msg); err != nil {
			t.Fatal(err)
		}
		if pkts, err := p.ReadBatch(); err != nil || len(pkts) != 45 {
			t.Fatalf("%d packets: %v", len(pkts), err)
		}
	}); n != 0 {
		t.Errorf("ReadBatch allocates %v times", n)
	}
}
