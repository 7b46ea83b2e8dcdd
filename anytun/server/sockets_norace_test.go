//go:build !race

package server

// egressRaced says that the race detector is on.
const egressRaced = false
