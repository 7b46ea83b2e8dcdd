// Package cmd holds what the two commands, anytun-proxy and anytun-server, do
// the same way: reading flags, environment and a TOML file into one set of
// values, turning errors into a sentence, a hint and an exit code, following
// signals, logging, key files, and the admin HTTP server with its metrics.
//
// Of the rest of the module it knows only the engines' counters (engines.go).
package cmd
