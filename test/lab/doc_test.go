//go:build linux

// Package lab runs the two programs as a user would, against programs that this
// project didn't write, on hosts that are network namespaces.
//
// Two places are built. The small one is a single host with nothing but a
// loopback interface, where anytun-proxy embeds its server. The large one is
//
//	app ── nat ── router ── srv ── dst
//
// where app runs the applications and anytun-proxy behind a masquerading,
// filtering nat; srv runs anytun-server; and dst, reachable from srv alone, runs
// nginx, sshd and a resolver with a zone that nobody else knows. Every scenario
// that makes sense in both places runs in both.
//
// The gateway programs run as an ordinary user in both places: nothing they do
// may need more.
//
// The third place is the anycast cluster (cluster_test.go): three servers behind
// one address, BIRD on the routers between, a client that roams, and everything
// that can be broken. A server there may configure the network and nothing else.
// make lab leaves that place standing for a person, and prints a map of it.
//
// Everything started here ends with the test, by its process id, or with the
// test process if that dies first. Names carry the process id, so runs may
// overlap; what dead runs left is removed by the next.
package lab
