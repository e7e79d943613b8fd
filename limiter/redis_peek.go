package limiter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// ReadOnly returns a Store on the same buckets whose Take says what a take would be answered and takes nothing: it only reads. It
// needs the rights to TIME and GET, and is for people who ask, not for requests.
func (r *Redis) ReadOnly() Store { return readOnlyRedis{r} }

type readOnlyRedis struct{ redis *Redis }

func (l readOnlyRedis) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	l.redis.look(ctx, charges, verdicts, make([]bool, len(charges)))
}

// Get says what a bucket holds now, and whether it is stored at all: an absent bucket is a full one. The charge's cost is of no
// meaning. Its error is a *StoreError.
func (r *Redis) Get(ctx context.Context, c Charge) (v Verdict, exists bool, err error) {
	c.Cost = 0
	verdicts, stored := make([]Verdict, 1), make([]bool, 1)
	r.look(ctx, []Charge{c}, verdicts, stored)
	return verdicts[0], stored[0], verdicts[0].Err
}

// Reset makes a bucket full, by removing it. It reports whether there was one. It needs the right to DEL. Its error is a *StoreError.
func (r *Redis) Reset(ctx context.Context, key string) (existed bool, err error) {
	var n int64
	err = r.ask(ctx, func(ctx context.Context) (err error) {
		n, err = r.client.Del(ctx, key).Result()
		return err
	})
	return n > 0, err
}

// asksAtMost is how many times a person's question is asked, if it is a
// connection that fails.
const asksAtMost = 3

// ask asks a person's question, which may be asked again. It has the time that
// it takes to connect, besides the store's timeout. Its error is a *StoreError.
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

// located returns an error that says which Redis it is of.
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

// look reads charges' buckets, and says which are stored.
func (r *Redis) look(ctx context.Context, charges []Charge, verdicts []Verdict, exists []bool) {
	var now time.Time
	stored := make([]*redis.StringCmd, len(charges))
	err := r.ask(ctx, func(ctx context.Context) error {
		pipe := r.client.Pipeline()
		clock := pipe.Time(ctx)
		for i := range charges {
			stored[i] = pipe.Get(ctx, charges[i].Key)
		}
		_, execErr := pipe.Exec(ctx) // each command has its own error too, but for one that ended the connection's beginning
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
		b := charges[i].Bucket
		exists[i] = !errors.Is(stored[i].Err(), redis.Nil)
		at, err := levelOf(stored[i], b, now)
		if err != nil {
			verdicts[i] = Verdict{Err: err}
			continue
		}
		verdicts[i] = b.verdict(at, charges[i].needs(), 0, RedisSource)
	}
}

// levelOf is what a bucket holds by the answer to its GET, as the script would find it. Its error is a *StoreError.
func levelOf(stored *redis.StringCmd, b Bucket, now time.Time) (level, error) {
	raw, err := stored.Result()
	switch {
	case errors.Is(err, redis.Nil):
		return b.full(), nil
	case err != nil && strings.HasPrefix(err.Error(), "WRONGTYPE"):
		return level{}, nil
	case err != nil:
		return level{}, storeError(err)
	}
	s, err := parseState(raw)
	if errors.Is(err, errNewer) {
		return level{}, &StoreError{Kind: KindState, Err: err}
	}
	if err == nil {
		at, _ := levelAt(s, b, now.UnixMicro())
		return at, nil
	}
	return level{}, nil // what makes no sense counts as empty
}

const (
	stateMagic = "\xb5\x08"
	stateSize  = 37 // of version 1
	mixedSize  = 54 // of version 2, which has another shape
)

var (
	errNewer    = errors.New("stored by a newer version")
	errInvalid = errors.New("invalid bucket state")
)

// parseState reads what the script has stored: STATE and MIXED there.
func parseState(raw string) (state, error) {
	if len(raw) <= len(stateMagic) || !strings.HasPrefix(raw, stateMagic) {
		return state{}, errInvalid
	}
	version := raw[len(stateMagic)]
	switch {
	case version == 1 && len(raw) == stateSize, version == 2 && len(raw) == mixedSize:
	case version >= 2:
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
	if version == 2 {
		other := shapeAt(stateSize)
		if !other.inRange() {
			return state{}, errInvalid
		}
		s.other = &other
	}
	if !s.shape.inRange() || s.level.tokens > s.shape.burst || s.level.frac >= s.shape.p ||
		s.level.tokens == s.shape.burst && s.level.frac > 0 || s.at >= 1<<53 {
		return state{}, errInvalid
	}
	return s, nil
}

// inRange reports whether the numbers of a stored shape are ones that a Bucket
// can have.
func (b Bucket) inRange() bool {
	return b.burst >= 1 && b.burst <= MaxTokens && b.n >= 1 && b.n <= MaxTokens*minP &&
		b.p >= minP && b.p <= maxPeriod.Microseconds()
}
