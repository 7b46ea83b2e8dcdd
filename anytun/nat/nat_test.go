package nat

import (
	"testing"

	"github.com/anytun-go/anytun/anytun/packet"
)

func TestThereAndBack(t *testing.T) {
	tab := New(Config{})
	public, why := tab.Outward(7, packet.UDP, 51820, 0, 7168, 8191)
	if why != Mapped || public < 7168 || public > 8191 {
		t.Fatalf("port %d, %v", public, why)
	}
	if inner, ok := tab.Inward(7, packet.UDP, public, 0); !ok || inner != 51820 {
		t.Fatalf("port %d, %v", inner, ok)
	}
}
