package announce

import (
	"os"
	"testing"
)

// helperEnv makes this test binary an announcing program instead of running
// tests, see helper_test.go. Some tests kill or stop what announces.
const helperEnv = "ANYTUN_ANNOUNCE_HELPER"

func TestMain(m *testing.M) {
	if config := os.Getenv(helperEnv); config != "" {
		if err := helper(config); err != nil {
			panic(err)
		}
		return
	}
	prepare()
	m.Run() // its result becomes the exit status when TestMain returns
}
