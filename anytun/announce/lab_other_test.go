//go:build !linux

package announce

func prepare() {}
