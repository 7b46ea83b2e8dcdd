package netstack

// span is the range [start, end) of a sequence space.
type span struct{ start, end uint32 }

// has reports whether all of x is in s.
func (s span) has(x span) bool { return !before(x.start, s.start) && !before(s.end, x.end) }

// spans are ranges in order that neither overlap nor touch.
type spans []span

// add puts x in. It reports false, and does nothing, if that would make more than
// most ranges.
func (s *spans) add(x span, most int) bool {
	l := *s
	// What x reaches is l[i:j]. New blocks lie at the end as a rule.
	j := len(l)
	for j > 0 && before(x.end, l[j-1].start) {
		j--
	}
	i := j
	for i > 0 && !before(l[i-1].end, x.start) {
		i--
	}
	if i == j {
		if len(l) >= most {
			return false
		}
		l = append(l, span{})
		copy(l[i+1:], l[i:])
		l[i] = x
		*s = l
		return true
	}
	if before(l[i].start, x.start) {
		x.start = l[i].start
	}
	if before(x.end, l[j-1].end) {
		x.end = l[j-1].end
	}
	l[i] = x
	*s = append(l[:i+1], l[j:]...)
	return true
}

// cut takes out what lies before start.
func (s *spans) cut(start uint32) {
	l := *s
	k := 0
	for k < len(l) && !before(start, l[k].end) {
		k++
	}
	if k > 0 {
		l = append(l[:0], l[k:]...)
	}
	if len(l) > 0 && before(l[0].start, start) {
		l[0].start = start
	}
	*s = l
}
