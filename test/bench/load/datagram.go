package main

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/net/ipv4"
)

const (
	echoBytes = 1200
	// A datagram that isn't back after echoLost is taken for lost. Looking costs,
	// so that happens every echoLook only.
	echoLost = 250 * time.Millisecond
	echoLook = 50 * time.Millisecond
)

// echo keeps so many datagrams in flight and counts those that come back.
func (t test) echo(window int) (figures, error) {
	d, err := t.path.dialUDP()
	if err != nil {
		return nil, err
	}
	defer d.close()
	w := newEchoes(d, window)
	w.resend(0, -1) // all of them
	var took []float64
	var before usageAt
	in := messages(batchSize, echoBytes+len(d.header)+512)
	began := time.Now()
	counting, lost, looked := false, 0, time.Duration(0)
	for {
		now := time.Since(began)
		switch {
		case !counting && now > t.warm:
			counting, took, lost = true, nil, 0
			before = t.procs.now()
		case now > t.warm+t.dur:
			used := t.procs.now().since(before)
			n := float64(len(took))
			if n == 0 {
				return nil, errors.New("nothing came back")
			}
			f := figures{
				figPerSecond: n / used.wall.Seconds(), figFailed: float64(lost),
				figP50: percentile(took, 50), figP99: percentile(took, 99),
			}
			used.addTo(f, figClientCPUEach, figServerCPUEach, n/1e6)
			return f, nil
		}
		if now-looked > echoLook {
			looked = now
			lost += w.resend(now, echoLost)
			if err := d.udp.SetReadDeadline(time.Now().Add(echoLook)); err != nil {
				return nil, err
			}
		}
		n, err := d.ReadBatch(in, 0)
		if err != nil {
			continue // a deadline, or an ICMP error about what was sent: both are datagrams that don't come back
		}
		now = time.Since(began)
		for _, m := range in[:n] {
			if flight, ok := w.back(m.Buffers[0][:m.N], now); ok && counting {
				took = append(took, float64(flight.Nanoseconds())/1e3)
			}
		}
		w.flush()
	}
}

// echoes are datagrams in flight, each in a slot that it takes with it as a
// number, along with how often the slot was used: so one that comes back after
// it was given up is nobody's.
type echoes struct {
	path     *datagramPath
	payloads [][]byte
	slots    []ipv4.Message
	sent     []time.Duration
	used     []uint32
	out      []ipv4.Message // to be sent by the next flush
}

func newEchoes(d *datagramPath, window int) *echoes {
	w := &echoes{
		path: d, payloads: make([][]byte, window), slots: make([]ipv4.Message, window),
		sent: make([]time.Duration, window), used: make([]uint32, window),
	}
	for i := range w.slots {
		whole, payload := d.packet(askEcho, echoBytes)
		w.slots[i].Buffers, w.payloads[i] = [][]byte{whole}, payload
	}
	return w
}

// send puts a slot's next datagram into the queue.
func (w *echoes) send(slot int, now time.Duration) {
	w.used[slot]++
	w.sent[slot] = now
	binary.BigEndian.PutUint32(w.payloads[slot][1:], uint32(slot))
	binary.BigEndian.PutUint32(w.payloads[slot][5:], w.used[slot])
	w.out = append(w.out, w.slots[slot])
}

func (w *echoes) flush() {
	w.path.writeAll(w.out)
	w.out = w.out[:0]
}

// resend sends what was in flight for longer than limit anew, and says how many
// that were.
func (w *echoes) resend(now, limit time.Duration) int {
	for slot, sent := range w.sent {
		if now-sent > limit {
			w.send(slot, now)
		}
	}
	n := len(w.out)
	w.flush()
	return n
}

// back takes an answer: its slot is sent again with the next flush.
func (w *echoes) back(b []byte, now time.Duration) (flight time.Duration, ok bool) {
	head := len(w.path.header)
	if len(b) != head+echoBytes {
		return 0, false
	}
	slot := binary.BigEndian.Uint32(b[head+1:])
	if int(slot) >= len(w.slots) || binary.BigEndian.Uint32(b[head+5:]) != w.used[slot] {
		return 0, false
	}
	flight = now - w.sent[slot]
	w.send(int(slot), now)
	return flight, true
}

// datagramsUp sends as fast as it can. The sink's clock and count decide.
func (t test) datagramsUp(size int) (figures, error) {
	d, err := t.path.dialUDP()
	if err != nil {
		return nil, err
	}
	defer d.close()
	all := make([]ipv4.Message, blastSize)
	send := func(run uint64, dur time.Duration) (sent float64) {
		for i := range all {
			whole, payload := d.packet(askTake, size)
			binary.BigEndian.PutUint64(payload[1:], run)
			all[i].Buffers = [][]byte{whole}
		}
		for end := time.Now().Add(dur); time.Now().Before(end); sent += blastSize {
			d.writeAll(all)
		}
		return sent
	}
	send(rand.Uint64(), t.warm)
	run := rand.Uint64()
	before := t.procs.now()
	sent := send(run, t.dur)
	used := t.procs.now().since(before)
	pause(300 * time.Millisecond) // for what is on its way
	c, err := t.direct.count(run)
	if err != nil {
		return nil, err
	}
	if c.datagrams < 2 || c.last <= c.first {
		return nil, errors.New("nothing arrived")
	}
	n := float64(c.datagrams)
	f := figures{figPerSecond: n / (c.last - c.first).Seconds(), figLoss: 1 - n/max(sent, 1)}
	used.addTo(f, figClientCPUEach, figServerCPUEach, n/1e6)
	return f, nil
}

// datagramsDown has the sink send as fast as it can and counts what comes.
func (t test) datagramsDown(size int) (figures, error) {
	d, err := t.path.dialUDP()
	if err != nil {
		return nil, err
	}
	defer d.close()
	whole, payload := d.packet(askBlast, 16)
	total := t.warm + t.dur
	binary.BigEndian.PutUint32(payload[1:], uint32((total + 100*time.Millisecond).Milliseconds()))
	binary.BigEndian.PutUint16(payload[5:], uint16(size))
	in := messages(batchSize, size+len(d.header)+512)
	var before usageAt
	var n float64
	began := time.Now()
	asked, looked, counting := time.Duration(-1), time.Duration(-1), false
	for {
		now := time.Since(began)
		if n == 0 && !counting && (asked < 0 || now-asked > 200*time.Millisecond) {
			asked = now // again, if nothing has come: one datagram is soon lost
			if _, err := d.udp.Write(whole); err != nil {
				return nil, err
			}
		}
		switch {
		case !counting && now > t.warm:
			counting, n = true, 0
			before = t.procs.now()
		case now > total:
			used := t.procs.now().since(before)
			if n == 0 {
				return nil, errors.New("nothing arrived")
			}
			pause(400 * time.Millisecond) // until the sink has stopped
			f := figures{figPerSecond: n / used.wall.Seconds()}
			used.addTo(f, figClientCPUEach, figServerCPUEach, n/1e6)
			return f, nil
		}
		if looked < 0 || now-looked > echoLook {
			looked = now
			if err := d.udp.SetReadDeadline(time.Now().Add(2 * echoLook)); err != nil {
				return nil, err
			}
		}
		k, err := d.ReadBatch(in, 0)
		if err != nil {
			continue
		}
		for _, m := range in[:k] {
			if m.N == len(d.header)+size {
				n++
			}
		}
	}
}
