package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"reflect"
	"testing"
	"time"
)

func TestCountRoundTrip(t *testing.T) {
	for _, c := range []count{
		{streams: []uint64{}},
		{at: 5 * time.Second, datagrams: 7, first: 1, last: 2, streams: []uint64{1, 1 << 40}},
	} {
		b := c.append(nil)
		got, err := readCount(bytes.NewReader(b))
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%+v became %+v, %v", c, got, err)
		}
		for n := range b {
			if _, err := readCount(bytes.NewReader(b[:n])); err == nil {
				t.Errorf("%d of %d bytes are enough", n, len(b))
			}
		}
	}
}

// TestSinkCounts sends two streams and datagrams of one run, and asks.
func TestSinkCounts(t *testing.T) {
	s := newSink()
	open := func() net.Conn {
		near, far := net.Pipe()
		go func() { defer far.Close(); s.bulk(far) }()
		t.Cleanup(func() { near.Close() })
		return near
	}
	ask := func(run uint64) count {
		c := open()
		if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{askCount}, run)); err != nil {
			t.Fatal(err)
		}
		got, err := readCount(c)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	for _, n := range []int{1000, 300_000} {
		c := open()
		if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{askUp}, 42)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		// A pipe has no buffer, but the sink counts after it has read.
		for ask(42).streams[len(ask(42).streams)-1] < uint64(n) {
			time.Sleep(time.Millisecond)
		}
	}
	s.of(42).datagram(10)
	s.of(42).datagram(30)
	c := ask(42)
	if c.at == 0 {
		t.Error("no time")
	}
	c.at = 0
	if want := (count{datagrams: 2, first: 10, last: 30, streams: []uint64{1000, 300_000}}); !reflect.DeepEqual(c, want) {
		t.Errorf("count %+v, want %+v", c, want)
	}
	if c := ask(43); len(c.streams) != 0 || c.datagrams != 0 {
		t.Errorf("another run has %+v", c)
	}
}

func TestSinkDown(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	go func() { defer far.Close(); newSink().bulk(far) }()
	if _, err := near.Write([]byte{askDown}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2*bulkBuffer)
	if _, err := io.ReadFull(near, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[bulkBuffer:], filler) {
		t.Error("not the filler")
	}
}

func TestThroughput(t *testing.T) {
	from := count{at: time.Second, streams: []uint64{1e6, 5e6}}
	to := count{at: 3 * time.Second, streams: []uint64{201e6, 5e6}}
	used := usage{processes: processes{client: []int{1}}, client: time.Second, server: time.Second, busy: 3, idle: 1}
	f, err := throughput(from, to, used)
	if err != nil {
		t.Fatal(err)
	}
	want := figures{figMBps: 100, figFair: 0.5, figClientCPU: 5, figBusy: 0.75} // and nobody who pays at the server
	if !reflect.DeepEqual(f, want) {
		t.Errorf("%v, want %v", f, want)
	}
	if _, err := throughput(to, count{at: 4 * time.Second, streams: to.streams}, used); err == nil {
		t.Error("a standstill is a result")
	}
	if _, err := throughput(from, count{at: 4 * time.Second, streams: []uint64{1}}, used); err == nil {
		t.Error("a stream that is lost goes unnoticed")
	}
}
