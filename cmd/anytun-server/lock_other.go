//go:build !unix

package main

import "errors"

// lockDir would take a lock that keeps two invites apart.
func lockDir(string) (unlock func(), err error) { return nil, errors.ErrUnsupported }
