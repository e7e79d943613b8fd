package authz

import (
	"hash/maphash"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/limiter"
)

const (
	// Of the denials of a key by a limit the first is logged, and then one of
	// every logEvery or the first after logAtMost, whichever comes first.
	logEvery  = 1000
	logAtMost = time.Minute
	// maxKeyLines is how many of these lines are logged in a minute by all limits
	// together. Past it, of the keys whose turn it is, each limit logs the first,
	// and then one of every logEvery or the first after logAtMost.
	maxKeyLines = 1000
	// The last denials of keySets * keysOfSet keys are remembered, in 128 KiB. A
	// key that is forgotten is logged as if it were new.
	keySets, keysOfSet = 1024, 4
)

// denialSampler selects the denials that are logged, by limit and key, so that
// each key that is denied is in the log at least once a minute as long as there
// are not too many. The zero value is ready. It is safe for concurrent use.
type denialSampler struct {
	mu     sync.Mutex
	sets   [keySets][keysOfSet]sampledKey
	minute int64 // that lines counts, since 1970
	lines  int
}

// sampledKey is a key of a limit and what was logged of it.
type sampledKey struct {
	hash       uint64 // of the whole key, which has the limit's name; two keys never share it in practice
	at         int64  // when it was logged last, in nanoseconds since 1970; 0: the entry is free
	suppressed uint64 // denials since
	isLogged   bool
}

// next counts a denial of a key of a limit. It reports whether to log it, and if
// so how many of this key's since the last one that was logged were suppressed.
func (s *denialSampler) next(l *limitReport, key string, shadow bool, now time.Time) (suppressed uint64, ok bool) {
	hash := maphash.String(seed, key)
	if shadow {
		hash = ^hash // the limit may be enforced elsewhere
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.findLocked(hash, now)
	if k.isLogged && k.suppressed+1 < logEvery && now.UnixNano()-k.at < int64(logAtMost) {
		k.suppressed++
		return 0, false
	}
	if !s.hasRoomLocked(now) {
		if _, ok := l.denials.next(now); !ok {
			k.suppressed++
			return 0, false
		}
	}
	suppressed = k.suppressed
	k.suppressed, k.at, k.isLogged = 0, now.UnixNano(), true
	return suppressed, true
}

// findLocked returns the entry of a key. A new one replaces the entry of its set
// that was logged longest ago.
func (s *denialSampler) findLocked(hash uint64, now time.Time) *sampledKey {
	set := &s.sets[hash%keySets]
	oldest := &set[0]
	for i := range set {
		k := &set[i]
		if k.hash == hash && k.at != 0 {
			return k
		}
		if k.at < oldest.at {
			oldest = k
		}
	}
	*oldest = sampledKey{hash: hash, at: now.UnixNano()}
	return oldest
}

// hasRoomLocked reports whether another line fits into the current minute, and
// counts it if so.
func (s *denialSampler) hasRoomLocked(now time.Time) bool {
	if minute := now.Unix() / 60; minute != s.minute {
		s.minute, s.lines = minute, 0
	}
	if s.lines >= maxKeyLines {
		return false
	}
	s.lines++
	return true
}

// denied logs that a limit denied a request or, in shadow mode, would have: at
// the debug level all such requests, at info a sample.
func (r *report) denied(l *limitReport, c *limiter.Charge, v *limiter.Verdict, check *checkState, now time.Time) {
	suppressed, sampled := r.sampler.next(l, c.Key, c.Limit.Shadow, now)
	level := zap.DebugLevel
	if sampled {
		level = zap.InfoLevel
	}
	message, decision := "request limited", check.decision.Outcome.String()
	if c.Limit.Shadow {
		message, decision = "request would be limited", shadowLimited
	}
	e := r.log.Check(level, message)
	if e == nil {
		return
	}
	all := make([]zap.Field, 0, 16)
	all = append(all,
		zap.String("decision", decision),
		zap.String("limit", c.Limit.Name),
		zap.String("domain", c.Limit.Domain),
		zap.String("key", c.ShownKey()),
		zap.Int64("cost", c.Cost),
		zap.Int64("remaining", v.Remaining),
	)
	if v.RetryAfter != limiter.Never {
		all = append(all, zap.Float64("retry_after", v.RetryAfter.Seconds()))
	}
	if c.Limit.Shadow {
		all = append(all, zap.Bool("shadow", true))
	}
	all = append(all, requestFields(summaryOf(check.request, check.client))...)
	if sampled {
		all = append(all, zap.Uint64("suppressed", suppressed))
	}
	e.Write(all...)
}

// requestFields returns the fields of a log line about a request. What the client
// sent is truncated and escaped.
func requestFields(s summary) []zap.Field {
	all := []zap.Field{
		zap.String("method", Escape(s.Method)),
		zap.String("host", Escape(s.Host)),
		zap.String("path", Escape(s.Path)),
		zap.String("client", s.Client),
	}
	if s.RequestID != "" {
		all = append(all, zap.String("request_id", s.RequestID))
	}
	return all
}
