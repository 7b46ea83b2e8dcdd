// Package simnet is an anycast network in memory, for tests: hosts whose sockets
// are udp.Conn, addresses that several hosts announce, routes that flip, links
// that delay, lose, repeat, reorder and damage datagrams, address translators
// that forget, and hosts that die.
//
// It is made for testing/synctest: everything waits on channels and timers, no
// mutex is held while anything blocks, and chance comes from a seed. A Network
// made inside a bubble must be used inside it only. Outside a bubble it works in
// real time.
//
// # The road of a datagram
//
//	WriteBatch  source address, translator, uplink of the sender (its loss,
//	            delay, …), route to a host, downlink of that host
//	flight      a heap ordered by time of arrival, then by order of sending;
//	            one timer for all of it
//	arrival     translator, host alive?, socket there?, room in its queue?
//	ReadBatch   what has queued up, copied, in groups by endpoint
//
// Every loss has a reason and is counted; [Network.SetTrace] shows every
// datagram at each step.
//
// A reader's packets are valid until its next ReadBatch, as with the real
// sockets; simnet makes sure of it by overwriting them then.
//
// # Locks
//
// One mutex, Network.mu, guards all state of the network and its hosts. The trace
// function is called without it.
package simnet
