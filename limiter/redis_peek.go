package limiter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// ReadOnly returns a Store on the same buckets whose Take returns the verdicts
// that a take would get, and takes nothing. It needs the rights to TIME and
// GET. It retries and may take seconds, so it is for operators, not for
// requests.
func (r *Redis) ReadOnly() Store { return readOnlyRedis{r} }

type readOnlyRedis struct{ redis *Redis }

func (l readOnlyRedis) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	l.redis.look(ctx, charges, verdicts, make([]bool, len(charges)))
}

// Get returns what the bucket of c holds now, and whether it is stored: an
// absent bucket is full. It ignores the charge's cost. Its error is a
// *StoreError.
func (r *Redis) Get(ctx context.Context, c Charge) (v Verdict, exists bool, err error) {
	c.Cost = 0
	verdicts, stored := make([]Verdict, 1), make([]bool, 1)
	r.look(ctx, []Charge{c}, verdicts, stored)
	return verdicts[0], stored[0], verdicts[0].Err
}

// Reset makes a bucket full by removing it, and reports whether it was stored.
// It needs the right to DEL. Its error is a *StoreError.
func (r *Redis) Reset(ctx context.Context, key string) (existed bool, err error) {
	var n int64
	err = r.ask(ctx, func(ctx context.Context) (err error) {
		n, err = r.client.Del(ctx, key).Result()
		return err
	})
	return n > 0, err
}

// asksAtMost is how many times ask tries if the connection fails.
const asksAtMost = 3

// ask calls question, which takes nothing, until it succeeds or fails otherwise
// than by the connection. It may take connectTimeout besides the store's
// timeout. Its error is a *StoreError.
func (r *Redis) ask(ctx context.Context, question func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout+r.timeout)
	defer cancel()
	for asked := 1; ; asked++ {
		err := question(ctx)
		if err == nil {
			return nil
		}
		failed := r.options.explain(r.located(err))
		if !isFailure(failed) || asked == asksAtMost || errors.As(failed.Err, new(*refusal)) {
			return failed
		}
		select {
		case <-time.After(reconnectsEvery):
		case <-ctx.Done():
			return failed
		}
	}
}

// located returns err with the name of this Redis, unless err contains it.
func (r *Redis) located(err error) error {
	var where string
	if client, ok := r.client.(*redis.Client); ok {
		where = r.nameOf(client)
	} else {
		where = "the cluster of " + strings.Join(r.options.Addresses, ", ")
	}
	if errors.As(err, new(*StoreError)) || strings.Contains(err.Error(), where) {
		return err
	}
	return fmt.Errorf("%s: %w", where, err)
}

// look reads the buckets of charges. It fills verdicts, and sets exists for
// those that are stored.
func (r *Redis) look(ctx context.Context, charges []Charge, verdicts []Verdict, exists []bool) {
	var now time.Time
	stored := make([]*redis.StringCmd, len(charges))
	err := r.ask(ctx, func(ctx context.Context) error {
		pipe := r.client.Pipeline()
		clock := pipe.Time(ctx)
		for i := range charges {
			stored[i] = pipe.Get(ctx, charges[i].Key)
		}
		// Each command has its own error, except if the connection failed before
		// the first one.
		_, execErr := pipe.Exec(ctx)
		var err error
		if now, err = clock.Result(); err == nil && now.IsZero() {
			err = execErr
		}
		return err
	})
	if err != nil {
		failAll(verdicts, err)
		return
	}
	for i := range charges {
		exists[i] = !errors.Is(stored[i].Err(), redis.Nil)
		at, held, err := levelOf(stored[i], charges[i].Bucket, now)
		if err != nil {
			verdicts[i] = Verdict{Err: err}
			continue
		}
		verdicts[i] = charges[i].verdict(at, held, 0, RedisSource)
	}
}

// levelOf returns what can be taken from a bucket and what is held, by the answer
// to its GET, as the script would. Its error is a *StoreError.
func levelOf(stored *redis.StringCmd, b Bucket, now time.Time) (at level, held int64, err error) {
	raw, err := stored.Result()
	empty := emptyState(b, now.UnixMicro())
	switch {
	case errors.Is(err, redis.Nil):
		fresh := newState(b, now.UnixMicro())
		return fresh.levelFor(b), 0, nil
	case err != nil && strings.HasPrefix(err.Error(), "WRONGTYPE"):
		return empty.levelFor(b), 0, nil
	case err != nil:
		return level{}, 0, storeError(err)
	}
	s, err := parseState(raw)
	if errors.Is(err, errNewer) {
		return level{}, 0, &StoreError{Kind: KindState, Err: err}
	}
	if at = empty.levelFor(b); err == nil {
		at, held = levelAt(s, b, now.UnixMicro())
	}
	return at, held, nil // an invalid state counts as an empty bucket
}

const (
	stateMagic = "\xb5\x08"
	stateSize  = 37 // of version 1
	mixedSize  = 54 // of version 2, which has another shape
	heldSize   = 67 // of version 3 without its slices
	quotaSize  = 61 // of version 4, a quota
	sliceSize  = 25 // of a slice without its bits
	holdsSize  = 13 // of what versions 3 and 5 have of holds before their slices
)

var (
	errNewer   = errors.New("stored by a newer version")
	errInvalid = errors.New("invalid bucket state")
)

// parseState decodes a state that the script has stored (STATE, MIXED, HELD, QUOTA
// or HELD_QUOTA there).
func parseState(raw string) (state, error) {
	if len(raw) <= len(stateMagic) || !strings.HasPrefix(raw, stateMagic) {
		return state{}, errInvalid
	}
	version := raw[len(stateMagic)]
	switch {
	case version == 1 && len(raw) == stateSize:
	case version == 2 && len(raw) == mixedSize:
	case version == 3 && len(raw) >= heldSize:
	case version == 4 && len(raw) == quotaSize, version == 5 && len(raw) >= quotaSize+holdsSize:
		return parseQuota(raw)
	case version >= 2: // of another length than those known here
		return state{}, errNewer
	default:
		return state{}, errInvalid
	}
	field := func(from, to int) int64 { return int64(bigEndian(raw[from:to])) }
	shapeAt := func(from int) Bucket {
		return Bucket{burst: field(from, from+4), n: field(from+4, from+11), p: field(from+11, from+17)}
	}
	s := state{
		level: level{tokens: field(3, 7), frac: field(7, 13)},
		at:    field(13, 20),
		shape: shapeAt(20),
	}
	lowest := int64(0)
	if version == 3 {
		lowest, s.level.tokens = -MaxTokens, int64(int32(s.level.tokens))
		var ok bool
		if s.holds, ok = parseHolds(raw[mixedSize:]); !ok {
			return state{}, errInvalid
		}
	}
	if version >= 2 {
		if other := shapeAt(stateSize); version == 2 || other.burst != 0 {
			if !other.inRange() {
				return state{}, errInvalid
			}
			s.other = &other
		}
	}
	if !s.shape.inRange() || s.level.tokens > s.shape.burst || s.level.tokens < lowest || s.level.frac >= s.shape.p ||
		s.level.tokens == s.shape.burst && s.level.frac > 0 || s.at >= 1<<53 {
		return state{}, errInvalid
	}
	return s, nil
}

// parseQuota decodes a state of version 4 or 5.
func parseQuota(raw string) (state, error) {
	field := func(from, to int) int64 { return int64(bigEndian(raw[from:to])) }
	tokens := func(from int) int64 { return int64(int32(bigEndian(raw[from : from+4]))) }
	isLevel := func(tokens, burst int64) bool { return tokens >= -MaxTokens && tokens <= burst && burst <= MaxTokens }
	isWindow := func(w window) bool { return w.start < w.end && w.end < 1<<53 }
	q := &quotaState{
		window:      window{field(18, 25), field(25, 32)},
		lapsed:      field(32, 39),
		otherBurst:  field(39, 43),
		otherTokens: tokens(43),
		other:       window{field(47, 54), field(54, 61)},
	}
	s := state{level: level{tokens: tokens(3)}, shape: Bucket{burst: field(7, 11)}, at: field(11, 18), quota: q}
	if raw[2] == 5 {
		var ok bool
		if s.holds, ok = parseHolds(raw[quotaSize:]); !ok {
			return state{}, errInvalid
		}
	}
	isOther := q.otherBurst == 0 || isLevel(q.otherTokens, q.otherBurst) && isWindow(q.other)
	if s.shape.burst < 1 || !isLevel(s.level.tokens, s.shape.burst) || !isWindow(q.window) || s.at >= 1<<53 ||
		q.lapsed >= 1<<53 || !isOther {
		return state{}, errInvalid
	}
	return s, nil
}

// parseHolds decodes the holds of a state of version 3 or 5, from their birth on;
// nil if there are none.
func parseHolds(raw string) (_ *holds, ok bool) {
	h := &holds{next: uint32(bigEndian(raw[8:12]))}
	copy(h.birth[:], raw)
	count, rest := int(raw[12]), raw[holdsSize:]
	if count > maxSlices {
		return nil, false
	}
	for range count {
		if len(rest) < sliceSize {
			return nil, false
		}
		e := slice{
			number:  uint32(bigEndian(rest[:4])),
			end:     int64(bigEndian(rest[4:11])),
			life:    int64(bigEndian(rest[11:16])),
			left:    int64(bigEndian(rest[16:20])),
			count:   int(bigEndian(rest[20:22])),
			open:    int(bigEndian(rest[22:24])),
			expired: rest[24] == 1,
		}
		rest = rest[sliceSize:]
		bits := (e.count + 7) / 8
		if len(rest) < bits || e.number >= h.next || e.end >= 1<<53 ||
			e.life > (MaxHold+MaxHold/sliceParts).Microseconds() || e.count > maxSliceHolds ||
			e.open > e.count || e.expired && e.open > 0 || e.open == 0 && e.left > 0 {
			return nil, false
		}
		e.settled, rest = []byte(rest[:bits]), rest[bits:]
		h.slices = append(h.slices, e)
		h.total += e.left
	}
	if rest != "" || h.total > MaxTokens {
		return nil, false
	}
	if count == 0 {
		return nil, true
	}
	return h, true
}

// inRange reports whether the numbers of a stored shape are valid for a Bucket.
func (b Bucket) inRange() bool {
	return b.burst >= 1 && b.burst <= MaxTokens && b.n >= 1 && b.n <= MaxTokens*minP &&
		b.p >= minP && b.p <= maxPeriod.Microseconds()
}
