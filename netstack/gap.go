package netstack

import "time"

// Suspect tells the stack that the tunnel suspects that nothing gets through
// (true), or that the suspicion was wrong (false). It is quick and may be called
// from anywhere but Output.
func (s *Stack) Suspect(bool) {}

// Resume tells the stack that packets flow again after a gap of the given
// length, so that its connections don't wait for the retransmission timers,
// theirs and their peers', which have backed off meanwhile. It ends the
// suspicion of Suspect. It calls Output, so it must not be called from there.
func (s *Stack) Resume(gap time.Duration) {}
