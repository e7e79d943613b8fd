package limiter

// Replay decides about requests of the past, as a Store in this process would,
// at instants that the caller sets. The buckets are the caller's. It is not safe
// for concurrent use; its zero value is ready.
type Replay struct {
	next []replayed
}

// replayed is the state that follows in a bucket.
type replayed struct {
	state
	moved bool // it has to be stored even if nothing is taken
}

// ReplayBucket is a bucket of a Replay. Its zero value is full.
type ReplayBucket struct {
	state  state
	isUsed bool // the state is valid
}

// Take takes the charges from the buckets as Store's Take does, charges[i] from
// buckets[i] at the instant at[i], and returns the outcome: Allowed or Limited. The
// slices have the same length, and no bucket is in them twice. The bucket of a
// charge that has none is not used. Of the verdicts it sets Allowed, Source and
// Hold.
//
// Instants are in microseconds since 1970; those of one bucket should not go
// back. Usually all are the same. They differ if requests of which only the
// second is known are spread over it, for each bucket by itself.
func (r *Replay) Take(at []int64, buckets []*ReplayBucket, charges []Charge, verdicts []Verdict) Outcome {
	r.next = r.next[:0]
	for i := range charges {
		c, b := &charges[i], buckets[i]
		if !c.HasBucket() {
			r.next = append(r.next, replayed{})
			verdicts[i] = Verdict{Source: BlockSource}
			continue
		}
		var next replayed
		if !b.isUsed {
			next.state = newState(c.Bucket, at[i])
		} else {
			next.state, next.moved, _ = b.state.next(c.Bucket, at[i])
		}
		r.next = append(r.next, next)
		verdicts[i] = Verdict{Allowed: next.levelFor(c.Bucket).tokens >= c.needs(), Source: MemorySource}
	}
	outcome := outcomeOf(charges, verdicts)
	for i := range charges {
		c, b, next := &charges[i], buckets[i], &r.next[i]
		if verdicts[i].Allowed && (outcome.Spends() || c.Limit.Shadow) {
			life := c.life()
			if life > 0 {
				verdicts[i].Hold = next.hold(c.Cost, life, newBirth())
			} else {
				next.level.tokens -= c.Cost
			}
			next.moved = next.moved || life > 0 || c.Cost > 0
		}
		// A full bucket of which nothing was taken stays full in every shape.
		if next.moved {
			b.state, b.isUsed = next.state, true
		}
	}
	return outcome
}

// Settle settles a hold of the bucket at an instant in microseconds since 1970,
// or at the bucket's latest instant if that is later. cost is in tokens, at least
// 0.
func (b *ReplayBucket) Settle(at int64, hold Hold, cost int64) Settled {
	if !b.isUsed {
		return Settled{}
	}
	next, moved, expired := b.state.settling(max(at, b.state.at))
	r := next.settle(hold, cost)
	r.Expired = expired
	if moved || r.Known && !r.Repeated {
		b.state = next
	}
	return r
}

// IsFull reports whether the bucket is full at an instant in microseconds since
// 1970, in every shape that has used it, and no settlement can change it any more:
// it then equals the zero value.
func (b *ReplayBucket) IsFull(now int64) bool {
	return !b.isUsed || now-b.state.at >= b.state.keepFor().Microseconds()
}

// Depth measures how many tokens a bucket of some rate must hold so that it
// never denies: the deepest that a bucket of any size is drawn. Its zero value
// has seen no request. It is not safe for concurrent use.
type Depth struct {
	left    level // in a bucket of MaxTokens
	at      int64 // when
	isUsed  bool  // left is valid
	deepest int64
}

// Take takes cost tokens, at least 0, at an instant in microseconds of a clock
// that does not go back, from a bucket with the rate of b. The burst of b has no
// meaning. Beyond MaxTokens the measure is MaxTokens.
func (d *Depth) Take(b Bucket, at, cost int64) {
	d.Look(b, at, cost)
	d.left.tokens = max(0, d.left.tokens-cost)
}

// Look is Take for a request that another bucket denies: the bucket must hold the
// cost, too, but keeps it.
func (d *Depth) Look(b Bucket, at, cost int64) {
	b.burst = MaxTokens
	switch {
	case !d.isUsed:
		d.left, d.isUsed = b.full(), true
	case at > d.at:
		d.left = b.refill(d.left, at-d.at, MaxTokens)
	}
	d.at = max(d.at, at)
	d.deepest = max(d.deepest, min(MaxTokens, MaxTokens-d.left.tokens+cost))
}

// Deepest returns the least burst with which a bucket of the rate would have
// allowed all requests: at least 0 and at most MaxTokens.
func (d *Depth) Deepest() int64 { return d.deepest }
