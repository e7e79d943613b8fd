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

// serverClock is the last line of the script. take.lua depends on the time only
// through the argument of take, and this line asks Redis for it, once.
const serverClock = "local t = redis.call('TIME') return take(t[1] * 1000000 + t[2])\n"

// script is a Lua script, and the SHA-1 hash by which Redis knows it.
type script struct{ text, sha string }

// newScript returns take.lua with a last line, clock, that calls take.
func newScript(clock string) script {
	s := script{text: takeLua + clock}
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
	reply, err := r.run(ctx, on, takeArgs(batch)...)
	if err != nil {
		return err
	}
	return deal(reply, batch)
}

// takeArgs returns the arguments of the script: the number of keys, the keys,
// the packed charges and settlements, and random bytes if a charge holds.
func takeArgs(batch []*pending) []any {
	var keys, size int
	holds := false
	for _, t := range batch {
		keys, size = keys+len(t.keys), size+len(t.packed)
		holds = holds || t.holds
	}
	args := make([]any, 0, keys+3)
	packed := make([]byte, 0, size)
	args = append(args, keys)
	for _, t := range batch {
		for i := range t.keys {
			args = append(args, &t.keys[i])
		}
		packed = append(packed, t.packed...)
	}
	args = append(args, packed)
	if holds {
		birth := newBirth()
		args = append(args, birth[:])
	}
	return args
}

// deal sets for each take its part of a reply.
func deal(reply string, batch []*pending) error {
	if len(reply) < instantSize {
		return errReply
	}
	at, rest := int64(bigEndian(reply[:instantSize])), reply[instantSize:]
	for _, t := range batch {
		if len(rest) < t.replySize {
			return errReply
		}
		t.at, t.reply, rest = at, rest[:t.replySize], rest[t.replySize:]
	}
	if rest != "" {
		return errReply
	}
	return nil
}

const (
	chargeSize  = 22 // bytes of one packed charge, CHARGE_SIZE in the script
	instantSize = 7  // of the reply's beginning
	verdictSize = 15 // of the reply to one charge or settlement
	holdSize    = 18 // of what follows the reply to a charge that holds
)

// processor is a client of the library, or a connection.
type processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

// run calls the script with its arguments, the number of keys first, and returns
// the reply.
func (r *Redis) run(ctx context.Context, to processor, args ...any) (string, error) {
	cmd := once{redis.NewStringCmd(ctx, append([]any{"evalsha", r.script.sha}, args...)...)}
	err := to.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		// The script was flushed, or Redis is a new one: nothing was executed.
		// EVAL executes and loads it, so that this ends however often the
		// scripts are flushed.
		cmd = once{redis.NewStringCmd(ctx, append([]any{"eval", r.script.text}, args...)...)}
		err = to.Process(ctx, cmd)
	}
	if err != nil {
		return "", err
	}
	return cmd.Val(), nil
}

// The options of a charge in the script. The first three say when it vetoes the
// other charges of its request, which are then not taken.
const (
	vetoAlways    = iota // if this one is denied or fails
	vetoDenial           // only if it is denied: if it fails, the request passes or may pass
	vetoNever            // never: a shadow charge
	lastOfRequest = 4    // added for the last charge of a request
	holdsCost     = 8    // added if the cost is held; the life follows
	isSettlement  = 16   // not a charge, but a settlement
	ofQuota       = 32   // added for a quota: its window is in the place of the rate
)

// appendCharge appends a packed charge. guess is the window of a quota, and ignored
// for all others.
func appendCharge(b []byte, c *Charge, isLast bool, guess window) []byte {
	options := byte(vetoAlways)
	switch {
	case c.Limit.Shadow:
		options = vetoNever
	case c.Limit.OnFailure != Deny && c.Limit.OnFailure != Local:
		options = vetoDenial
	}
	if isLast {
		options += lastOfRequest
	}
	life := c.life()
	if life > 0 {
		options += holdsCost
	}
	shape := c.Bucket
	if shape.IsQuota() {
		options += ofQuota
		shape.n = max(0, guess.start)
		shape.p = guess.end - shape.n
	}
	b = appendShape(append(b, options), shape)
	// All costs above the burst are denied alike.
	b = binary.BigEndian.AppendUint32(b, uint32(c.needs()))
	if life > 0 {
		var eight [8]byte
		binary.BigEndian.PutUint64(eight[:], uint64(life.Microseconds()))
		b = append(b, eight[3:]...)
	}
	return b
}

func appendSettlement(b []byte, s *Settlement) []byte {
	b = binary.BigEndian.AppendUint32(append(b, isSettlement), uint32(s.Hold.Tokens))
	// No level pays a surcharge of two bursts.
	b = binary.BigEndian.AppendUint32(b, uint32(min(s.Cost, s.Hold.Tokens+2*MaxTokens)))
	b = append(b, s.Hold.birth[:]...)
	b = binary.BigEndian.AppendUint32(b, s.Hold.slice)
	return binary.BigEndian.AppendUint16(b, s.Hold.index)
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

// The flags of the reply to a charge.
const (
	flagAllowed = 1 << iota // the bucket held the cost
	flagTaken               // the cost was taken
	flagInvalid             // the stored state was invalid, and counts as empty
	flagFailed              // there is no verdict; in the reply to a settlement, too
	flagWindow              // the guessed window is wrong: nothing of the request was taken
)

// The flags of the reply to a settlement.
const (
	flagKnown    = 1 << iota // the bucket knew the hold
	flagRepeated             // it had been settled before
	flagLate                 // it had ended by itself
)

var errReply = errors.New("invalid reply from the script: truncated, or not from sluice's script")

// read fills verdicts from the script's reply to charges at an instant.
func (r *Redis) read(at int64, reply string, charges []Charge, verdicts []Verdict) error {
	for i := range charges {
		c := &charges[i]
		size, holds := verdictSize, c.life() > 0
		if holds {
			size += holdSize
		}
		if len(reply) < size {
			return errReply
		}
		flags, rest, more := reply[0], reply[1:verdictSize], reply[verdictSize:size]
		reply = reply[size:]
		if flags&flagFailed != 0 {
			verdicts[i] = Verdict{Err: r.bucketError(strings.TrimRight(rest, " "))}
			continue
		}
		if flags&flagWindow != 0 {
			verdicts[i] = Verdict{at: int64(bigEndian(rest[:7])), wrongWindow: true}
			if c.HoldFor > 0 {
				verdicts[i].Expired = int(bigEndian(more[14:]))
			}
			continue
		}
		before := level{tokens: int64(int32(bigEndian(rest[:4]))), frac: int64(bigEndian(rest[4:10]))}
		if before.tokens > c.Bucket.burst || before.frac >= c.Bucket.p && !c.Bucket.IsQuota() {
			return errReply
		}
		var cost int64
		if flags&flagTaken != 0 {
			cost = c.Cost
		}
		if flags&flagInvalid != 0 {
			r.errors[KindState].Inc()
			r.log.Warn("invalid bucket state in Redis, treating the bucket as empty",
				zap.String("limit", c.Limit.Name), zap.String("domain", c.Limit.Domain))
		}
		verdicts[i] = c.verdict(before, int64(bigEndian(rest[10:])), cost, RedisSource)
		v := &verdicts[i]
		v.at, v.taken = at, flags&flagTaken != 0
		if holds {
			v.Hold = readHold(more[:14], c.Cost)
		}
		if c.HoldFor > 0 {
			v.Expired = int(bigEndian(more[14:]))
		}
	}
	if reply != "" {
		return errReply
	}
	return nil
}

// readHold returns the hold of some tokens that the script's reply names; zero if
// it names none.
func readHold(name string, tokens int64) (h Hold) {
	copy(h.birth[:], name)
	if h.IsZero() {
		return Hold{}
	}
	h.Tokens, h.slice, h.index = tokens, uint32(bigEndian(name[8:12])), uint16(bigEndian(name[12:]))
	return h
}

// readSettled fills results from the script's reply to settlements.
func (r *Redis) readSettled(reply string, settlements []Settlement, results []Settled) error {
	if len(reply) != verdictSize*len(settlements) {
		return errReply
	}
	for i := range settlements {
		flags, rest := reply[0], reply[1:verdictSize]
		reply = reply[verdictSize:]
		if flags&flagFailed != 0 {
			results[i] = Settled{Err: r.bucketError(strings.TrimRight(rest, " "))}
			continue
		}
		s := Settled{
			Known:      flags&flagKnown != 0,
			Repeated:   flags&flagRepeated != 0,
			Late:       flags&flagLate != 0,
			Returned:   int64(bigEndian(rest[:4])),
			Surcharged: int64(bigEndian(rest[4:8])),
			Expired:    int(bigEndian(rest[8:])),
		}
		if s.Known && !s.Repeated {
			s.Forgiven = max(0, settlements[i].Cost-settlements[i].Hold.Tokens) - s.Surcharged
		}
		results[i] = s
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
