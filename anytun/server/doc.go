// Package server is the engine of an anycast server: it opens what clients
// send, decides where each inner packet goes, and seals what comes back.
//
// The roads:
//
//	receive.go  ReadBatch → open → route (router.go) → egress, or another client
//	send.go     egress or another client → whose packet → seal → WriteBatch
//
// A server keeps no state that it couldn't compute again: sessions are derived
// from the headers of their packets (sessions.go is a cache), and what a
// handshake grants follows from the cluster's key and the client's number
// (handshake.go). Only where a client is now is learned, from its packets.
//
// Egress is one of: sockets*.go, where the server's own netstack ends inner
// connections and the host's sockets carry them on.
//
// Locks, in this order: sessionShard.mu, association.mu, peer.mu. None is held
// while sending.
package server
