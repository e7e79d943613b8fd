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
	Method     string
	Host       string
	Path       string
	Source     string // the connection's peer
	RequestID  string

	like    likeness
	request *policy.Request // nil where it is too large
}

// denials are the last ones, each (limit, key and end) once. It is safe for concurrent use.
type denials struct {
	mu     sync.Mutex
	newest *list.List // of *Denial, the newest first
	by     map[likeness]*list.Element
	ids    uint64
}

// likeness is what two denials have in common that are told as one.
type likeness struct {
	outcome    limiter.Outcome
	limit, key string // key: the whole one
}

func newDenials() *denials {
	return &denials{newest: list.New(), by: make(map[likeness]*list.Element)}
}

// note keeps a verdict that is a denial.
func (d *denials) note(v *verdict, now time.Time) {
	next := Denial{Outcome: v.decision.Outcome, Local: v.decision.Local, Last: now, Count: 1}
	like := likeness{outcome: next.Outcome}
	if c, told := deniedBy(&v.decision); c != nil {
		like.limit, like.key = c.Limit.Name, c.Key
		next.Limit, next.Domain, next.Key, next.Cost = c.Limit.Name, c.Limit.Domain, keyOf(c), c.Cost
		next.Remaining, next.RetryAfter = told.Remaining, told.RetryAfter
		if told.Err != nil {
			next.Failure = limiter.KindOf(told.Err)
		}
	} else if next.Outcome == limiter.Invalid {
		for _, m := range v.mistakes {
			var rule *policy.RuleError
			if errors.As(m, &rule) && !rule.Shadow {
				next.Limit, next.Field = rule.Limit, rule.Field
				like.limit, like.key = rule.Limit, rule.Field
				break
			}
		}
	}
	if r := v.request; r != nil {
		path, _, _ := strings.Cut(r.Path, "?")
		next.Method, next.Host, next.Path, next.Source, next.RequestID = cut(r.Method), cut(r.Host), cut(path), cut(r.Source.Address), requestID(r)
		if v.size <= largestKept {
			next.request = r
		} else { // nor the check behind its texts
			for _, s := range []*string{&next.Method, &next.Host, &next.Path, &next.Source, &next.RequestID} {
				*s = strings.Clone(*s)
			}
		}
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	if known := d.by[like]; known != nil {
		last := known.Value.(*Denial)
		next.ID, next.Count, next.like = last.ID, last.Count+1, like
		*last = next
		d.newest.MoveToFront(known)
		return
	}
	d.ids++
	next.ID, next.like = d.ids, like
	if d.newest.Len() < maxDenials {
		d.by[like] = d.newest.PushFront(&next)
		return
	}
	oldest := d.newest.Back()
	last := oldest.Value.(*Denial)
	delete(d.by, last.like)
	*last = next
	d.newest.MoveToFront(oldest)
	d.by[like] = oldest
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
		all = append(all, *e.Value.(*Denial))
	}
	return all
}

// keyOf is the part of a charge's key in braces: hashed, or escaped where it is an address or the like.
func keyOf(c *limiter.Charge) string {
	_, key, _ := strings.Cut(c.Key, "{")
	return strings.TrimSuffix(key, "}")
}

// cut is as much of a text as is kept to be shown.
func cut(s string) string { return s[:min(len(s), longestShown)] }
