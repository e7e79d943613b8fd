package limiter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"go.uber.org/zap"
)

// The library logs to stderr, for example each failed dial. It returns the same
// errors, so its log is off.
func init() { logging.Disable() }

// Redis is the Store that all sidecars share. It is safe for concurrent use.
// The failure mode Local needs a Fallback over it; without one a limit of this
// mode fails closed.
type Redis struct {
	client   redis.UniversalClient
	cluster  *redis.ClusterClient // client if mode is cluster, else nil
	options  RedisOptions
	login    atomic.Pointer[RedisOptions] // credentials of new connections
	timeout  time.Duration
	hurried  sync.Once // warns once of callers whose deadlines are before the timeout
	script   script
	log      *zap.Logger
	seconds  prometheus.Histogram
	batches  prometheus.Histogram
	errors   map[ErrorKind]prometheus.Counter
	nodes    sync.Map // from address to *node, one for each master
	breakers prometheus.GaugeFunc
	unknown  breaker // of asking which node has which of a cluster's slots
	// slotsKnown is set once that was answered. The library then always has an
	// answer, and refreshes it in the background.
	slotsKnown atomic.Bool
	settling   chan struct{} // bounds the requests whose own holds are being settled
	// wall is this machine's clock in microseconds since 1970, by which the windows
	// of quotas are guessed.
	wall func() int64
}

var _ Store = (*Redis)(nil)

// NewRedis returns a store on the Redis that o names, without connecting yet.
// Its error is that of o.Validate. A nil log logs nothing. Close it after use.
func NewRedis(o RedisOptions, log *zap.Logger, metrics prometheus.Registerer) (*Redis, error) {
	return newRedis(o, serverClock, log, metrics)
}

// newRedis is NewRedis with another last line of the script: tests pass the
// instant themselves.
func newRedis(o RedisOptions, clock string, log *zap.Logger, metrics prometheus.Registerer) (*Redis, error) {
	c, err := o.universal()
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = zap.NewNop()
	}
	r := &Redis{
		options:  o,
		timeout:  o.Timeout,
		settling: make(chan struct{}, maxSettling),
		wall:     func() int64 { return time.Now().UnixMicro() },
		script:   newScript(clock),
		log:      log,
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sluice_store_seconds",
			Help:    "Time that a take from Redis took in seconds, failed ones included.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		batches: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sluice_store_batch_size",
			Help:    "Number of takes that one call of the script carried; the settlements of one slot count as one.",
			Buckets: []float64{1, 2, 4, 8, 16, 32, 64, 128},
		}),
		errors: make(map[ErrorKind]prometheus.Counter, len(errorKinds)),
	}
	r.breakers = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sluice_store_breaker_open", Help: "Number of Redis nodes whose circuit breaker is open.",
	}, func() float64 { return float64(r.Unreachable()) })
	if err := r.SetCredentials(o); err != nil {
		return nil, err
	}
	c.CredentialsProviderContext = func(context.Context) (username, password string, err error) {
		login := r.login.Load()
		username, password = credentials(login.Username, login.Password)
		return username, password, nil
	}
	r.client = o.open(c)
	r.cluster, _ = r.client.(*redis.ClusterClient)
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_store_errors_total",
		Help: "Total number of takes and settlements that Redis failed and of invalid bucket states, by kind. " +
			"Takes whose callers hung up are not counted.",
	}, []string{"kind"})
	for _, k := range errorKinds {
		r.errors[k] = vec.WithLabelValues(string(k))
	}
	metrics.MustRegister(r.seconds, r.batches, r.breakers, vec)
	return r, nil
}

// SetCredentials sets the username and the password of all new connections to
// those of o, so that a password can change without a restart. The other fields
// of o are ignored, but its error is that of o.Validate.
func (r *Redis) SetCredentials(o RedisOptions) error {
	c, err := o.universal()
	if err != nil {
		return err
	}
	r.login.Store(&RedisOptions{Username: c.Username, Password: c.Password})
	r.nodes.Range(func(_, n any) bool {
		n.(*node).retry()
		return true
	})
	return nil
}

// Run keeps connections ready until ctx ends.
func (r *Redis) Run(ctx context.Context) {
	tick := time.NewTicker(refreshesEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		ask, cancel := context.WithTimeout(ctx, connectTimeout)
		var mu sync.Mutex
		masters := map[string]bool{}
		_ = r.eachMaster(ask, func(ctx context.Context, client *redis.Client) error {
			n := r.nodeFor(client)
			mu.Lock()
			masters[r.addressOf(client)] = true
			mu.Unlock()
			n.refresh(ctx)
			return nil
		}) // what fails here fails for takes too, which say so
		cancel()
		r.forget(masters)
	}
}

// forget drops nodes that are no longer masters; in Kubernetes a replaced node
// never gets its address back. It does nothing if masters is empty, because the
// topology is then unknown.
func (r *Redis) forget(masters map[string]bool) {
	if len(masters) == 0 {
		return
	}
	r.nodes.Range(func(address, n any) bool {
		if address != "" && !masters[address.(string)] {
			r.nodes.Delete(address)
			n.(*node).close()
		}
		return true
	})
}

// Close ends all connections.
func (r *Redis) Close() error {
	r.nodes.Range(func(_, n any) bool {
		n.(*node).close()
		return true
	})
	return r.client.Close()
}

// Ping returns nil if Redis answers by the deadline of ctx, and opens the
// connections that takes need. Connecting goes on after the deadline, for the
// next Ping. On a cluster it asks all masters. Its error is a *StoreError.
func (r *Redis) Ping(ctx context.Context) error {
	err := r.eachMaster(ctx, func(ctx context.Context, client *redis.Client) error { return r.nodeFor(client).warm(ctx) })
	if err != nil {
		return r.options.explain(r.located(err))
	}
	return nil
}

// Unreachable returns the number of nodes that left several calls in a row
// unanswered, and have not answered since (those with an open circuit breaker).
// It asks no node.
func (r *Redis) Unreachable() (nodes int) {
	r.nodes.Range(func(_, n any) bool {
		if n.(*node).isOpen() {
			nodes++
		}
		return true
	})
	return nodes
}

// refreshesEvery is how often connections are checked and renewed.
const refreshesEvery = time.Second

// eachMaster calls do for each node that takes go to.
func (r *Redis) eachMaster(ctx context.Context, do func(context.Context, *redis.Client) error) error {
	if r.cluster != nil {
		return r.cluster.ForEachMaster(ctx, do)
	}
	return do(ctx, r.client.(*redis.Client))
}

// deadlineMargin is how long before its caller's deadline a take ends, so that
// the answer arrives in time.
const deadlineMargin = 5 * time.Millisecond

// Take is Store's. It makes one round trip, which it may share with other
// takes; on a cluster one for each hash slot, all at once. It ends within the
// store's timeout, and deadlineMargin before the caller's deadline.
func (r *Redis) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	defer r.observe(time.Now())
	deadline := r.deadline(ctx)
	if r.cluster != nil {
		r.takeCluster(ctx, deadline, charges, verdicts)
		return
	}
	r.takeSlot(ctx, deadline, charges, verdicts)
}

// observe records how long a take took that began at start.
func (r *Redis) observe(start time.Time) { r.seconds.Observe(time.Since(start).Seconds()) }

// deadline returns when a take that begins now has to have ended.
func (r *Redis) deadline(ctx context.Context) time.Time {
	now := time.Now()
	deadline := now.Add(r.timeout)
	if d, ok := ctx.Deadline(); ok && d.Add(-deadlineMargin).Before(deadline) {
		deadline = d.Add(-deadlineMargin)
	}
	if left := deadline.Sub(now); left > 0 && left+deadlineMargin < r.timeout {
		r.hurried.Do(func() {
			r.log.Warn(
				"store.redis.timeout is longer than the caller's deadline; set it below the timeout of Envoy's ext_authz filter",
				zap.Duration("timeout", r.timeout), zap.Duration("caller", left+deadlineMargin))
		})
	}
	return deadline
}

// maxGuesses is how many times a take guesses the windows of its quotas. The first
// guess is wrong around a window's end, and the second one if another window ends
// before it arrives.
const maxGuesses = 5

// takeSlot takes from buckets that are all in one hash slot. The script takes
// from all of them or from none.
func (r *Redis) takeSlot(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	n, err := r.nodeOf(ctx, charges[0].Key)
	if err == nil && anyQuota(charges) {
		err = r.takeGuessing(ctx, n, deadline, charges, verdicts)
	} else if err == nil {
		err = r.takeOnce(ctx, n, newPending(charges, deadline, nil), charges, verdicts)
	}
	if err != nil {
		failAll(verdicts, r.failed(err))
	}
}

// takeGuessing takes charges of which some are of quotas. If a guessed window was
// wrong, which Redis says, nothing was taken, and it guesses again.
func (r *Redis) takeGuessing(
	ctx context.Context, n *node, deadline time.Time, charges []Charge, verdicts []Verdict,
) error {
	guesses, expired := make([]int64, len(charges)), make([]int, len(charges))
	for i, now := 0, r.wall()+n.ahead.Load(); i < len(guesses); i++ {
		guesses[i] = now
	}
	for range maxGuesses {
		t := newPending(charges, deadline, guesses)
		if err := r.takeOnce(ctx, n, t, charges, verdicts); err != nil {
			return err
		}
		wrong := false
		for i := range verdicts {
			v := &verdicts[i]
			expired[i] += v.Expired
			v.Expired = expired[i]
			if v.wrongWindow {
				wrong, guesses[i] = true, v.at
			}
		}
		if !wrong {
			return nil
		}
	}
	return errGuesses
}

// errGuesses is the error of a take whose last guess was wrong, too.
var errGuesses = &StoreError{
	Kind: KindState,
	Err: errors.New("no guess of a quota's window was right: " +
		"does Redis's clock leap, or does another program change the bucket?"),
}

// takeOnce takes charges from one node, and recycles t.
func (r *Redis) takeOnce(ctx context.Context, n *node, t *pending, charges []Charge, verdicts []Verdict) error {
	abandoned, err := n.do(ctx, t)
	if err == nil {
		if t.guesses {
			n.ahead.Store(t.at - r.wall())
		}
		err = r.read(t.at, t.reply, charges, verdicts)
	}
	if !abandoned {
		if size, ok := ctx.Value(batchSize{}).(*atomic.Int32); ok {
			size.Store(int32(t.batch))
		}
		t.recycle()
	}
	return err
}

func anyQuota(charges []Charge) bool {
	for i := range charges {
		if charges[i].Bucket.IsQuota() {
			return true
		}
	}
	return false
}

// failed returns an error of a take or a settlement as a StoreError, and counts
// it.
func (r *Redis) failed(err error) *StoreError {
	failed := r.options.explain(err)
	if !errors.Is(failed, context.Canceled) { // the caller hung up: nothing is known of Redis
		r.errors[failed.Kind].Inc()
	}
	return failed
}

// batchSize is the context key of WithBatchSize.
type batchSize struct{}

// WithBatchSize returns a context with which the Take of a Redis stores in size
// how many takes shared its call, itself included; on a cluster, of one of its
// calls. If Take makes no call it leaves size as it is.
func WithBatchSize(ctx context.Context, size *atomic.Int32) context.Context {
	return context.WithValue(ctx, batchSize{}, size)
}

// nodeOf returns the node that a key is on. Outside a cluster there is one
// node, with an empty address.
func (r *Redis) nodeOf(ctx context.Context, key string) (*node, error) {
	if r.cluster == nil {
		if known, ok := r.nodes.Load(""); ok {
			return known.(*node), nil
		}
		return r.nodeFor(r.client.(*redis.Client)), nil
	}
	if err := r.unknown.admit(); err != nil {
		return nil, err
	}
	master, err := r.masterFor(ctx, key)
	if err != nil {
		failed := r.options.explain(r.located(err))
		_ = r.unknown.failed(failed)
		return nil, failed
	}
	r.unknown.answered()
	return r.nodeFor(master), nil
}

// masterFor returns the library's client of a key's node on a cluster, by the
// deadline of ctx. Until the library knows which node has which slots it asks
// one after another, and nodes that hang may keep it longer than that.
func (r *Redis) masterFor(ctx context.Context, key string) (*redis.Client, error) {
	if r.slotsKnown.Load() {
		return r.cluster.MasterForKey(ctx, key)
	}
	type found struct {
		client *redis.Client
		err    error
	}
	ready := make(chan found, 1)
	go func() {
		client, err := r.cluster.MasterForKey(ctx, key)
		if err == nil {
			r.slotsKnown.Store(true)
		}
		ready <- found{client, err}
	}()
	select {
	case f := <-ready:
		return f.client, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// addressOf returns the address of a client's node, by which a cluster's nodes
// are known; empty outside a cluster.
func (r *Redis) addressOf(client *redis.Client) string {
	if r.cluster == nil {
		return ""
	}
	return client.Options().Addr
}

// nodeFor returns the node of a client of the library, and makes it if it is
// new.
func (r *Redis) nodeFor(client *redis.Client) *node {
	address := r.addressOf(client)
	if known, ok := r.nodes.Load(address); ok {
		n := known.(*node)
		if n.client.Load() != client {
			n.client.Store(client) // the library has made another for the same address
		}
		return n
	}
	n := &node{name: r.nameOf(client), call: r.send}
	n.client.Store(client)
	n.dial = func(ctx context.Context) (*connection, error) { return r.connect(ctx, n.client.Load()) }
	made, _ := r.nodes.LoadOrStore(address, n)
	return made.(*node)
}

// nameOf returns the name of a server in errors.
func (r *Redis) nameOf(client *redis.Client) string {
	if r.options.Mode == Sentinel {
		return "the master " + r.options.Master
	}
	return client.Options().Addr
}

// connect makes a connection for takes, and loads the script over it.
func (r *Redis) connect(ctx context.Context, client *redis.Client) (*connection, error) {
	on := &connection{Conn: client.EphemeralConn(), address: client.Options().Addr}
	err := on.Time(ctx).Err() // every user with the right to take has the right to TIME
	if redis.HasErrorPrefix(err, "unknown command") {
		if role, ofErr := on.Do(ctx, "ROLE").Slice(); ofErr == nil && len(role) > 0 && role[0] == "sentinel" {
			err = errIsSentinel
		}
	}
	if err == nil {
		began := time.Now()
		// Without a key the script returns an error, but Redis then has it, so
		// that the first take need not send its text.
		if _, err = r.run(ctx, on, 0); on.isUsable(err) {
			err = nil
		}
		on.opened = time.Now()
		on.used, on.latency = on.opened, on.opened.Sub(began)
	}
	if err != nil {
		_ = on.Close()
		if name := r.nameOf(client); !strings.Contains(err.Error(), name) {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return nil, r.options.explain(err)
	}
	return on, nil
}

// send calls the script for a batch of takes: once, or on a cluster once for
// each slot, all at once. Its error is that of all takes without an answer, or
// the first error of the takes of one slot.
func (r *Redis) send(ctx context.Context, on *connection, batch []*pending) error {
	if r.cluster == nil {
		return r.call(ctx, on, batch)
	}
	return r.callSlots(ctx, on, batch)
}
