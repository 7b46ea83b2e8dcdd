package server

import (
	"container/list"
	"sync"
	"time"
)

// Bounds of the cache; when one is reached, what was not used for longest goes.
const (
	dnsCacheEntries = 8192
	dnsCacheBytes   = 8 << 20
	// dnsCacheOverhead is about what an entry costs beside its message.
	dnsCacheOverhead = 256
)

type dnsCacheEntry struct {
	key dnsKey
	a   *dnsAnswer
}

func (e *dnsCacheEntry) bytes() int {
	return len(e.a.msg) + 2*len(e.a.ttls) + len(e.key.name) + dnsCacheOverhead
}

// dnsCache keeps answers for as long as they allow.
type dnsCache struct {
	maxEntries, maxBytes int

	mu    sync.Mutex
	by    map[dnsKey]*list.Element // of *dnsCacheEntry
	used  *list.List               // most recently used first
	bytes int
}

func newDNSCache(maxEntries, maxBytes int) *dnsCache {
	return &dnsCache{
		maxEntries: maxEntries,
		maxBytes:   maxBytes,
		by:         make(map[dnsKey]*list.Element),
		used:       list.New(),
	}
}

// get returns the answer for key that is still good at now, or nil. It is not
// to be changed.
func (c *dnsCache) get(key dnsKey, now time.Time) *dnsAnswer {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.by[key]
	if at == nil {
		return nil
	}
	e := at.Value.(*dnsCacheEntry)
	if now.Sub(e.a.since) >= e.a.ttl {
		c.removeLocked(at)
		return nil
	}
	c.used.MoveToFront(at)
	return e.a
}

// put keeps an answer, if it allows that.
func (c *dnsCache) put(key dnsKey, a *dnsAnswer) {
	e := &dnsCacheEntry{key, a}
	if a.ttl <= 0 || e.bytes() > c.maxBytes {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.by[key]; old != nil {
		c.removeLocked(old)
	}
	c.by[key] = c.used.PushFront(e)
	c.bytes += e.bytes()
	for c.used.Len() > c.maxEntries || c.bytes > c.maxBytes {
		c.removeLocked(c.used.Back())
	}
}

func (c *dnsCache) removeLocked(at *list.Element) {
	e := c.used.Remove(at).(*dnsCacheEntry)
	delete(c.by, e.key)
	c.bytes -= e.bytes()
}

// size returns the entries and the bytes they are counted as.
func (c *dnsCache) size() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used.Len(), c.bytes
}
