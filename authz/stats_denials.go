package authz

import (
	"container/list"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	maxDenials = 100
	// longestShown bounds each text of a request that is kept to be shown.
	longestShown = 200
	// largestKept bounds in bytes the check of a denial whose request is kept to be explained; of a larger one none is.
	largestKept = 16 << 10
)

// Denial is a request that was refused, and others like it: the same limit's, with the same key and the same end. No text in it holds a
// secret; Host, Method and Path are as the client sent them, cut, and without the query.
type Denial struct {
	ID         uint64 // of the first of them
	Count      uint64
	Last       time.Time
	Outcome    limiter.Outcome // Limited, FailedClosed, Delegated or Invalid
	Local      bool            // this process decided, in the store's place
	Limit      string          // empty where it is none's
	Domain     string
	Key        string // as it stands in Redis between its braces; empty where it is not known
	Cost       int64  // tokens
	Remaining  int64  // tokens
	RetryAfter time.Duration
	Field      string            // of the config, where Invalid
	Failure    limiter.ErrorKind // of the store, where that failed
	shown

	like    likeness
	at      int             // in denials.all
	err     error           // the store's
	request *policy.Request // nil where it is too large
	large   *shown          // of one that is
}

// shown are the texts of a request that are shown: cut, and the path without its query.
type shown struct {
	Method    string
	Host      string
	Path      string
	Source    string // the connection's peer
	RequestID string
}

// denials are the last ones, each (limit, key and end) once. It is safe for concurrent use.
type denials struct {
	mu     sync.Mutex
	newest *list.List // of *Denial, the newest first
	all    [maxDenials]*list.Element
	index  places // of likenesses in all
	ids    uint64
}

// likeness is what two denials have in common that are told as one.
type likeness struct {
	outcome limiter.Outcome
	key     string // the whole one, which names its limit; or where there is none, whose mistake it is
}

func (l likeness) hash() uint32 { return hashOf(l.key) + uint32(l.outcome) }

func newDenials() *denials { return &denials{newest: list.New()} }

// note keeps a verdict that is a denial. A flood comes through here, so what only a reader needs is left to told.
func (d *denials) note(v *verdict, now time.Time) {
	like := likeness{outcome: v.decision.Outcome}
	var limit, field string
	charge, told := deniedBy(&v.decision)
	if charge != nil {
		limit, like.key = charge.Limit.Name, charge.Key
	} else if like.outcome == limiter.Invalid {
		limit, field = mistakenBy(v)
		like.key = limit + "\n" + field
	}
	request, large := v.request, (*shown)(nil)
	if request != nil && len(v.wire) > largestKept {
		request, large = nil, show(request).clone()
	}
	hash := like.hash()

	d.mu.Lock()
	defer d.mu.Unlock()
	at, known := d.index.find(hash, func(at int) bool { return d.all[at].Value.(*Denial).like == like })
	if known {
		d.newest.MoveToFront(d.all[at])
	} else {
		at = d.add(like, hash)
	}
	last := d.all[at].Value.(*Denial)
	last.Count++
	last.Limit, last.Field, last.Last, last.Local, last.request, last.large = limit, field, now, v.decision.Local, request, large
	if charge != nil {
		last.Domain, last.Cost, last.Remaining, last.RetryAfter, last.err = charge.Limit.Domain, charge.Cost, told.Remaining, told.RetryAfter, told.Err
	}
}

// add makes room for a denial that is like no other, as the newest, and returns where in all it is. The caller holds mu.
func (d *denials) add(like likeness, hash uint32) (at int) {
	if at = d.newest.Len(); at < maxDenials {
		d.all[at] = d.newest.PushFront(&Denial{at: at})
	} else {
		oldest := d.newest.Back().Value.(*Denial)
		at = oldest.at
		d.index.remove(oldest.like.hash(), at)
		d.newest.MoveToFront(d.all[at])
	}
	d.ids++
	*d.all[at].Value.(*Denial) = Denial{ID: d.ids, Outcome: like.outcome, like: like, at: at}
	d.index.put(hash, at)
	return at
}

// show is what is shown of a request.
func show(r *policy.Request) shown {
	path, _, _ := strings.Cut(r.Path, "?")
	return shown{Method: cut(r.Method), Host: cut(r.Host), Path: cut(path), Source: cut(r.Source.Address), RequestID: requestID(r)}
}

// clone is a copy that does not keep the check in memory that its texts are parts of.
func (s shown) clone() *shown {
	for _, text := range []*string{&s.Method, &s.Host, &s.Path, &s.Source, &s.RequestID} {
		*text = strings.Clone(*text)
	}
	return &s
}

// mistakenBy is the limit whose mistake refused a check, and the field of it.
func mistakenBy(v *verdict) (limit, field string) {
	for _, m := range v.mistakes {
		var rule *policy.RuleError
		if errors.As(m, &rule) && !rule.Shadow {
			return rule.Limit, rule.Field
		}
	}
	return "", ""
}

// deniedBy is the charge that a denial is about, or nil.
func deniedBy(d *limiter.Decision) (*limiter.Charge, *limiter.Verdict) {
	if d.Outcome == limiter.Limited {
		return &d.Charges[d.Telling], &d.Verdicts[d.Telling]
	}
	for i := range d.Charges {
		if v := &d.Verdicts[i]; v.Err != nil && !d.Charges[i].Limit.Shadow {
			return &d.Charges[i], v
		}
	}
	return nil, nil
}

// told returns what is kept, the newest first.
func (d *denials) told() []Denial {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Denial, 0, d.newest.Len())
	for e := d.newest.Front(); e != nil; e = e.Next() {
		one := *e.Value.(*Denial)
		if one.Outcome != limiter.Invalid {
			one.Key = inBraces(one.like.key)
		}
		if one.err != nil {
			one.Failure = limiter.KindOf(one.err)
		}
		switch {
		case one.request != nil:
			one.shown = show(one.request)
		case one.large != nil:
			one.shown = *one.large
		}
		all = append(all, one)
	}
	return all
}

// keyOf is the part of a charge's key in braces: hashed, or escaped where it is an address or the like.
func keyOf(c *limiter.Charge) string { return inBraces(c.Key) }

func inBraces(key string) string {
	_, key, _ = strings.Cut(key, "{")
	return strings.TrimSuffix(key, "}")
}

// cut is as much of a text as is kept to be shown.
func cut(s string) string { return s[:min(len(s), longestShown)] }
