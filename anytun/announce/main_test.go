package announce

import (
	"os"
	"testing"
	"time"
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

// patience is how long a test waits for what should take seconds. Other work on
// the machine may slow everything down; nothing else is timed.
const patience = 30 * time.Second

// until waits until what returns nothing; its last result is the test's failure.
func until(t *testing.T, what func() string) {
	t.Helper()
	var why string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if why = what(); why == "" {
			return
		}
	}
	t.Fatal(why)
}
