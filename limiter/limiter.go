// Package limiter draws tokens from buckets: the arithmetic, the stores that keep the buckets (Redis, or this process),
// and what becomes of a request when the store does not answer.
//
// It knows no Envoy, gRPC or HTTP. A caller says which buckets at what cost (Charge); Decide draws from all of them or
// from none and says how the request fared (Decision). The README beside this file explains the terms and
// walks one client through a bucket.
package limiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// FailureMode says what becomes of a request when the store does not answer for a limit.
type FailureMode uint8

// The failure modes, weakest first: where the limits that fail disagree, the strongest decides.
const (
	Allow    FailureMode = iota // let the request pass
	Local                       // limit in this process, by its share of the limit
	Delegate                    // let the proxy decide: answer its call with an error
	Deny                        // refuse the request: fail closed
)

// Limit is what all the buckets of one limit have in common. It is not changed once it is in use.
type Limit struct {
	Domain    string      // whose buckets they are
	Name      string      // unique in a config
	Shadow    bool        // decide and count, but never deny
	OnFailure FailureMode // of no meaning where Shadow
}

// Charge is what a request owes one bucket. Its fields are not changed once it is in use.
type Charge struct {
	Limit  *Limit
	Bucket Bucket // the bucket's shape; a key may have another than its limit's other keys
	Key    string // the bucket's whole key, as it stands in Redis
	Cost   int64  // in tokens, at least 0; 0 looks without taking, more than the burst is always denied
	// Local is the bucket that this process keeps by itself while the store fails, where the limit's OnFailure is Local.
	Local Bucket
	// Refused says that it is denied whatever the bucket holds, and for ever.
	Refused bool
}

// needs is how many tokens the bucket has to hold, at most one more than it can.
func (c *Charge) needs() int64 {
	if c.Refused {
		return c.Bucket.burst + 1
	}
	return min(c.Cost, c.Bucket.burst+1)
}

// Source says who decided about a bucket.
type Source uint8

// The sources.
const (
	NoSource    Source = iota // nobody: the store did not answer or was not asked, or there was no bucket to ask for
	RedisSource               // Redis
	MemorySource
	LocalSource   // this process, in Redis's place
	CeilingSource // this process, by what a bucket can hold at most: the other numbers of the Verdict are then bounds, too
)

// Verdict is what a store says of one Charge. The times are of the instant at which the store decided.
type Verdict struct {
	// Allowed says that the bucket held the cost. It is the bucket's own verdict: where another one denied the
	// request, nothing was taken all the same.
	Allowed    bool
	Source     Source
	taken      bool          // the store took the cost, and was not told to refund it
	Remaining  int64         // whole tokens that the bucket holds now
	RetryAfter time.Duration // until it holds the cost; 0 where Allowed, Never where the cost is above the burst
	FullAfter  time.Duration // until it is full; 0 where it is
	NextAfter  time.Duration // until it holds one whole token more; 0 where it is full
	// Err says why the store has no verdict: a *StoreError, and then the other fields are zero. It wraps context.Canceled
	// where the caller hung up, which is no failure of the store's.
	Err error

	// By which the verdict was found: what the bucket holds now, and the store's clock in microseconds.
	left level
	at   int64
}

// Known reports whether there is a verdict: it is not known where the store failed (Err), and where nobody asked since another charge of the
// request was denied for certain.
func (v *Verdict) Known() bool { return v.Source != NoSource }

// verdict is the Verdict of a bucket that held the level before, of which taken tokens were then taken.
func (b Bucket) verdict(before level, cost, taken int64, from Source) Verdict {
	after := before
	after.tokens -= taken
	v := Verdict{
		Allowed:   before.tokens >= cost,
		Source:    from,
		Remaining: after.tokens,
		FullAfter: b.wait(after, b.burst),
		left:      after,
	}
	if !v.Allowed {
		v.RetryAfter = b.wait(after, cost)
	}
	if v.FullAfter > 0 {
		v.NextAfter = b.wait(after, after.tokens+1)
	}
	return v
}

// Store keeps buckets.
//
// Take fills verdicts[i] with what became of charges[i]; the slices have the same length, at least 1, and no two
// charges have the same Key. Of the charges whose Limit is not Shadow, all that a
// bucket answered for are taken, or none of them: none where one is denied, and
// none where one has an Err and its Limit's OnFailure is Deny (Outcome.Spends).
// A Shadow charge is taken exactly if its own bucket allows it. One bucket's
// trouble MUST NOT become another's.
//
// Take MUST return by the deadline of ctx, and MUST execute at most once however it ends: an answer that is lost
// may have taken tokens, and never gives one away. Where an enforced charge is denied it MAY leave others without a verdict, as zero
// ones. It is safe for concurrent use, and keeps neither slice.
type Store interface {
	Take(ctx context.Context, charges []Charge, verdicts []Verdict)
}

// Outcome is how a check ended.
type Outcome uint8

// The outcomes. Decide gives the first of these; Exempt and Invalid are for who draws up the charges.
const (
	Unmatched    Outcome = iota // no limit applies
	Allowed                     // every enforced limit allowed it
	Limited                     // an enforced limit denied it
	FailedOpen                  // the store did not answer for a limit, which lets the request pass
	FailedClosed                // the store did not answer for a limit, which refuses the request
	Delegated                   // the store did not answer for a limit, which leaves the request to the proxy
	Exempt                      // the config exempts the request from all limits
	Invalid                     // the request shows a mistake of the config
	FailedLocal                 // this process decided in the store's place; as a Decision's Outcome it is Allowed or Limited
	Canceled                    // the caller hung up before the store answered: nobody learns of the decision
)

// Outcomes are all of them, in order.
var Outcomes = []Outcome{Unmatched, Allowed, Limited, FailedOpen, FailedClosed, Delegated, Exempt, Invalid, FailedLocal, Canceled}

// String is the outcome's name in metrics, metadata and logs.
func (o Outcome) String() string {
	switch o {
	case Unmatched:
		return "unmatched"
	case Allowed:
		return "allowed"
	case Limited:
		return "limited"
	case FailedOpen:
		return "failed_open"
	case FailedClosed:
		return "failed_closed"
	case Delegated:
		return "delegated"
	case Exempt:
		return "exempt"
	case Invalid:
		return "invalid"
	case FailedLocal:
		return "failed_local"
	case Canceled:
		return "canceled"
	}
	return fmt.Sprintf("Outcome(%d)", uint8(o))
}

// Decision is what became of a request.
type Decision struct {
	Outcome  Outcome
	Charges  []Charge  // as given
	Verdicts []Verdict // of the same indexes
	// Strictest is the index of the charge that the answer speaks of, or -1. Of those that denied it is the one that
	// denies for longest; where none did, the one with the smallest share of its burst left; where there are
	// several, the first. A shadow charge or one without a verdict is never telling.
	Strictest int
	// Local says that this process decided about an enforced charge in the store's place.
	Local bool
}

// Decide draws charges from the store, all or none, and decides by the answer. Without charges the request is
// Unmatched and the store is not asked. It is safe for concurrent use.
func Decide(ctx context.Context, store Store, charges []Charge) Decision {
	d := Decision{Charges: charges, Strictest: -1}
	if len(charges) == 0 {
		return d
	}
	d.Verdicts = make([]Verdict, len(charges))
	store.Take(ctx, charges, d.Verdicts)
	d.Outcome = outcomeOf(charges, d.Verdicts)
	for i := range charges {
		v := &d.Verdicts[i]
		if charges[i].Limit.Shadow || !v.Known() {
			continue
		}
		d.Local = d.Local || v.Source == LocalSource
		if d.Strictest < 0 || d.stricter(i, d.Strictest) {
			d.Strictest = i
		}
	}
	// The store has not failed a caller that did not wait for it.
	if d.Outcome != Limited && errors.Is(ctx.Err(), context.Canceled) &&
		slices.ContainsFunc(d.Verdicts, func(v Verdict) bool { return !v.Known() }) {
		d.Outcome = Canceled
	}
	return d
}

// outcomeOf returns what becomes of a request from the verdicts on its charges
// and their failure modes: Allowed, Limited, FailedOpen, FailedClosed or
// Delegated. A bucket that is known to deny decides, whatever those would have
// said that did not answer; where none denies and some failed, the strongest
// failure mode does. What becomes of the charges is Outcome.Spends.
//
// It is the one place with this rule. The script has it in its own words
// (appendCharge), and tests hold the two together.
func outcomeOf(charges []Charge, verdicts []Verdict) Outcome {
	failed, failure, unknown := false, Allow, false
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		switch {
		case c.Limit.Shadow:
		case v.Err != nil:
			failed, failure = true, max(failure, c.Limit.OnFailure)
		case !v.Known(): // another one is denied; where none is, the store has failed
			unknown = true
		case !v.Allowed:
			return Limited
		}
	}
	switch {
	case unknown || failed && failure == Deny:
		return FailedClosed
	case failed && failure == Delegate:
		return Delegated
	case failed: // under Local if nobody has decided in the store's place
		return FailedOpen
	}
	return Allowed
}

// Spends reports whether a request with this outcome keeps what it took: it
// passes, or, where it is Delegated, may pass. Otherwise its enforced charges are
// not taken, or given back. Shadow charges are taken whatever the outcome, if
// their own bucket allows it.
func (o Outcome) Spends() bool { return o == Allowed || o == FailedOpen || o == Delegated }

// tells reports whether charge i is more telling than charge j, both with a verdict.
func (d *Decision) stricter(i, j int) bool {
	v, w := &d.Verdicts[i], &d.Verdicts[j]
	if !v.Allowed || !w.Allowed {
		return v.RetryAfter > w.RetryAfter // 0 where allowed, and at least a microsecond where not
	}
	// The smaller share left: r/b < s/c, as r·c < s·b (at most 1e18).
	return v.Remaining*d.Charges[j].Bucket.burst < w.Remaining*d.Charges[i].Bucket.burst
}

// ErrorKind says what went wrong with a store, as a metric's label does.
type ErrorKind string

// The kinds.
const (
	KindTimeout    ErrorKind = "timeout"    // no answer in time
	KindConnection ErrorKind = "connection" // no connection, or it broke
	KindAuth       ErrorKind = "auth"       // wrong password, or no right to
	KindReadOnly   ErrorKind = "readonly"   // a replica, or a master that must not write now
	KindOOM        ErrorKind = "oom"        // out of memory
	KindLoading    ErrorKind = "loading"    // still reading its data
	KindScript     ErrorKind = "script"     // the script failed, or was refused
	KindState      ErrorKind = "state"      // what was stored makes no sense, or is of a newer version
	KindOverload   ErrorKind = "overload"   // more waits than may
	KindOther      ErrorKind = "other"
)

// errorKinds are all of them.
var errorKinds = []ErrorKind{KindTimeout, KindConnection, KindAuth, KindReadOnly, KindOOM, KindLoading, KindScript, KindState,
	KindOverload, KindOther}

// StoreError is a store's trouble. Its text holds no key and nothing that a client sent.
type StoreError struct {
	Kind ErrorKind
	Err  error
}

func (e *StoreError) Error() string { return fmt.Sprintf("store: %s: %v", e.Kind, e.Err) }
func (e *StoreError) Unwrap() error { return e.Err }

// failAll gives every charge the same error.
func failAll(verdicts []Verdict, err error) {
	for i := range verdicts {
		verdicts[i] = Verdict{Err: err}
	}
}

// KindOf is the kind of a store's error, KindOther where err is none.
func KindOf(err error) ErrorKind {
	var e *StoreError
	if errors.As(err, &e) {
		return e.Kind
	}
	return KindOther
}
