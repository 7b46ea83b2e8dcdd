// Package cmd holds what the two commands, anytun-proxy and anytun-server, do
// the same way: reading flags, environment and a TOML file into one set of
// values, turning errors into a sentence, a hint and an exit code, logging,
// key files, and the admin HTTP server.
//
// It knows nothing of tunnels and proxies and imports nothing of this module.
package cmd
