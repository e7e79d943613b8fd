package limiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// said is a store that says what a test has it say.
type said []Verdict

func (s said) Take(_ context.Context, _ []Charge, verdicts []Verdict) { copy(verdicts, s) }

// tally says what another store says, and for how many charges it was asked.
type tally struct {
	said
	asked *int
}

func (c tally) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	*c.asked += len(charges)
	c.said.Take(ctx, charges, verdicts)
}

func TestDecide(t *testing.T) {
	failed := Verdict{Err: &StoreError{Kind: KindTimeout, Err: errors.New("late")}}
	ok := func(remaining int64) Verdict {
		return Verdict{Allowed: true, Source: MemorySource, Remaining: remaining}
	}
	no := func(retry time.Duration) Verdict { return Verdict{Source: MemorySource, RetryAfter: retry} }
	mode := func(m FailureMode) *Limit { return &Limit{OnFailure: m} }
	shadow := &Limit{Shadow: true, OnFailure: Deny}
	deny, allow, delegate := mode(Deny), mode(Allow), mode(Delegate)

	for _, tt := range []struct {
		name     string
		limits   []*Limit
		verdicts []Verdict
		outcome  Outcome
		telling  int
	}{
		{"no limit", nil, nil, Unmatched, -1},
		{"one allows", []*Limit{deny}, []Verdict{ok(3)}, Allowed, 0},
		{"one denies", []*Limit{deny}, []Verdict{no(1)}, Limited, 0},
		{"the smallest share left", []*Limit{deny, deny, deny}, []Verdict{ok(9), ok(2), ok(5)}, Allowed, 1},
		{"on a tie the first", []*Limit{deny, deny}, []Verdict{ok(2), ok(2)}, Allowed, 0},
		{"who denies for longest", []*Limit{deny, deny, deny}, []Verdict{no(5), no(9), no(7)}, Limited, 1},
		{"for ever is longest", []*Limit{deny, deny}, []Verdict{no(5), no(Never)}, Limited, 1},
		{"who denies, not who has little left", []*Limit{deny, deny}, []Verdict{ok(0), no(1)}, Limited, 1},
		{"who denies, wherever it stands", []*Limit{deny, deny}, []Verdict{no(1), ok(0)}, Limited, 0},
		{"a shadow limit's denial", []*Limit{shadow, deny}, []Verdict{no(1), ok(3)}, Allowed, 1},
		{"nothing but shadow", []*Limit{shadow}, []Verdict{no(1)}, Allowed, -1},
		{"shadow failed", []*Limit{shadow}, []Verdict{failed}, Allowed, -1},
		{"shadow failed beside", []*Limit{shadow, allow}, []Verdict{failed, ok(1)}, Allowed, 1},
		{"deny", []*Limit{deny}, []Verdict{failed}, FailedClosed, -1},
		{"allow", []*Limit{allow}, []Verdict{failed}, FailedOpen, -1},
		{"delegate", []*Limit{delegate}, []Verdict{failed}, Delegated, -1},
		{"deny over delegate over allow", []*Limit{allow, delegate, deny}, []Verdict{failed, failed, failed},
			FailedClosed, -1},
		{"delegate over allow", []*Limit{delegate, allow}, []Verdict{failed, failed}, Delegated, -1},
		{"only who failed has a say", []*Limit{deny, allow}, []Verdict{ok(3), failed}, FailedOpen, 0},
		{"one denies, others were not asked", []*Limit{deny, allow, deny}, []Verdict{{}, {}, no(1)}, Limited, 2},
		{"left out without a denial", []*Limit{allow, allow}, []Verdict{ok(1), {}}, FailedClosed, 0},
		{"a shadow was not asked", []*Limit{shadow, allow}, []Verdict{{}, ok(1)}, Allowed, 1},
		{"a known denial decides", []*Limit{deny, deny}, []Verdict{failed, no(1)}, Limited, 1},
		{"a known denial decides, over open too", []*Limit{deny, allow}, []Verdict{no(1), failed}, Limited, 0},
	} {
		charges := make([]Charge, len(tt.limits))
		for i, l := range tt.limits {
			charges[i] = Charge{Limit: l, Bucket: Bucket{n: 1, p: 1, burst: 10}}
		}
		d := Decide(t.Context(), said(tt.verdicts), charges)
		if d.Outcome != tt.outcome || d.Strictest != tt.telling {
			t.Errorf("%s: %v of %d, want %v of %d", tt.name, d.Outcome, d.Strictest, tt.outcome, tt.telling)
		}
	}

	// Of limits without a bucket the store is not asked.
	const none, bucket = true, false
	for _, tt := range []struct {
		name    string
		limits  []*Limit
		none    []bool
		store   said // by the charges that it is asked for
		outcome Outcome
		telling int
		asked   int
	}{
		{"none denies", []*Limit{deny}, []bool{none}, nil, Limited, 0, 0},
		{"none denies before others", []*Limit{deny, allow}, []bool{bucket, none}, nil, Limited, 1, 0},
		{"the first of two", []*Limit{deny, deny}, []bool{none, none}, nil, Limited, 0, 0},
		{"shadows count beside it", []*Limit{deny, shadow}, []bool{none, bucket}, said{ok(3)}, Limited, 0, 1},
		{"a failing store beside it", []*Limit{deny, shadow}, []bool{none, bucket}, said{failed}, Limited, 0, 1},
		{"a shadow's none", []*Limit{shadow, deny}, []bool{none, bucket}, said{ok(3)}, Allowed, 1, 1},
		{"a shadow's none alone", []*Limit{shadow}, []bool{none}, nil, Allowed, -1, 0},
		{"a shadow's none beside a denial", []*Limit{shadow, deny}, []bool{none, bucket}, said{no(3)}, Limited, 1, 1},
		{"a shadow's none beside a failure", []*Limit{shadow, deny}, []bool{none, bucket}, said{failed}, FailedClosed, -1, 1},
	} {
		charges := make([]Charge, len(tt.limits))
		for i, l := range tt.limits {
			charges[i] = Charge{Limit: l}
			if !tt.none[i] {
				charges[i].Bucket = Bucket{n: 1, p: 1, burst: 10}
			}
		}
		asked := 0
		d := Decide(t.Context(), tally{tt.store, &asked}, charges)
		if d.Outcome != tt.outcome || d.Strictest != tt.telling || asked != tt.asked {
			t.Errorf("%s: %v of %d, asked for %d; want %v of %d, asked for %d", tt.name, d.Outcome, d.Strictest, asked,
				tt.outcome, tt.telling, tt.asked)
		}
		for i, v := range d.Verdicts {
			if tt.none[i] && (v.Allowed || v.Source != BlockSource || v.RetryAfter != Never || v.Remaining != 0) {
				t.Errorf("%s: %+v", tt.name, v)
			}
		}
		if tt.outcome == Limited || tt.outcome == Allowed { // as a Replay decides
			verdicts := make([]Verdict, len(charges))
			buckets := make([]*ReplayBucket, len(charges))
			for i := range buckets {
				buckets[i] = &ReplayBucket{}
			}
			outcome := new(Replay).Take(make([]int64, len(charges)), buckets, charges, verdicts)
			first := slices.Index(tt.none, none)
			if denies := first >= 0 && !charges[first].Limit.Shadow; (outcome == Limited) != denies {
				t.Errorf("%s: a Replay says %v", tt.name, outcome)
			}
		}
	}

	// A share, not a number: 9 of 10 is more than 50 of 100.
	large := Charge{Limit: deny, Bucket: Bucket{n: 1, p: 1, burst: 100}}
	small := Charge{Limit: deny, Bucket: Bucket{n: 1, p: 1, burst: 10}}
	if d := Decide(t.Context(), said{ok(9), ok(50)}, []Charge{small, large}); d.Strictest != 1 {
		t.Errorf("the strictest is %d, want 1", d.Strictest)
	}
}

func TestOutcomesAreComplete(t *testing.T) {
	seen := map[string]bool{}
	for i, o := range Outcomes {
		if int(o) != i || seen[o.String()] || strings.Contains(o.String(), "Outcome(") {
			t.Errorf("%d: %v", i, o)
		}
		seen[o.String()] = true
	}
	if next := Outcome(len(Outcomes)); next.String() != fmt.Sprintf("Outcome(%d)", next) {
		t.Errorf("%v is missing among Outcomes", next)
	}
}
