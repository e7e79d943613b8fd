package authz

import (
	"container/list"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	// maxDenials is the number of denials that are kept.
	maxDenials = 100
	// maxShown is the maximum length of each text of a summary in bytes.
	maxShown = 200
	// maxExplainable is the size of a check in bytes up to which its request is
	// kept, so that the denial can be explained; it has at most fewElements.
	maxExplainable = 16 << 10
)

// Denial groups refused requests that share a limit, key and outcome. Its fields
// describe the latest one. No field has a secret: Method, Host and Path are as
// the client sent them, truncated and without the query.
type Denial struct {
	ID      uint64 // identifies the group
	Count   uint64 // of requests
	Last    time.Time
	Outcome limiter.Outcome // Limited, FailedClosed, Delegated or Invalid
	// Shadow says that a limit in shadow mode would have denied the request.
	// Outcome is then Limited, whatever became of the request.
	Shadow bool
	Local  bool   // whether this process decided in the store's place
	Limit  string // empty if no limit refused the request
	Domain string
	// Key is the key of the bucket as logs and metadata show it; empty if unknown.
	Key        string
	Cost       int64             // tokens
	Remaining  int64             // tokens
	Held, Owed int64             // tokens of the bucket
	RetryAfter time.Duration     // limiter.Never if a retry is of no use
	Field      string            // the field of the config, if Outcome is Invalid
	Failure    limiter.ErrorKind // the kind of the store's error, if it failed
	summary

	group   denialKey
	at      int // the position in denials.all
	client  netip.Addr
	err     error           // of the store
	request *policy.Request // nil if the check was too large or had too many elements
	large   *summary        // of such a check
}

// summary has the parts of a request that are shown. They are truncated, and
// the path has no query.
type summary struct {
	Method    string
	Host      string
	Path      string
	Source    string // the address of the connection's peer
	Client    string // the address that the config takes for the client's; empty if unknown
	RequestID string
}

// denials keeps the latest denials, one for each limit, key and outcome. It is
// safe for concurrent use.
type denials struct {
	// isShadow says that these are the denials of limits in shadow mode. They are
	// kept apart, so that they replace none of requests that were refused.
	isShadow bool
	ids      *atomic.Uint64 // the last ID, of all denials of the Server

	mu     sync.Mutex
	newest *list.List // of *Denial, the newest first
	all    [maxDenials]*list.Element
	index  hashIndex // from a denialKey to its position in all
}

// denialKey identifies the group of a denial.
type denialKey struct {
	outcome limiter.Outcome
	// key is the whole bucket key, which includes the limit's name. If no
	// charge was denied, it names the limit and field of an error in the
	// config, if any.
	key string
}

func (k denialKey) hash() uint32 { return hashOf(k.key) + uint32(k.outcome) }

// newDenials returns the denials of a Server, by limits that are enforced and by
// those in shadow mode.
func newDenials() (enforced, shadow *denials) {
	ids := new(atomic.Uint64)
	return &denials{newest: list.New(), ids: ids}, &denials{newest: list.New(), ids: ids, isShadow: true}
}

// add records a denial with an outcome, by a charge with its verdict. Both are
// nil if no charge was denied. It is called for each request of a flood, so what
// only a reader needs is left to list.
func (d *denials) add(
	check *checkState, outcome limiter.Outcome, charge *limiter.Charge, verdict *limiter.Verdict, now time.Time,
) {
	group := denialKey{outcome: outcome}
	var limit, field string
	if charge != nil {
		limit, group.key = charge.Limit.Name, charge.Key
	} else if group.outcome == limiter.Invalid {
		limit, field = mistakenBy(check)
		group.key = limit + "\n" + field
	}
	request, large := check.request, (*summary)(nil)
	if request != nil && (len(check.wire) > maxExplainable || check.elements > fewElements) {
		request, large = nil, summaryOf(request, check.client).clone()
	}
	hash := group.hash()

	d.mu.Lock()
	defer d.mu.Unlock()
	at, known := d.index.find(hash, func(at int) bool { return d.all[at].Value.(*Denial).group == group })
	if known {
		d.newest.MoveToFront(d.all[at])
	} else {
		at = d.addGroupLocked(group, hash)
	}
	last := d.all[at].Value.(*Denial)
	last.Count++
	last.Limit, last.Field = limit, field
	last.Last, last.Local = now, check.decision.Local
	last.request, last.large, last.client = request, large, check.client
	if charge != nil {
		last.Domain, last.Cost, last.Key = charge.Limit.Domain, charge.Cost, charge.ShownKey()
		last.Remaining, last.RetryAfter, last.err = verdict.Remaining, verdict.RetryAfter, verdict.Err
		last.Held, last.Owed = verdict.Held, verdict.Owed
	}
}

// addGroupLocked adds a new group as the newest and returns its position in
// all. If there are maxDenials groups, the new one replaces the oldest.
func (d *denials) addGroupLocked(group denialKey, hash uint32) (at int) {
	if at = d.newest.Len(); at < maxDenials {
		d.all[at] = d.newest.PushFront(&Denial{at: at})
	} else {
		oldest := d.newest.Back().Value.(*Denial)
		at = oldest.at
		d.index.remove(oldest.group.hash(), at)
		d.newest.MoveToFront(d.all[at])
	}
	*d.all[at].Value.(*Denial) = Denial{
		ID: d.ids.Add(1), Outcome: group.outcome, Shadow: d.isShadow, group: group, at: at,
	}
	d.index.insert(hash, at)
	return at
}

// summaryOf returns the summary of a request of a client, whose address is
// invalid if it is unknown.
func summaryOf(r *policy.Request, client netip.Addr) summary {
	path, _, _ := strings.Cut(r.Path, "?")
	s := summary{
		Method:    truncate(r.Method),
		Host:      truncate(r.Host),
		Path:      truncate(path),
		Source:    truncate(r.Source.Address),
		RequestID: requestID(r),
	}
	if client.IsValid() {
		s.Client = client.String()
	}
	return s
}

// clone returns a copy of s. Its texts are not parts of the check, which they
// would keep in memory.
func (s summary) clone() *summary {
	for _, text := range []*string{&s.Method, &s.Host, &s.Path, &s.Source, &s.RequestID} { // Client is no part
		*text = strings.Clone(*text)
	}
	return &s
}

// mistakenBy returns the limit and the field of the error in the config because
// of which a check was refused. They are empty if it is an error in Envoy's
// config.
func mistakenBy(check *checkState) (limit, field string) {
	for _, m := range check.mistakes {
		var rule *policy.RuleError
		if errors.As(m, &rule) && !rule.Shadow {
			return rule.Limit, rule.Field
		}
	}
	return "", ""
}

// deniedBy returns the charge that denied a request, or the first whose bucket
// failed, with its verdict. It returns nil if there is none.
func deniedBy(d *limiter.Decision) (*limiter.Charge, *limiter.Verdict) {
	if d.Outcome == limiter.Limited {
		return &d.Charges[d.Strictest], &d.Verdicts[d.Strictest]
	}
	for i := range d.Charges {
		if v := &d.Verdicts[i]; v.Err != nil && !d.Charges[i].Limit.Shadow {
			return &d.Charges[i], v
		}
	}
	return nil, nil
}

// list returns the denials, the newest first.
func (d *denials) list() []Denial {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Denial, 0, d.newest.Len())
	for e := d.newest.Front(); e != nil; e = e.Next() {
		one := *e.Value.(*Denial)
		if one.err != nil {
			one.Failure = limiter.KindOf(one.err)
		}
		switch {
		case one.request != nil:
			one.summary = summaryOf(one.request, one.client)
		case one.large != nil:
			one.summary = *one.large
		}
		all = append(all, one)
	}
	return all
}

// truncate returns the first maxShown bytes of s.
func truncate(s string) string { return s[:min(len(s), maxShown)] }
