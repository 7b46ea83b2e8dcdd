//go:build !linux

package proxy

import "net"

// keepAliveOnListener leaves it to the net package to set listenKeepAlive on every connection.
func keepAliveOnListener(lc *net.ListenConfig) { lc.KeepAliveConfig = listenKeepAlive }
