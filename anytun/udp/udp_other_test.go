//go:build !linux

package udp

func implementations() []implementation { return portableOnly() }
