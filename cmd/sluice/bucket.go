package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// humanTimeout is the shortest timeout of a command for Redis: a person waits
// longer than a request, and may be farther away.
const humanTimeout = 2 * time.Second

// openRedis opens the config's Redis for a command. The caller closes it.
func openRedis(cfg *policy.Config) (*limiter.Redis, error) {
	o := *cfg.Redis
	o.Timeout = max(o.Timeout, humanTimeout)
	redis, err := limiter.NewRedis(o, nil, prometheus.NewRegistry())
	if err != nil {
		return nil, fmt.Errorf("store.redis: %w", err)
	}
	return redis, nil
}

func (p *program) bucketCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "bucket",
		Short: "Show or reset one bucket in Redis",
		Long: `Show or reset one bucket in Redis.

--limit names the limit, and one of these its bucket: --key once for each part of the limit's key, in clear; --key-hash
with the key as logs, metadata and sluice explain show it; or --absent for requests without a key.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q; want get or reset", args[0])
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("missing command; want get or reset")}
		},
	}
	var a bucketFlags
	get := &cobra.Command{
		Use:   "get",
		Short: "Show the tokens in a bucket",
		Long:  "Show the tokens in a bucket. A bucket that does not exist is full.",
		Args:  noArguments,
		RunE:  func(c *cobra.Command, _ []string) error { return p.bucket(c.Context(), &a, false) },
	}
	reset := &cobra.Command{
		Use:   "reset",
		Short: "Refill a bucket",
		Long:  "Refill a bucket by deleting it. A bucket that does not exist is full.",
		Args:  noArguments,
		RunE:  func(c *cobra.Command, _ []string) error { return p.bucket(c.Context(), &a, true) },
	}
	for _, sub := range []*cobra.Command{get, reset} {
		f := sub.Flags()
		f.StringVar(&a.config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
		f.StringVar(&a.name.Limit, "limit", "", "`name` of the limit")
		f.StringArrayVar(&a.name.Parts, "key", nil,
			"a `part` of the key, in clear; once for each part, in the order of the limit's key")
		f.StringVar(&a.name.Key, "key-hash", "", "the whole `key`, as logs and metadata show it")
		f.Var((*absentValue)(&a.absent), "absent",
			"the bucket of requests without a key, or without the parts whose --key is empty; "+
				"write --absent=ADDRESS where the limit has absent: client")
		f.Lookup("absent").NoOptDefVal = "true"
		outputFlag(sub, &a.output)
		c.AddCommand(sub)
	}
	return c
}

// bucketFlags are the flags of bucket get and bucket reset.
type bucketFlags struct {
	config, output string
	name           policy.BucketName
	absent         string // an address or noAddress; empty if no part is absent
}

// noAddress is bucketFlags.absent without an address.
const noAddress = "-"

// absentValue is the value of --absent. It has the type of a switch, so that its
// help does not show what stands for no address.
type absentValue string

func (v *absentValue) String() string { return string(*v) }
func (*absentValue) Type() string     { return "bool" }

// Set implements pflag.Value. Without an address the text is true.
func (v *absentValue) Set(text string) error {
	*v = absentValue(text)
	if text == "true" {
		*v = noAddress
	}
	return nil
}

// bucketState is the result, as -o json prints it. Reset is the number of seconds
// until the bucket is full, if all that is held is spent; of a quota, until its
// window ends. Quota and WindowEnds (RFC 3339) are nil if the bucket is none.
type bucketState struct {
	Limit  string `json:"limit"`
	Key    string `json:"key"`
	Exists bool   `json:"exists"`
	Tokens int64  `json:"tokens"`
	Burst  int64  `json:"burst"`
	Rate   string `json:"rate"` // empty for a quota

	Quota      *string `json:"quota"`
	WindowEnds *string `json:"window_ends"`

	Reset int64 `json:"reset"`
	Held  int64 `json:"held"`
	Owed  int64 `json:"owed"`
}

// bucket prints the state of a bucket. If reset is true it refills it first.
func (p *program) bucket(ctx context.Context, a *bucketFlags, reset bool) error {
	asJSON, err := isJSON(a.output)
	if err != nil {
		return err
	}
	name := a.name
	switch {
	case name.Limit == "":
		return usageError{errors.New("--limit: missing; want the name of a limit")}
	case name.Key != "" && (len(name.Parts) > 0 || a.absent != ""):
		return usageError{errors.New("--key-hash is the whole key; omit --key and --absent")}
	}
	if name.Absent = a.absent != ""; a.absent != noAddress {
		name.Client = a.absent
	}
	if a.config, err = p.configOrVariable(a.config); err != nil {
		return err
	}
	cfg, err := p.load(a.config, p.settings(nil)...)
	if err != nil {
		return err
	}
	b, err := cfg.Bucket(name)
	if err != nil {
		return err
	}
	if cfg.Redis == nil {
		return errors.New("the config has no store.redis: " +
			"the buckets are in the sidecar's process and cannot be read from outside")
	}
	redis, err := openRedis(cfg)
	if err != nil {
		return err
	}
	defer func() { _ = redis.Close() }()
	existed := false
	if reset {
		if existed, err = redis.Reset(ctx, b.Charge.Key); err != nil {
			return err
		}
	}
	v, exists, err := redis.Get(ctx, b.Charge)
	if err != nil {
		return err
	}
	s := bucketState{
		Limit: name.Limit, Key: b.Charge.ShownKey(), Exists: exists,
		Tokens: v.Remaining, Burst: b.Charge.Bucket.Burst(), Rate: b.Rate,
		Reset: int64((v.FullAfter + time.Second - 1) / time.Second),
		Held:  v.Held, Owed: v.Owed,
	}
	if b.Quota != "" {
		ends := time.Now().Add(v.FullAfter).Round(time.Second).UTC().Format(time.RFC3339)
		s.Quota, s.WindowEnds = &b.Quota, &ends
	}
	if asJSON {
		return p.printJSON(s)
	}
	if s.Quota != nil {
		_, err = fmt.Fprintf(p.stdout, "%s {%s}: %d of %d tokens%s, quota %s, all back in %s, at %s\n",
			s.Limit, s.Key, s.Tokens, s.Burst, heldAndOwed(s.Held, s.Owed), *s.Quota, wait(s.Reset), *s.WindowEnds)
		return err
	}
	full := "full"
	switch {
	case s.Reset > 0:
		full = "full in " + wait(s.Reset)
	case !s.Exists && !existed:
		full = "full: the bucket does not exist, because it was not used or has refilled"
	}
	_, err = fmt.Fprintf(p.stdout, "%s {%s}: %d of %d tokens%s, refilled at %s, %s\n",
		s.Limit, s.Key, s.Tokens, s.Burst, heldAndOwed(s.Held, s.Owed), s.Rate, full)
	return err
}
