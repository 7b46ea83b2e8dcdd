//go:build race

package server

// egressRaced says that the race detector is on, under which sync.Pool loses
// things on purpose.
const egressRaced = true
