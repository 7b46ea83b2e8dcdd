package nat

import "time"

// fullFor is how long a block that was found used up is not looked through again. A
// client that keeps trying costs that much less.
const fullFor = time.Second

// createLocked makes the mapping m, with a public port of its choice.
func (t *Table) createLocked(s *shard, m Mapping, first, last uint16, now time.Duration) (*entry, Drop) {
	switch {
	case s.count[m.Client] >= t.cfg.MaxPerClient:
		return nil, ClientFull
	case t.size.Load() >= int64(t.cfg.Max):
		return nil, TableFull
	}
	block := keyOf(m.Client, m.Protocol, first)
	if until, ok := s.full[block]; ok && now < until {
		return nil, NoPorts
	}
	var ok bool
	if m.Public, ok = t.portLocked(s, m, first, last, now); !ok {
		s.full[block] = now + fullFor
		return nil, NoPorts
	}
	e := &entry{Mapping: m, sent: now, told: now}
	t.insertLocked(s, e)
	return e, Mapped
}

// portLocked is a free port of a block, or one whose mapping gives way. All servers
// begin to look at the same place.
func (t *Table) portLocked(s *shard, m Mapping, first, last uint16, now time.Duration) (uint16, bool) {
	size := int(last) - int(first) + 1
	if size <= 0 {
		return 0, false
	}
	// Neighbouring inner ports, which kernels like, begin at neighbouring places, and
	// so don't meet.
	start := int(m.Inner) % size
	if first <= m.Inner && m.Inner <= last {
		start = int(m.Inner - first)
	}
	var weakest *entry
	for i := range size {
		port := first + uint16((start+i)%size)
		e := s.public[keyOf(m.Client, m.Protocol, port)]
		switch {
		case e == nil:
			return port, true
		case now >= e.deadline():
			t.removeLocked(s, e)
			t.expired.Add(1)
			return port, true
		case !e.firm(now) && (weakest == nil || e.used() < weakest.used()):
			weakest = e
		}
	}
	if weakest == nil {
		return 0, false
	}
	t.removeLocked(s, weakest)
	t.reclaimed.Add(1)
	return weakest.Public, true
}

// Learn takes a mapping of another server. If it contradicts one here, of the same
// inner or the same public port, that which was made first stays; but one that is
// not known to be in use gives way. Where the own one stays it is published, so that
// the other server learns of it.
func (t *Table) Learn(m Mapping) {
	if !mappable(m.Protocol) || m.Client == 0 {
		return
	}
	now := t.cfg.Now().Sub(t.start)
	s := t.shard(m.Client)
	s.mu.Lock()
	again := t.learnLocked(s, m, now)
	var tell [2]Mapping
	n := 0
	for _, e := range again {
		if e != nil {
			e.told = now
			tell[n] = e.Mapping
			n++
		}
	}
	s.mu.Unlock()
	for _, m := range tell[:n] {
		t.publish(m)
	}
}

// learnLocked returns the mappings that stay against m and should be published.
func (t *Table) learnLocked(s *shard, m Mapping, now time.Duration) (again [2]*entry) {
	same := s.inner[keyOf(m.Client, m.Protocol, m.Inner)]
	other := s.public[keyOf(m.Client, m.Protocol, m.Public)]
	if same != nil && same == other {
		same.Since = min(same.Since, m.Since)
		same.learned, same.told = max(same.learned, now), now
		t.learned.Add(1)
		return again
	}
	stays := false
	for i, e := range [2]*entry{same, other} {
		if e == nil || !e.stands(now) || !e.beats(m) {
			continue
		}
		stays = true
		if now >= e.told+time.Second {
			again[i] = e
		}
	}
	if stays {
		t.kept.Add(1)
		return again
	}
	for _, e := range [2]*entry{same, other} {
		if e != nil {
			t.removeLocked(s, e)
			t.replaced.Add(1)
		}
	}
	if s.count[m.Client] >= t.cfg.MaxPerClient || t.size.Load() >= int64(t.cfg.Max) {
		t.refused.Add(1)
		return again
	}
	t.insertLocked(s, &entry{Mapping: m, learned: now, told: now, established: true})
	t.learned.Add(1)
	return again
}

// beats says whether an entry stays against a mapping it contradicts. Every server
// must find the same, so where the time doesn't tell the ports do.
func (e *entry) beats(m Mapping) bool {
	if e.Since != m.Since {
		return e.Since < m.Since
	}
	if e.Public != m.Public {
		return e.Public < m.Public
	}
	return e.Inner < m.Inner
}

// Sweep removes what is over, and publishes again what is in use.
func (t *Table) Sweep(now time.Time) {
	at := now.Sub(t.start)
	var again []Mapping
	for i := range t.shards {
		s := &t.shards[i]
		again = again[:0]
		s.mu.Lock()
		for _, e := range s.inner {
			switch {
			case at >= e.deadline():
				t.removeLocked(s, e)
				t.expired.Add(1)
			case e.untold(at):
				e.told = at
				again = append(again, e.Mapping)
			}
		}
		for k, until := range s.full {
			if at >= until {
				delete(s.full, k)
			}
		}
		s.mu.Unlock()
		for _, m := range again {
			t.publish(m)
		}
	}
}

// All yields the mappings there are, for a server that starts.
func (t *Table) All(yield func(Mapping) bool) {
	now := t.cfg.Now().Sub(t.start)
	var list []Mapping
	for i := range t.shards {
		s := &t.shards[i]
		list = list[:0]
		s.mu.Lock()
		for _, e := range s.inner {
			if now < e.deadline() {
				list = append(list, e.Mapping)
			}
		}
		s.mu.Unlock()
		for _, m := range list {
			if !yield(m) {
				return
			}
		}
	}
}

func (t *Table) insertLocked(s *shard, e *entry) {
	s.inner[keyOf(e.Client, e.Protocol, e.Inner)] = e
	s.public[keyOf(e.Client, e.Protocol, e.Public)] = e
	s.count[e.Client]++
	t.size.Add(1)
}

func (t *Table) removeLocked(s *shard, e *entry) {
	delete(s.inner, keyOf(e.Client, e.Protocol, e.Inner))
	delete(s.public, keyOf(e.Client, e.Protocol, e.Public))
	if s.count[e.Client]--; s.count[e.Client] == 0 {
		delete(s.count, e.Client)
	}
	t.size.Add(-1)
}
