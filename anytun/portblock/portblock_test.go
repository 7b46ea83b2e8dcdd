package portblock

import (
	"fmt"
	"math"
	"testing"
)

// twin hands the blocks out one after another, as the package comment draws it.
func twin(ports, clients int) map[[2]int]uint32 {
	owner := make(map[[2]int]uint32)
	addr, port := 0, 1024
	for number := 1; number <= clients; number++ {
		if port+ports > 65536 {
			addr, port = addr+1, 1024
		}
		for range ports {
			owner[[2]int{addr, port}] = uint32(number)
			port++
		}
	}
	return owner
}

func TestAgainstTwin(t *testing.T) {
	for _, ports := range []int{1, 7, 64, 1000, 1023, 1024, 1025, 4096, 32256, 32257, 64511, 64512} {
		t.Run(fmt.Sprint(ports), func(t *testing.T) {
			b, err := New(ports)
			if err != nil {
				t.Fatal(err)
			}
			// Two addresses full, and one begun.
			clients := min(2*b.PerAddress()+1, 200_000)
			owner := twin(ports, clients)
			for addr := range b.Addresses(uint32(clients)) {
				for port := range 1 << 16 {
					want := owner[[2]int{addr, port}]
					got, ok := b.Client(addr, uint16(port))
					if ok && got > uint32(clients) {
						got, ok = 0, false // a client the twin didn't get to
					}
					if got != want || ok != (want != 0) {
						t.Fatalf("%d:%d belongs to %d (%v), want %d", addr, port, got, ok, want)
					}
				}
			}
			seen := 0
			for number := uint32(1); number <= uint32(clients); number++ {
				addr, first, last := b.Of(number)
				for port := int(first); port <= int(last); port++ {
					if owner[[2]int{addr, port}] != number {
						t.Fatalf("client %d was given %d:%d of client %d", number, addr, port, owner[[2]int{addr, port}])
					}
					seen++
				}
			}
			if seen != len(owner) {
				t.Errorf("%d ports handed out, want %d", seen, len(owner))
			}
		})
	}
}

func TestDefault(t *testing.T) {
	var b Blocks
	if b.Ports() != 1024 || b.PerAddress() != 63 {
		t.Fatalf("%d ports, %d clients per address", b.Ports(), b.PerAddress())
	}
	for _, tt := range []struct {
		number      uint32
		addr        int
		first, last uint16
	}{
		{0, -1, 0, 0},
		{1, 0, 1024, 2047},
		{2, 0, 2048, 3071},
		{63, 0, 64512, 65535},
		{64, 1, 1024, 2047},
		{127, 2, 1024, 2047},
		{math.MaxUint32, (math.MaxUint32 - 1) / 63, 3072, 4095},
	} {
		addr, first, last := b.Of(tt.number)
		if addr != tt.addr || first != tt.first || last != tt.last {
			t.Errorf("client %d: %d:%d-%d, want %d:%d-%d", tt.number, addr, first, last, tt.addr, tt.first, tt.last)
		}
		if tt.number == 0 {
			continue
		}
		for _, port := range []uint16{first, last} {
			if n, ok := b.Client(addr, port); !ok || n != tt.number {
				t.Errorf("%d:%d belongs to %d (%v), want %d", addr, port, n, ok, tt.number)
			}
		}
	}
}

func TestAddresses(t *testing.T) {
	var b Blocks
	for highest, want := range map[uint32]int{0: 0, 1: 1, 63: 1, 64: 2, 126: 2, 127: 3} {
		if got := b.Addresses(highest); got != want {
			t.Errorf("%d clients need %d addresses, want %d", highest, got, want)
		}
	}
}

func TestNobody(t *testing.T) {
	var b Blocks
	last, _, end := b.Of(math.MaxUint32)
	for _, tt := range []struct {
		addr int
		port uint16
	}{{-1, 2000}, {0, 0}, {0, 1023}, {math.MaxInt32, 65535}, {last, end + 1}, {last + 1, 1024}} {
		if n, ok := b.Client(tt.addr, tt.port); ok || n != 0 {
			t.Errorf("%d:%d belongs to %d", tt.addr, tt.port, n)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, ports := range []int{-1, 0, MaxPorts + 1, 1 << 20} {
		if _, err := New(ports); err == nil {
			t.Errorf("%d ports accepted", ports)
		}
	}
}
