// Package limiter takes tokens from buckets. It has the arithmetic, the stores
// that keep the buckets (Redis, or this process), and the failure modes for when
// a store does not answer.
//
// It knows nothing of Envoy, gRPC or HTTP. A caller says which buckets a request
// draws from and at what cost (Charge); Decide takes from all of them or from
// none and returns a Decision. The README beside this file explains the terms and
// walks one client through a bucket.
package limiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// FailureMode says what happens to a request when the store does not answer for
// a limit.
type FailureMode uint8

// The failure modes, weakest first. If the limits that fail disagree, the
// strongest mode decides.
const (
	Allow    FailureMode = iota // let the request pass
	Local                       // limit in this process, to its share of the limit
	Delegate                    // let the proxy decide: answer its call with an error
	Deny                        // refuse the request: fail closed
)

// Limit is what all buckets of one limit have in common. It must not change
// once it is in use.
type Limit struct {
	Domain    string      // separates the buckets of several configs
	Name      string      // unique in a config
	Shadow    bool        // decide and count, but never deny
	OnFailure FailureMode // ignored if Shadow
	// LocalShare is the part of a bucket, above 0 and at most 1, by which this
	// process limits while the store fails. It is used only if OnFailure is Local.
	LocalShare float64
	// Lease is for how long a Leases may hold tokens of a busy key ahead: MinLease
	// to MaxLease, to which other values are cut; 0 if it may not. Charges with
	// HoldFor are never granted from a lease.
	Lease time.Duration
}

// Mode returns the limit's mode as the config writes it: shadow, or enforce.
func (l *Limit) Mode() string {
	if l.Shadow {
		return "shadow"
	}
	return "enforce"
}

// Charge is what a request owes one bucket. It must not change once it is in
// use.
type Charge struct {
	Limit *Limit
	// Bucket is the bucket's shape. Keys of one limit may have different shapes.
	// The zero value says that there is no bucket: the charge is denied for ever,
	// and no store is asked about it (HasBucket).
	Bucket Bucket
	// Key is the whole key of the bucket in the store.
	Key string
	// Shown is what people see of Key. If it is empty, ShownKey returns the part
	// of Key between its braces.
	Shown string
	// Cost is in tokens, at least 0. A charge of 0 reads the bucket and takes
	// nothing, but holds if it has HoldFor; a charge above the burst is always
	// denied.
	Cost int64
	// Refused denies the charge for ever, whatever the bucket holds.
	Refused bool
	// HoldFor is for how long the cost is held, if it is taken: until then a
	// settlement may return some of it. Values above 0 are cut to MinHold and
	// MaxHold; 0 holds nothing.
	HoldFor time.Duration

	// ownHold is for how long the store itself holds the cost, if HoldFor is 0.
	ownHold time.Duration
}

// ShownKey returns the key of the bucket as logs, metadata, pages and commands
// show it. It is the same text everywhere, so that one search finds them all.
// Secrets in it are hashed; what a client sent is escaped.
func (c *Charge) ShownKey() string {
	if c.Shown != "" {
		return c.Shown
	}
	_, key, _ := strings.Cut(c.Key, "{")
	return strings.TrimSuffix(key, "}")
}

// HasBucket reports whether the charge has a bucket. One that has none is denied
// for ever; only Decide and Replay accept it, and no Store is asked about it.
func (c *Charge) HasBucket() bool { return c.Bucket.burst > 0 }

// life returns for how long the cost is held; 0 if the charge holds nothing.
func (c *Charge) life() time.Duration {
	life := c.HoldFor
	if life <= 0 {
		life = c.ownHold
	}
	if life <= 0 {
		return 0
	}
	return min(max(life, MinHold), MaxHold)
}

// needs returns how many tokens the bucket must hold for the charge: at most
// one more than the burst, which no bucket holds.
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
	// NoSource means that nobody decided: the store did not answer, it was not
	// asked, or there was no bucket.
	NoSource     Source = iota
	RedisSource         // a Redis
	MemorySource        // a Memory
	LocalSource         // this process, in place of Redis (Fallback)
	// CeilingSource means that this process denied the charge by the most that
	// the bucket can hold (Ceiling). The numbers of the Verdict are then bounds.
	CeilingSource
	// LeaseSource means that this process allowed the charge from tokens that it
	// holds (Leases). The numbers of the Verdict are then what the bucket had when
	// it was last asked, less what was granted here since.
	LeaseSource
	// BlockSource means that nobody was asked, as the charge has no bucket and is
	// always denied.
	BlockSource
)

// Verdict is what a store decided about one Charge. Its durations count from
// the instant of the decision.
type Verdict struct {
	// Allowed says that the bucket held the cost. It is true even if another
	// bucket denied the request, so that nothing was taken.
	Allowed bool
	Source  Source
	// taken says that the store took the cost.
	taken bool
	// wrongWindow says that a quota's window was guessed wrong, so that there is no
	// verdict: at is an instant in the right one. No Store returns it.
	wrongWindow bool
	// Remaining is how many whole tokens can be taken after the decision, at least
	// 0.
	Remaining int64
	// Held is how many tokens are held after the decision. It is 0 if the charge
	// has no HoldFor and its limit no Lease, and if Source is LeaseSource. Owed is
	// how many tokens are owed: nothing is granted until these have refilled.
	Held, Owed int64
	// RetryAfter is the time until the bucket has the cost if all that is held is
	// spent: 0 if Allowed, Never if the cost is above the burst. It is at most a
	// second, or a lease, if the cost would be there if what is held were returned
	// now.
	RetryAfter time.Duration
	// FullAfter is the time until the bucket is full if all that is held is spent. Of
	// a quota it is the time until the window ends, even if nothing is used.
	FullAfter time.Duration
	// NextAfter is the time until one more whole token can be taken; 0 if the
	// bucket is full.
	NextAfter time.Duration
	// Hold names what the take holds of a charge with HoldFor. It is zero if
	// nothing was taken, or if the bucket has too many holds: the cost then counts
	// as spent.
	Hold Hold
	// Expired is how many holds of the bucket have ended without a settlement
	// since a charge with HoldFor, or a settlement, last used it. It is 0 if the
	// charge has no HoldFor.
	Expired int
	// Err is a *StoreError if the store has no verdict; the other fields are then
	// zero. It wraps context.Canceled if the caller hung up, which is not a
	// failure of the store.
	Err error

	left level // what can be taken after the decision
	at   int64 // the time of the decision in microseconds, by the clock of the Source
	held int64 // what is held after the decision, whether or not the charge holds
}

// Known reports whether there is a verdict. There is none if the store failed
// (Err), or if it was not asked because another charge of the request was
// denied for certain.
func (v *Verdict) Known() bool { return v.Source != NoSource }

// verdict returns the Verdict on c if its bucket had the level before, and taken
// tokens were then taken from it. held is what is held after that.
func (c *Charge) verdict(before level, held, taken int64, from Source) Verdict {
	b, cost, after := c.Bucket, c.needs(), before
	after.tokens -= taken
	v := Verdict{
		Allowed:   before.tokens >= cost,
		Source:    from,
		Remaining: max(0, after.tokens),
		Owed:      max(0, -after.tokens),
		left:      after,
		held:      held,
	}
	if b.IsQuota() {
		v.FullAfter = time.Duration(after.frac) * time.Microsecond
	} else {
		v.FullAfter = b.wait(after, b.burst)
	}
	if !v.Allowed {
		v.RetryAfter = b.wait(after, cost)
	}
	if within := c.holdsWithin(); within > 0 {
		v.Held = held
		if cost <= b.burst && after.tokens+held >= cost {
			v.RetryAfter = min(v.RetryAfter, within)
		}
	}
	if v.FullAfter > 0 && v.Remaining < b.burst {
		v.NextAfter = b.wait(after, v.Remaining+1)
	}
	return v
}

// holdsWithin returns within what time it pays to ask again where what is held
// may be returned; 0 if the bucket has no holds.
func (c *Charge) holdsWithin() time.Duration {
	if c.HoldFor > 0 {
		return time.Second
	}
	return c.Limit.Lease
}

// Store keeps buckets.
//
// Take fills verdicts[i] with the verdict on charges[i]. The slices have the same
// length, at least 1, and no two charges have the same Key. Of the charges whose
// Limit is not Shadow, Take takes all for which a bucket answered, or none of
// them: none if one is denied, and none if one has an Err and its Limit's
// OnFailure is Deny or Local (Outcome.Spends). A Shadow charge is taken if and
// only if its own bucket allows it. A bucket that fails MUST NOT make another one
// fail.
//
// A charge with HoldFor that is taken is held (Verdict.Hold).
//
// Take MUST return by the deadline of ctx, and MUST execute at most once however
// it ends: if its answer is lost, tokens may have been taken, and none may be
// granted twice. If an enforced charge is denied, Take MAY leave other verdicts
// zero. Take MUST be safe for concurrent use, and MUST NOT keep either slice.
type Store interface {
	Take(ctx context.Context, charges []Charge, verdicts []Verdict)
}

// Settlement says what a request has cost of which a charge was held.
type Settlement struct {
	Limit *Limit
	// Key is the charge's.
	Key string
	// Hold is the verdict's. It must not be zero.
	Hold Hold
	// Cost is in tokens, at least 0.
	Cost int64
}

// Outcome is how a check ended.
type Outcome uint8

// The outcomes. Decide returns Unmatched to Delegated, and Canceled. The caller
// that makes the charges sets Exempt and Invalid.
const (
	Unmatched    Outcome = iota // no limit applies
	Allowed                     // every enforced limit allowed the request
	Limited                     // an enforced limit denied the request
	FailedOpen                  // the store did not answer for a limit, which lets the request pass
	FailedClosed                // the store did not answer for a limit, which refuses the request
	Delegated                   // the store did not answer for a limit, which leaves the request to the proxy
	Exempt                      // the config exempts the request from all limits
	Invalid                     // the request reveals a mistake in the config
	// FailedLocal means that this process decided in place of the store. It names
	// such checks in metrics and logs; the Outcome of the Decision is Allowed or
	// Limited, and its Local is set.
	FailedLocal
	Canceled // the caller hung up before the store answered
)

// Outcomes lists all outcomes in the order of their values.
var Outcomes = []Outcome{
	Unmatched,
	Allowed,
	Limited,
	FailedOpen,
	FailedClosed,
	Delegated,
	Exempt,
	Invalid,
	FailedLocal,
	Canceled,
}

// String returns the outcome's name in metrics, metadata and logs.
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

// Decision is what Decide returns about a request.
type Decision struct {
	Outcome  Outcome
	Charges  []Charge  // as passed to Decide
	Verdicts []Verdict // Verdicts[i] is on Charges[i]; nil without charges
	// Strictest is the index of the charge that the answer reports, or -1 if there
	// is none. If charges were denied, it is the one with the longest RetryAfter;
	// otherwise the one with the smallest share of its burst left; the first one
	// of several. It is never a shadow charge or one without a verdict.
	Strictest int
	// Local says that this process decided about an enforced charge in place of
	// the store.
	Local bool
}

// Decide takes the charges from the store, all or none, and returns what
// happens to the request. Without charges the Outcome is Unmatched and the
// store is not asked. Decide returns by the deadline of ctx, as the store does.
// It is safe for concurrent use.
func Decide(ctx context.Context, store Store, charges []Charge) Decision {
	d := Decision{Charges: charges, Strictest: -1}
	if len(charges) == 0 {
		return d
	}
	d.Verdicts = make([]Verdict, len(charges))
	if allHaveBuckets(charges) {
		store.Take(ctx, charges, d.Verdicts)
	} else {
		takeBuckets(ctx, store, charges, d.Verdicts)
	}
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
	// If the caller hung up, a missing verdict is not a failure of the store.
	if d.Outcome != Limited && errors.Is(ctx.Err(), context.Canceled) &&
		slices.ContainsFunc(d.Verdicts, func(v Verdict) bool { return !v.Known() }) {
		d.Outcome = Canceled
	}
	return d
}

// allHaveBuckets reports whether every charge has a bucket. Every check asks it,
// so it copies no charge.
func allHaveBuckets(charges []Charge) bool {
	for i := range charges {
		if !charges[i].HasBucket() {
			return false
		}
	}
	return true
}

// takeBuckets is the store's Take for charges of which some have no bucket. If an
// enforced one has none, the request is denied, and the store is asked only about
// the shadow charges, which count whatever happens to the request. The other
// enforced charges then have no verdict.
func takeBuckets(ctx context.Context, store Store, charges []Charge, verdicts []Verdict) {
	denied := slices.ContainsFunc(charges, func(c Charge) bool { return !c.HasBucket() && !c.Limit.Shadow })
	var at []int
	var rest []Charge
	for i := range charges {
		switch c := &charges[i]; {
		case !c.HasBucket():
			verdicts[i] = Verdict{Source: BlockSource, RetryAfter: Never}
		case c.Limit.Shadow || !denied:
			at, rest = append(at, i), append(rest, *c)
		}
	}
	if len(rest) == 0 {
		return
	}
	taken := make([]Verdict, len(rest))
	store.Take(ctx, rest, taken)
	for i := range rest {
		verdicts[at[i]] = taken[i]
	}
}

// outcomeOf returns the outcome of a request from the verdicts on its charges and
// their failure modes: Allowed, Limited, FailedOpen, FailedClosed or Delegated. A
// bucket that is known to deny decides, whatever the buckets without an answer
// hold; if none denies and some failed, the strongest failure mode decides.
// Outcome.Spends says whether the charges are taken.
//
// The script applies the same rule by what appendCharge (redis_script.go) tells
// it of each charge; tests compare the two.
func outcomeOf(charges []Charge, verdicts []Verdict) Outcome {
	failed, failure, unknown := false, Allow, false
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		switch {
		case c.Limit.Shadow:
		case v.Err != nil && c.Limit.OnFailure == Local: // and nobody decided in the store's place
			failed, failure = true, Deny
		case v.Err != nil:
			failed, failure = true, max(failure, c.Limit.OnFailure)
		case !v.Known(): // not asked, as another charge was denied; if none was, the store failed
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
	case failed:
		return FailedOpen
	}
	return Allowed
}

// Spends reports whether a request with this outcome keeps what it took: it
// passes, or, where it is Delegated, may pass. Otherwise its enforced charges
// are not taken, or given back. Shadow charges are taken whatever the outcome,
// if their own bucket allows it.
func (o Outcome) Spends() bool { return o == Allowed || o == FailedOpen || o == Delegated }

// stricter reports whether charge i is stricter than charge j (see Strictest).
// Both must have a verdict.
func (d *Decision) stricter(i, j int) bool {
	v, w := &d.Verdicts[i], &d.Verdicts[j]
	if !v.Allowed || !w.Allowed {
		return v.RetryAfter > w.RetryAfter // 0 where allowed, and at least a microsecond where not
	}
	// The smaller share is stricter: r/b < s/c if r·c < s·b, at most 1e18.
	return v.Remaining*d.Charges[j].Bucket.burst < w.Remaining*d.Charges[i].Bucket.burst
}

// ErrorKind classifies the errors of a store. It is the value of the label kind
// of sluice_store_errors_total.
type ErrorKind string

// The kinds of errors.
const (
	KindTimeout    ErrorKind = "timeout"    // no answer in time
	KindConnection ErrorKind = "connection" // no connection, or it broke
	KindAuth       ErrorKind = "auth"       // wrong password, or a missing right
	KindReadOnly   ErrorKind = "readonly"   // a replica, or a master that must not write now
	KindOOM        ErrorKind = "oom"        // Redis is out of memory
	KindLoading    ErrorKind = "loading"    // Redis is still reading its data
	KindScript     ErrorKind = "script"     // the script failed, or was refused
	KindState      ErrorKind = "state"      // the stored state is invalid or newer, or a quota's window keeps changing
	KindOverload   ErrorKind = "overload"   // too many takes are waiting
	KindOther      ErrorKind = "other"
)

// errorKinds lists all kinds.
var errorKinds = []ErrorKind{
	KindTimeout, KindConnection, KindAuth, KindReadOnly, KindOOM,
	KindLoading, KindScript, KindState, KindOverload, KindOther,
}

// StoreError is an error from a Store, classified by Kind. Its text contains no
// key and nothing else that a client sent.
type StoreError struct {
	Kind ErrorKind
	Err  error
}

func (e *StoreError) Error() string { return fmt.Sprintf("store: %s: %v", e.Kind, e.Err) }
func (e *StoreError) Unwrap() error { return e.Err }

// failAll sets the same error for all verdicts.
func failAll(verdicts []Verdict, err error) {
	for i := range verdicts {
		verdicts[i] = Verdict{Err: err}
	}
}

// KindOf returns the kind of the *StoreError that err wraps, and KindOther if
// it wraps none.
func KindOf(err error) ErrorKind {
	if e, ok := errors.AsType[*StoreError](err); ok {
		return e.Kind
	}
	return KindOther
}
