package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/packet"
	"github.com/anytun-go/anytun/anytun/portblock"
	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/session"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/anytun/wire"
	"github.com/anytun-go/anytun/netstack"
	"github.com/anytun-go/anytun/proxy"
	"github.com/anytun-go/anytun/proxy/socks5"
)

// What a packet costs on the whole road when many connections are open: from an
// application's socket through the SOCKS port, the client's netstack, two sockets
// of loopback and the server's tun egress to a device, and back. Behind the device
// is no kernel, but a TCP peer of a few lines.

// roadBatch is how many packets are in hand at once.
const roadBatch = 64

// roadSegment is the largest payload with an inner MTU of 1400 and timestamps.
const roadSegment = 1400 - 52

// farWorld is a server.Device with the peers of all connections behind it. The
// peer's port tells which connection it is: index+1.
type farWorld struct {
	pending chan [][]byte // to the client
	closed  chan struct{}
	once    sync.Once

	mu    sync.Mutex
	peers []farPeer
	bytes uint64        // received by all
	want  uint64        // so many are waited for
	there chan struct{} // they are there
}

// farPeer is one connection's far half.
type farPeer struct {
	addr, peer [4]byte // the peer's own and the client's public one
	port       uint16  // the client's public one
	seq, ack   uint32
	echo       uint32 // the client's latest timestamp
}

func newFarWorld(n int) *farWorld {
	return &farWorld{
		pending: make(chan [][]byte, 1024), closed: make(chan struct{}), peers: make([]farPeer, n), there: make(chan struct{}, 1),
	}
}

// ReadBatch implements server.Device.
func (w *farWorld) ReadBatch() ([][]byte, error) {
	select {
	case pkts := <-w.pending:
		return pkts, nil
	case <-w.closed:
		return nil, net.ErrClosed
	}
}

// Close implements server.Device.
func (w *farWorld) Close() error { w.once.Do(func() { close(w.closed) }); return nil }

// WriteBatch implements server.Device: SYNs are answered and data acknowledged.
func (w *farWorld) WriteBatch(pkts [][]byte) {
	var replies [][]byte
	w.mu.Lock()
	for k, p := range pkts {
		t := p[20:]
		i := int(binary.BigEndian.Uint16(t[2:])) - 1
		if i >= len(w.peers) || t[13]&4 != 0 { // RST
			continue
		}
		c := &w.peers[i]
		hl := int(t[12]>>4) * 4
		seq, n := binary.BigEndian.Uint32(t[4:]), len(t)-hl
		if hl >= 32 && t[13]&2 == 0 {
			c.echo = binary.BigEndian.Uint32(t[24:])
		}
		switch {
		case t[13]&2 != 0: // SYN
			*c = farPeer{addr: [4]byte(p[16:]), peer: [4]byte(p[12:]), port: binary.BigEndian.Uint16(t), ack: seq + 1}
			for o := t[20:hl]; len(o) > 9; o = o[1:] {
				if o[0] == 8 && o[1] == 10 {
					c.echo = binary.BigEndian.Uint32(o[2:])
				}
			}
			replies = append(replies, w.putLocked(nil, i, 0x12, roadOptions, 0))
		case n > 0 && seq == c.ack:
			c.ack += uint32(n)
			w.bytes += uint64(n)
			// One acknowledgement for what came in a row.
			if k+1 == len(pkts) || [4]byte(pkts[k+1][20:]) != [4]byte(t) {
				replies = append(replies, w.putLocked(nil, i, 0x10, nil, 0))
			}
		}
	}
	if w.want > 0 && w.bytes >= w.want {
		w.want = 0
		w.there <- struct{}{}
	}
	w.mu.Unlock()
	if len(replies) > 0 {
		w.pending <- replies
	}
}

// roadOptions are those of a SYN besides timestamps: MSS 1360, SACK, window scale 7.
var roadOptions = []byte{2, 4, 1360 >> 8, 1360 & 0xff, 4, 2, 1, 3, 3, 7, 1, 1}

// putLocked writes a packet of peer i to b, which it makes if need be, with room
// for the tunnel.
func (w *farWorld) putLocked(b []byte, i int, flags byte, options []byte, payload int) []byte {
	c := &w.peers[i]
	hl := 40 + 12 + len(options)
	if b == nil {
		b = make([]byte, wire.Overhead+hl+payload)
	}
	b = b[:wire.Overhead+hl+payload]
	p := b[wire.DataHeaderLen : len(b)-wire.TagLen]
	clear(p[:hl])
	p[0], p[6], p[8], p[9] = 0x45, 0x40, 64, 6
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], c.addr[:])
	copy(p[16:], c.peer[:])
	t := p[20:]
	binary.BigEndian.PutUint16(t, uint16(i+1))
	binary.BigEndian.PutUint16(t[2:], c.port)
	binary.BigEndian.PutUint32(t[4:], c.seq)
	binary.BigEndian.PutUint32(t[8:], c.ack)
	t[12], t[13] = byte(hl-20)/4<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	t[20], t[21], t[22], t[23] = 1, 1, 8, 10
	binary.BigEndian.PutUint32(t[24:], 1)
	binary.BigEndian.PutUint32(t[28:], c.echo)
	copy(t[32:], options)
	var v packet.View
	if v.Parse(p) == packet.OK {
		v.SetSource(netip.AddrFrom4(c.addr)) // so that the header's checksum is right
	}
	c.seq += uint32(payload)
	if flags&2 != 0 {
		c.seq++
	}
	return b
}

// growthRoad is the whole road, with connections open on it.
type growthRoad struct {
	*farWorld
	apps  *applications
	bufs  [3][roadBatch][]byte
	turn  int
	order []int
	at    int
}

func newGrowthRoad(b *testing.B, n int) *growthRoad {
	b.Helper()
	r := &growthRoad{farWorld: newFarWorld(n)}
	for i := range r.bufs {
		for k := range r.bufs[i] {
			r.bufs[i][k] = make([]byte, 2048)
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	run := func(name string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
				b.Errorf("%s: %v", name, err)
			}
		})
	}
	fail := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	key, err := session.NewPrivateKey()
	fail(err)
	cluster, err := session.NewCluster(time.Now())
	fail(err)
	listen := func() udp.Conn {
		c, err := udp.Listen(netip.MustParseAddrPort("127.0.0.1:0"), udp.Options{})
		fail(err)
		return c
	}
	serverConn, clientConn := listen(), listen()
	plan, err := portblock.NewPlan(portblock.Blocks{}, []netip.Addr{netip.MustParseAddr("198.51.100.1")}, nil, netip.Prefix{})
	fail(err)
	srv, err := server.New(server.Config{
		Conns: []udp.Conn{serverConn}, Cluster: cluster, Device: r.farWorld, Plan: plan,
		Clients: server.NewDirectory([]server.Enrolment{{Key: key.Public(), Name: "test", Number: 5}}),
	})
	fail(err)
	run("server", srv.Run)
	up := make(chan client.Session, 8)
	var stack atomic.Pointer[netstack.Stack]
	c, err := client.New(client.Config{
		Conn: clientConn, Servers: []netip.AddrPort{serverConn.LocalAddr()}, ServerKey: cluster.Public(), Key: key,
		Input:     func(pkts [][]byte) { stack.Load().Input(pkts) },
		OnSession: func(s client.Session) { up <- s },
	})
	fail(err)
	st, err := netstack.New(netstack.Config{MTU: 1400, Headroom: wire.DataHeaderLen, Tailroom: wire.TagLen, Output: c.Output})
	fail(err)
	stack.Store(st)
	run("client", c.Run)
	s := <-up
	fail(st.SetAddresses(s.Addresses[:]))
	fail(st.SetPortRange(s.FirstPort, s.LastPort))
	p, err := proxy.New(proxy.Config{Network: world{&netstack.Dialer{Stack: st}}, SOCKS: socks5.New(socks5.Config{})})
	fail(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fail(err)
	run("proxy", func(ctx context.Context) error { return p.Serve(ctx, l) })
	b.Cleanup(func() {
		fail(r.apps.end())
		stop()
		wg.Wait()
		fail(st.Close())
	})
	r.apps, err = startApplications()
	fail(err)
	fail(r.apps.tell('d', l.Addr().(*net.TCPAddr).Port, make([]int, n)))
	fail(r.apps.done())
	return r
}

// applications are another process, so that what they use isn't counted: it opens
// connections and moves bytes as it is told.
type applications struct {
	cmd *exec.Cmd
	to  io.WriteCloser
	by  io.ReadCloser
	msg []byte
}

const applicationsEnv = "ANYTUN_GROWTH_APPLICATIONS"

func TestMain(m *testing.M) {
	if os.Getenv(applicationsEnv) == "" {
		m.Run()
		return
	}
	if err := serveApplications(); err != nil && !errors.Is(err, io.EOF) {
		panic(err)
	}
}

func startApplications() (*applications, error) {
	a := &applications{cmd: exec.Command(os.Args[0])}
	a.cmd.Env = append(os.Environ(), applicationsEnv+"=1")
	a.cmd.Stderr = os.Stderr
	var err error
	if a.to, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if a.by, err = a.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	return a, a.cmd.Start()
}

// tell gives a command: d dials as many as there are connections, n being the
// port, w writes n bytes to each of the connections, r reads so many.
func (a *applications) tell(command byte, n int, connections []int) error {
	a.msg = append(a.msg[:0], command)
	a.msg = binary.BigEndian.AppendUint32(a.msg, uint32(n))
	a.msg = binary.BigEndian.AppendUint32(a.msg, uint32(len(connections)))
	for _, i := range connections {
		a.msg = binary.BigEndian.AppendUint32(a.msg, uint32(i))
	}
	_, err := a.to.Write(a.msg)
	return err
}

// done waits until a command d or r is carried out.
func (a *applications) done() error {
	_, err := io.ReadFull(a.by, a.msg[:1])
	return err
}

func (a *applications) end() error {
	a.to.Close()
	return a.cmd.Wait()
}

// serveApplications is the other process. It works with blocking sockets.
func serveApplications() error {
	var fds []int
	defer func() {
		for _, fd := range fds { // with a reset, so that all is over at once
			_ = syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
			_ = syscall.Close(fd)
		}
	}()
	var head [9]byte
	buf := make([]byte, 1<<16)
	for {
		if _, err := io.ReadFull(os.Stdin, head[:]); err != nil {
			return err
		}
		n, count := int(binary.BigEndian.Uint32(head[1:])), int(binary.BigEndian.Uint32(head[5:]))
		list := make([]byte, 4*count)
		if _, err := io.ReadFull(os.Stdin, list); err != nil {
			return err
		}
		if head[0] == 'd' {
			var err error
			if fds, err = dialAll(n, count); err != nil {
				return err
			}
		}
		for ; len(list) > 0 && head[0] != 'd'; list = list[4:] {
			fd := fds[binary.BigEndian.Uint32(list)]
			if head[0] == 'r' {
				if err := readAll(fd, buf[:n]); err != nil {
					return err
				}
			} else if _, err := syscall.Write(fd, buf[:n]); err != nil {
				return err
			}
		}
		if head[0] != 'w' {
			if _, err := os.Stdout.Write(head[:1]); err != nil {
				return err
			}
		}
	}
}

func dialAll(port, n int) ([]int, error) {
	fds := make([]int, n)
	const dialers = 16
	errs := make(chan error, dialers)
	for from := range dialers {
		go func() {
			for i := from; i < n; i += dialers {
				fd, err := socksDial(port, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i%16)}), uint16(i+1)))
				if err != nil {
					errs <- fmt.Errorf("connection %d: %w", i, err)
					return
				}
				fds[i] = fd
			}
			errs <- nil
		}()
	}
	var err error
	for range dialers {
		err = errors.Join(err, <-errs)
	}
	return fds, err
}

// socksDial opens a SOCKS5 tunnel with a blocking socket.
func socksDial(port int, to netip.AddrPort) (int, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, err
	}
	_ = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	hello := append([]byte{5, 1, 0, 5, 1, 0, 1}, to.Addr().AsSlice()...)
	hello = binary.BigEndian.AppendUint16(hello, to.Port())
	if _, err := syscall.Write(fd, hello); err != nil {
		return 0, err
	}
	answer := make([]byte, 12)
	if err := readAll(fd, answer); err != nil {
		return 0, err
	}
	if answer[1] != 0 || answer[3] != 0 {
		return 0, fmt.Errorf("socks: % x", answer)
	}
	return fd, nil
}

func readAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := syscall.Read(fd, b)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return nil
}

func (r *growthRoad) next() int {
	i := r.order[r.at]
	if r.at++; r.at == len(r.order) {
		r.at = 0
	}
	return i
}

// up lets the applications send n packets, run of them at once.
func (r *growthRoad) up(n, size, run int) error {
	r.mu.Lock()
	sent := r.bytes
	r.mu.Unlock()
	list := make([]int, roadBatch/run)
	for ; n > 0; n -= roadBatch {
		for k := range list {
			list[k] = r.next()
		}
		if err := r.apps.tell('w', size*run, list); err != nil {
			return err
		}
		r.await(sent) // a batch may be on its way
		sent += uint64(roadBatch * size)
	}
	r.await(sent)
	return nil
}

// await waits until the far end has got so many bytes.
func (r *growthRoad) await(n uint64) {
	r.mu.Lock()
	if r.bytes >= n {
		r.mu.Unlock()
		return
	}
	r.want = n
	r.mu.Unlock()
	<-r.there
}

// down lets n packets come.
func (r *growthRoad) down(n, size, run int) error {
	list := make([]int, 0, roadBatch)
	for more := false; ; {
		if n > 0 {
			pkts := make([][]byte, 0, roadBatch)
			list = list[:0]
			r.mu.Lock()
			for len(pkts) < roadBatch {
				i := r.next()
				list = append(list, i)
				for k := range run {
					flags := byte(0x10)
					if k == run-1 {
						flags |= 8 // PSH
					}
					pkts = append(pkts, r.putLocked(r.bufs[r.turn][len(pkts)], i, flags, nil, size))
				}
			}
			r.mu.Unlock()
			r.turn = (r.turn + 1) % len(r.bufs)
			r.pending <- pkts
			if err := r.apps.tell('r', size*run, list); err != nil {
				return err
			}
		}
		if more {
			if err := r.apps.done(); err != nil { // of the batch before
				return err
			}
		}
		if more = n > 0; !more {
			return nil
		}
		n -= roadBatch
	}
}

// BenchmarkGrowth is a packet on the whole road, out (up) and in (down), while so
// many connections are open. An operation is a packet; cpu-ns are those of all
// cores, the kernel's included, but not what the applications use. All
// connections have their turns in a random order, or 10 of them (few).
func BenchmarkGrowth(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 10_000} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			if n > 1000 && testing.Short() {
				b.Skip("opening so many connections takes seconds")
			}
			var files syscall.Rlimit
			if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Cur < uint64(n)+100 {
				b.Skipf("%d connections need more open files than the %d that this user may have", n, files.Cur)
			}
			r := newGrowthRoad(b, n)
			for _, way := range []struct {
				name string
				pass func(n, size, run int) error
			}{{"down", r.down}, {"up", r.up}} {
				for _, load := range []struct {
					name              string
					active, size, run int
				}{
					{"small", n, 64, 1}, {"full", n, roadSegment, 1}, {"runs", n, roadSegment, 8}, {"few", 10, roadSegment, 1},
				} {
					b.Run(way.name+"/"+load.name, func(b *testing.B) {
						r.order, r.at = rand.New(rand.NewPCG(1, uint64(load.active))).Perm(load.active), 0
						b.SetBytes(int64(load.size))
						n := (b.N + roadBatch - 1) / roadBatch * roadBatch
						used := cpuTime()
						if err := way.pass(n, load.size, load.run); err != nil {
							b.Fatal(err)
						}
						b.ReportMetric(float64(cpuTime()-used)/float64(n), "cpu-ns/op")
					})
				}
			}
		})
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
