package limiter

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

//go:embed take.lua
var takeLua string

// serverClock is the last line of a script. The functions of take.lua depend on
// the time only through their argument, and this line asks Redis for it, once.
// %s is the function: take or refund.
const serverClock = "local t = redis.call('TIME') return %s(t[1] * 1000000 + t[2])\n"

// script is a Lua script, and the SHA-1 hash by which Redis knows it.
type script struct{ text, sha string }

// newScript returns take.lua with a last line, clock, that calls a function of
// it.
func newScript(function, clock string) script {
	s := script{text: takeLua + fmt.Sprintf(clock, function)}
	sum := sha1.Sum([]byte(s.text))
	s.sha = hex.EncodeToString(sum[:])
	return s
}

// once is a command that the library never sends twice, whatever its retry
// settings, on any kind of client: Redis may have executed a script whose
// answer was late or was cut off.
type once struct{ *redis.StringCmd }

// NoRetry tells the library not to send the command again.
func (once) NoRetry() bool { return true }

// call calls the script for takes of one slot.
func (r *Redis) call(ctx context.Context, on processor, batch []*pending) error {
	r.batches.Observe(float64(len(batch)))
	reply, err := r.run(ctx, on, &r.takeScript, takeArgs(batch)...)
	if err != nil {
		return err
	}
	return deal(reply, batch)
}

// takeArgs returns the arguments of the script: the number of keys, the keys,
// and the packed charges.
func takeArgs(batch []*pending) []any {
	var keys, size int
	for _, t := range batch {
		keys, size = keys+len(t.keys), size+len(t.packed)
	}
	args := make([]any, 0, keys+2)
	packed := make([]byte, 0, size)
	args = append(args, keys)
	for _, t := range batch {
		for i := range t.keys {
			args = append(args, &t.keys[i])
		}
		packed = append(packed, t.packed...)
	}
	return append(args, packed)
}

// deal sets for each take its part of a reply.
func deal(reply string, batch []*pending) error {
	if len(reply) < instantSize {
		return errReply
	}
	at, rest := int64(bigEndian(reply[:instantSize])), reply[instantSize:]
	for _, t := range batch {
		size := verdictSize * len(t.keys)
		if len(rest) < size {
			return errReply
		}
		t.at, t.reply, rest = at, rest[:size], rest[size:]
	}
	if rest != "" {
		return errReply
	}
	return nil
}

const (
	chargeSize  = 22 // bytes of one packed charge, CHARGE_SIZE in the script
	instantSize = 7  // of the reply's beginning
	verdictSize = 11 // of the reply to one charge
)

// processor is a client of the library, or a connection.
type processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

// run calls a script with its arguments, the number of keys first, and returns
// the reply.
func (r *Redis) run(ctx context.Context, to processor, s *script, args ...any) (string, error) {
	cmd := once{redis.NewStringCmd(ctx, append([]any{"evalsha", s.sha}, args...)...)}
	err := to.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		// The script was flushed, or Redis is a new one: nothing was executed.
		// EVAL executes and loads it, so that this ends however often the
		// scripts are flushed.
		cmd = once{redis.NewStringCmd(ctx, append([]any{"eval", s.text}, args...)...)}
		err = to.Process(ctx, cmd)
	}
	if err != nil {
		return "", err
	}
	return cmd.Val(), nil
}

// The values of hold in the script: it says when a charge holds back the other
// charges of its request, which are then not taken.
const (
	holdAlways = iota // if this one is denied or fails
	holdDenial        // only if it is denied: if it fails, the request passes or may pass
	holdNever         // never: a shadow charge
)

// lastOfRequest is added to the hold of the last charge of a request.
const lastOfRequest = 4

func appendCharge(b []byte, c *Charge, isLast bool) []byte {
	hold := byte(holdAlways)
	switch {
	case c.Limit.Shadow:
		hold = holdNever
	case c.Limit.OnFailure != Deny:
		hold = holdDenial
	}
	b = appendShape(b, c.Bucket)
	// All costs above the burst are denied alike.
	b = binary.BigEndian.AppendUint32(b, uint32(c.needs()))
	if isLast {
		hold += lastOfRequest
	}
	return append(b, hold)
}

// appendShape appends the packed shape of a bucket: n, p and burst.
func appendShape(b []byte, shape Bucket) []byte {
	b = append56(b, uint64(shape.n))
	var eight [8]byte
	binary.BigEndian.PutUint64(eight[:], uint64(shape.p))
	b = append(b, eight[2:]...)
	return binary.BigEndian.AppendUint32(b, uint32(shape.burst))
}

// append56 appends a number below 2^56.
func append56(b []byte, v uint64) []byte {
	var eight [8]byte
	binary.BigEndian.PutUint64(eight[:], v)
	return append(b, eight[1:]...)
}

// The flags of the reply.
const (
	flagAllowed = 1 << iota // the bucket held the cost
	flagTaken               // the cost was taken
	flagInvalid             // the stored state was invalid, and counts as empty
	flagFailed              // there is no verdict
)

var errReply = errors.New("invalid reply from the script: truncated, or not from sluice's script")

// read fills verdicts from the script's reply to charges at an instant.
func (r *Redis) read(at int64, reply string, charges []Charge, verdicts []Verdict) error {
	if len(reply) != verdictSize*len(charges) {
		return errReply
	}
	for i := range charges {
		flags, rest := reply[0], reply[1:verdictSize]
		reply = reply[verdictSize:]
		if flags&flagFailed != 0 {
			verdicts[i] = Verdict{Err: r.bucketError(strings.TrimRight(rest, " "))}
			continue
		}
		before := level{tokens: int64(bigEndian(rest[:4])), frac: int64(bigEndian(rest[4:]))}
		b := charges[i].Bucket
		if before.tokens > b.burst || before.frac >= b.p {
			return errReply
		}
		var cost int64
		if flags&flagTaken != 0 {
			cost = charges[i].Cost
		}
		if flags&flagInvalid != 0 {
			r.errors[KindState].Inc()
			r.log.Warn("invalid bucket state in Redis, treating the bucket as empty",
				zap.String("limit", charges[i].Limit.Name), zap.String("domain", charges[i].Limit.Domain))
		}
		verdicts[i] = b.verdict(before, charges[i].needs(), cost, RedisSource)
		verdicts[i].at, verdicts[i].taken = at, flags&flagTaken != 0
	}
	return nil
}

// bucketError counts and returns the error of one bucket, by the code that
// Redis or the script gave for it.
func (r *Redis) bucketError(code string) *StoreError {
	e := &StoreError{Kind: kindOfCode(code), Err: fmt.Errorf("one bucket: %s", code)}
	if code == "NEWER" {
		e.Err = errors.New("one bucket: stored by a newer version")
	}
	r.errors[e.Kind].Inc()
	return e
}

func bigEndian(s string) (v uint64) {
	for i := range len(s) {
		v = v<<8 | uint64(s[i])
	}
	return v
}
