package limiter

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"go.uber.org/zap"
)

// The library writes lines of its own to stderr, one for each dial that failed. All that it says there it returns too.
func init() { logging.Disable() }

//go:embed take.lua
var takeLua string

// serverClock is the script's last line: what it does is a function of the instant, and this asks Redis for it, once. %s is take or
// give.
const serverClock = "local t = redis.call('TIME') return %s(t[1] * 1000000 + t[2])\n"

// script is a text that Redis runs, and knows by its hash.
type script struct{ text, sha string }

// newScript has the function of take.lua that is called, and the last line that calls it.
func newScript(function, clock string) script {
	s := script{text: takeLua + fmt.Sprintf(clock, function)}
	sum := sha1.Sum([]byte(s.text))
	s.sha = hex.EncodeToString(sum[:])
	return s
}

// Redis is the Store that all sidecars share. It is safe for concurrent use.
type Redis struct {
	client   redis.UniversalClient
	cluster  *redis.ClusterClient         // the client, where it is a cluster's; else nil
	login    atomic.Pointer[RedisOptions] // whose username and password new connections use
	timeout  time.Duration
	take     script
	give     script
	log      *zap.Logger
	seconds  prometheus.Histogram
	errors   map[ErrorKind]prometheus.Counter
	breakers *breakers
	local    *Memory // in Redis's place, for the limits that say so
}

var _ Store = (*Redis)(nil)

// NewRedis returns a store on the Redis that o names, without asking it anything yet. A nil log logs nothing. Close it
// after use.
func NewRedis(o RedisOptions, log *zap.Logger, metrics prometheus.Registerer) (*Redis, error) {
	return newRedis(o, serverClock, log, metrics)
}

// newRedis has the script's last line from its caller: tests pass the instant themselves.
func newRedis(o RedisOptions, clock string, log *zap.Logger, metrics prometheus.Registerer) (*Redis, error) {
	c, err := o.universal()
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = zap.NewNop()
	}
	r := &Redis{
		timeout: o.Timeout,
		take:    newScript("take", clock),
		give:    newScript("give", clock),
		log:     log,
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sluice_store_seconds",
			Help:    "How long Redis took to answer a take, in seconds, failed ones included.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		errors: make(map[ErrorKind]prometheus.Counter, len(ErrorKinds)),
	}
	r.breakers = newBreakers(metrics)
	start := time.Now()
	r.local = newMemory("local", MaxBuckets(), func() int64 { return time.Since(start).Microseconds() }, log, metrics)
	if err := r.UseLogin(o); err != nil {
		return nil, err
	}
	c.CredentialsProviderContext = func(context.Context) (username, password string, err error) {
		login := r.login.Load()
		return login.Username, login.Password, nil
	}
	r.client = o.open(c)
	r.cluster, _ = r.client.(*redis.ClusterClient)
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_store_errors_total",
		Help: "Takes that Redis did not answer for, and stored states that made no sense, by kind.",
	}, []string{"kind"})
	for _, k := range ErrorKinds {
		r.errors[k] = vec.WithLabelValues(string(k))
	}
	metrics.MustRegister(r.seconds, vec)
	return r, nil
}

// UseLogin takes the username and the password of o for all connections from now on, so that a password can change without a
// restart. The rest of o is of no meaning; it reports where o is not valid.
func (r *Redis) UseLogin(o RedisOptions) error {
	c, err := o.universal()
	if err != nil {
		return err
	}
	r.login.Store(&RedisOptions{Username: c.Username, Password: c.Password})
	return nil
}

// Run sweeps what is kept in this process for outages, until ctx ends.
func (r *Redis) Run(ctx context.Context) { r.local.Run(ctx) }

// Close ends all connections.
func (r *Redis) Close() error { return r.client.Close() }

// Ping asks whether Redis answers, by the deadline of ctx. Its error is a *StoreError. A user who may not ask gets an answer,
// too: what takes need is the right to scripts.
func (r *Redis) Ping(ctx context.Context) error {
	if err := r.client.Ping(ctx).Err(); err != nil && !redis.HasErrorPrefix(err, "NOPERM") {
		return storeError(err)
	}
	return nil
}

// once is a command that the library never sends twice, whatever its retry settings, on any kind of client: Redis may have
// executed a script whose answer was late or was cut off.
type once struct{ *redis.StringCmd }

// NoRetry is what the library asks.
func (once) NoRetry() bool { return true }

// deadlineMargin is what a take leaves of its caller's time for the answer's own way.
const deadlineMargin = 5 * time.Millisecond

// Take is Store's, in one round trip; on a cluster in one for each hash slot, all at once. It ends within the store's timeout, and
// deadlineMargin before the caller's deadline.
func (r *Redis) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	start := time.Now()
	deadline := start.Add(r.timeout)
	if d, ok := ctx.Deadline(); ok && d.Add(-deadlineMargin).Before(deadline) {
		deadline = d.Add(-deadlineMargin)
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	switch {
	case r.cluster != nil && len(charges) > 1 && !oneSlot(charges):
		r.takeSlots(ctx, charges, verdicts)
	case !anyLocal(charges):
		r.takeSlot(ctx, charges, verdicts, nil)
	default:
		takes := make([]taken, len(charges))
		r.takeSlot(ctx, charges, verdicts, takes)
		if r.fallBack(charges, verdicts) {
			r.takeBack(ctx, charges, verdicts, takes)
		}
	}
	r.seconds.Observe(time.Since(start).Seconds())
}

// taken is what becomes known of a take besides its verdict: whether tokens were taken, when by the node's clock, and of what.
type taken struct {
	is     bool
	at     int64 // microseconds
	before level
}

// takeSlot takes from buckets of one slot. takes may be nil.
func (r *Redis) takeSlot(ctx context.Context, charges []Charge, verdicts []Verdict, takes []taken) {
	packed := make([]byte, 0, chargeSize*len(charges))
	for i := range charges {
		packed = appendCharge(packed, &charges[i])
	}
	if failed := r.breakers.of(r.nodeOf(ctx, charges[0].Key)).run(ctx, r.timeout, func() error {
		reply, err := r.run(ctx, r.client, &r.take, charges, packed)
		if err == nil {
			err = r.read(reply, charges, verdicts, takes)
		}
		return err
	}); failed != nil {
		r.errors[failed.Kind].Inc()
		failAll(verdicts, failed)
	}
}

// nodeOf is the address of the node that a key is on, empty where there is one only, or where nobody knows.
func (r *Redis) nodeOf(ctx context.Context, key string) string {
	if r.cluster == nil {
		return ""
	}
	node, err := r.cluster.MasterForKey(ctx, key)
	if err != nil {
		return ""
	}
	return node.Options().Addr
}

// chargeSize is the length of one packed argument of the script, CHARGE_SIZE there.
const chargeSize = 22

// processor is a client, or one of a cluster's nodes.
type processor interface {
	Process(ctx context.Context, cmd redis.Cmder) error
}

// run sends a script for charges, with arguments of equal length that are packed one after another, and returns the reply.
func (r *Redis) run(ctx context.Context, to processor, s *script, charges []Charge, packed []byte) (string, error) {
	size := len(packed) / len(charges)
	args := make([]any, 3, 3+2*len(charges))
	args[0], args[1], args[2] = "evalsha", s.sha, len(charges)
	for i := range charges {
		args = append(args, charges[i].Key)
	}
	for i := range charges {
		args = append(args, packed[i*size:(i+1)*size])
	}
	cmd := once{redis.NewStringCmd(ctx, args...)}
	err := to.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		// The script was flushed, or Redis is a new one: nothing was executed. EVAL executes and loads it, so that
		// this ends however often somebody flushes.
		args[0], args[1] = "eval", s.text
		cmd = once{redis.NewStringCmd(ctx, args...)}
		err = to.Process(ctx, cmd)
	}
	if err != nil {
		return "", err
	}
	return cmd.Val(), nil
}

// What holds the other charges of a request back, as the script has it.
const (
	holdAlways = iota // a denial, or trouble
	holdDenial        // a denial only: trouble lets the request pass
	holdNever         // nothing: a shadow charge
)

func appendCharge(b []byte, c *Charge) []byte {
	hold := byte(holdAlways)
	switch {
	case c.Limit.Shadow:
		hold = holdNever
	case c.Limit.OnFailure <= Local: // what becomes of local trouble is seen when the script has answered
		hold = holdDenial
	}
	b = appendShape(b, c.Bucket)
	// Every cost above the burst is as far out of reach as the least of them.
	b = binary.BigEndian.AppendUint32(b, uint32(c.needs()))
	return append(b, hold)
}

// appendShape appends what the script has of a bucket.
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
	flagAllowed  = 1 << iota // the bucket held the cost
	flagTaken                // it was taken
	flagNonsense             // what was stored made no sense, and counts as empty
	flagTrouble              // no verdict
)

var errReply = errors.New("the script's reply is cut or is not its own")

// read fills verdicts, and takes unless it is nil, from the script's reply.
func (r *Redis) read(reply string, charges []Charge, verdicts []Verdict, takes []taken) error {
	if len(reply) < 7 {
		return errReply
	}
	at := int64(bigEndian(reply[:7]))
	reply = reply[7:]
	for i := range charges {
		if len(reply) < 2 {
			return errReply
		}
		flags := reply[0]
		if flags&flagTrouble != 0 {
			end := 2 + int(reply[1])
			if len(reply) < end {
				return errReply
			}
			code := reply[2:end]
			verdicts[i] = Verdict{Err: r.trouble(code)}
			reply = reply[end:]
			continue
		}
		if len(reply) < 11 {
			return errReply
		}
		before := level{
			tokens: int64(bigEndian(reply[1:5])),
			frac:   int64(bigEndian(reply[5:11])),
		}
		reply = reply[11:]
		b := charges[i].Bucket
		if before.tokens > b.burst || before.frac >= b.p {
			return errReply
		}
		var cost int64
		if flags&flagTaken != 0 {
			cost = charges[i].Cost
			if takes != nil {
				takes[i] = taken{true, at, before}
			}
		}
		if flags&flagNonsense != 0 {
			r.errors[KindState].Inc()
			r.log.Warn("a bucket's stored state made no sense: it is empty from now on", zap.String("limit", charges[i].Limit.Name),
				zap.String("domain", charges[i].Limit.Domain))
		}
		verdicts[i] = b.verdict(before, charges[i].needs(), cost, RedisSource)
	}
	if reply != "" {
		return errReply
	}
	return nil
}

// trouble is one bucket's error, by the code that Redis or the script gave for it.
func (r *Redis) trouble(code string) *StoreError {
	e := &StoreError{Kind: kindOfCode(code), Err: fmt.Errorf("one bucket's: %s", code)}
	if code == "NEWER" {
		e.Err = errors.New("one bucket's: stored by a newer version")
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

// storeError says of what kind an error of the library is.
func storeError(err error) *StoreError {
	var network net.Error
	var answer redis.Error
	kind := KindOther
	switch {
	case errors.Is(err, errReply):
		kind = KindScript
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		kind = KindTimeout
	case errors.Is(err, context.Canceled): // the caller is gone; nothing is wrong with Redis
	case errors.As(err, &network) && network.Timeout():
		kind = KindTimeout
	case errors.As(err, &answer):
		code, _, _ := strings.Cut(answer.Error(), " ")
		kind = kindOfCode(code)
	default: // EOF, reset, refused, TLS, closed: all that is not an answer
		kind = KindConnection
	}
	return &StoreError{Kind: kind, Err: err}
}

// kindOfCode is the kind of an error that Redis answered, by its first word.
func kindOfCode(code string) ErrorKind {
	switch strings.TrimSuffix(code, ":") {
	case "NOAUTH", "WRONGPASS", "NOPERM":
		return KindAuth
	case "READONLY", "NOREPLICAS", "MISCONF", "MASTERDOWN":
		return KindReadOnly
	case "OOM":
		return KindOOM
	case "LOADING":
		return KindLoading
	case "NEWER":
		return KindState
	case "ERR", "SLUICE", "NOSCRIPT", "BUSY", "UNKILLABLE":
		return KindScript
	}
	return KindOther
}
