package packet

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// synWith is a SYN with the given options, padded.
func synWith(six bool, flags header.TCPFlags, options ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	b := make([]byte, 20, 60)
	header.TCP(b).Encode(&header.TCPFields{
		SrcPort: 1234, DstPort: 443, SeqNum: 1, AckNum: 2,
		DataOffset: uint8(20 + len(options)), Flags: flags, WindowSize: 100,
	})
	b = append(append(b, options...), "data"...)
	sum := twinSum([]byte("data"), pseudo(six, TCP, len(b)))
	header.TCP(b).SetChecksum(^header.TCP(b).CalculateChecksum(sum))
	if six {
		return ip6(DestOptions, extension(TCP, 1, b))
	}
	return ip4(TCP, b, 1, 1, 1, 0)
}

func TestClampMSS(t *testing.T) {
	const syn, synAck = header.TCPFlagSyn, header.TCPFlagSyn | header.TCPFlagAck
	for _, six := range []bool{false, true} {
		for _, tt := range []struct {
			name    string
			flags   header.TCPFlags
			options []byte
			at      int // of the size in options; -1: not to be clamped
		}{
			{"first", syn, []byte{2, 4, 5, 180, 1, 3, 3, 7}, 2},
			{"answer", synAck, []byte{2, 4, 5, 180}, 2},
			{"behind one byte", syn, []byte{1, 2, 4, 5, 180}, 3},
			{"behind timestamps", syn, []byte{8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, 5, 180}, 12},
			{"behind an odd option", syn, []byte{3, 3, 7, 2, 4, 255, 255}, 5},
			{"none", syn, []byte{1, 1, 4, 2}, -1},
			{"no options", syn, nil, -1},
			{"small already", syn, []byte{2, 4, 5, 80}, -1},
			{"equal", syn, []byte{2, 4, 1360 >> 8, 1360 & 255}, -1},
			{"not a SYN", header.TCPFlagAck, []byte{2, 4, 5, 180}, -1},
			{"behind the end", syn, []byte{1, 1, 1, 0, 2, 4, 5, 180}, -1},
			{"of length 0", syn, []byte{9, 0, 2, 4, 5, 180}, -1},
			{"of length 1", syn, []byte{9, 1, 2, 4, 5, 180}, -1},
			{"too long", syn, []byte{1, 1, 9, 40, 2, 4, 5, 180}, -1},
			{"cut off", syn, []byte{1, 1, 1, 2}, -1},
			{"size of another length", syn, []byte{2, 3, 9, 1}, -1},
		} {
			b := synWith(six, tt.flags, tt.options...)
			before := bytes.Clone(b)
			var v, w View
			if r := v.Parse(b); r != OK {
				t.Fatalf("%s: %v", tt.name, r)
			}
			if ok := v.ClampMSS(1360); ok != (tt.at >= 0) {
				t.Errorf("%s: %v", tt.name, ok)
			}
			if tt.at < 0 {
				if !bytes.Equal(b, before) {
					t.Errorf("%s: changed", tt.name)
				}
				continue
			}
			at := v.transport + 20 + tt.at
			if got := binary.BigEndian.Uint16(b[at:]); got != 1360 {
				t.Errorf("%s: %d", tt.name, got)
			}
			if w.Parse(b) != OK || !w.ChecksumsValid() {
				t.Errorf("%s: not valid", tt.name)
			}
			verify(t, tt.name, &w)
			// Nothing else has changed but the checksum.
			copy(b[at:], before[at:at+2])
			copy(b[v.transport+16:], before[v.transport+16:v.transport+18])
			if !bytes.Equal(b, before) {
				t.Errorf("%s: something else changed", tt.name)
			}
			if opts := header.ParseSynOptions(before[v.transport+20:v.payload], false); opts.MSS <= 1360 {
				t.Errorf("%s: gVisor sees a size of %d in there", tt.name, opts.MSS)
			}
		}
	}
	var v View
	first := fragment4(ip4(TCP, tcpSegment(false, "12345678")), 0, true)
	if v.Parse(first) != OK || !v.ClampMSS(1000) {
		t.Error("the first fragment has the options, too")
	}
	if v.Parse(fragment4(ip4(TCP, tcpSegment(false, "")), 1480, false)) != OK || v.ClampMSS(100) {
		t.Error("clamped what isn't a header")
	}
	if v.Parse(ip4(UDP, udpDatagram(false, "hello"))) != OK || v.ClampMSS(100) {
		t.Error("UDP")
	}
	if v.ParseQuoted(ip4(TCP, tcpSegment(false, ""))) != OK || v.ClampMSS(100) {
		t.Error("a quotation")
	}
}

func FuzzClampMSS(f *testing.F) {
	f.Add([]byte{2, 4, 5, 180}, uint16(1360))
	f.Add([]byte{1, 2, 4, 5, 180, 0, 0, 0}, uint16(0))
	f.Fuzz(func(t *testing.T, options []byte, mss uint16) {
		options = options[:min(len(options), 40)]
		b := synWith(len(options)%3 == 0, header.TCPFlagSyn, options...)
		var v View
		if r := v.Parse(b); r != OK {
			t.Fatal(r)
		}
		v.ClampMSS(mss)
		if !v.ChecksumsValid() {
			t.Error("not valid")
		}
		if v.ClampMSS(mss) {
			t.Error("clamped twice")
		}
	})
}
