// Package proxy is what applications talk to: one port that speaks SOCKS5, SOCKS4, SOCKS4a, HTTP CONNECT and plain
// HTTP forward, told apart by the first byte.
//
// The road of a connection: listen.go opens the port, server.go accepts and bounds, mixed.go looks at the first byte
// and hands the connection to one of the two Handlers (packages socks5 and httpproxy), conn.go watches the application
// while something slow is done in its name, relay.go copies bytes until both directions have ended.
//
// It does not know what is behind Network, and never asks the host's resolver: names travel to the Network as names.
//
// Locks: Server.mu guards the set of open connections; nothing is called while it is held. Auth.reloading is held
// while the file is read. Neither is ever taken inside the other.
package proxy
