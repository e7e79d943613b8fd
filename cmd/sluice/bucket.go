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

// humanTimeout is the least that a command waits for Redis: a person waits longer than a request, and from farther away.
const humanTimeout = 2 * time.Second

// openRedis opens the config's Redis for a person. The caller closes it.
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
		Short: "Look at one bucket in Redis, or refill it",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("a command is missing: get or reset")}
		},
	}
	var a askedBucket
	get := &cobra.Command{
		Use:   "get",
		Short: "Say what a bucket holds now",
		Long:  "Say what a bucket holds now. An absent bucket is a full one.",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return p.bucket(c.Context(), &a, false) },
	}
	reset := &cobra.Command{
		Use:   "reset",
		Short: "Refill a bucket",
		Long:  "Refill a bucket, by removing it: an absent bucket is a full one.",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return p.bucket(c.Context(), &a, true) },
	}
	for _, sub := range []*cobra.Command{get, reset} {
		f := sub.Flags()
		f.StringVar(&a.config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
		f.StringVar(&a.name.Limit, "limit", "", "`name` of the limit")
		f.StringArrayVar(&a.name.Parts, "key", nil, "a `part` of the key, in clear; one for each, in the file's order")
		f.StringVar(&a.name.Key, "key-hash", "", "the whole `key`, as logs and metadata show it")
		f.StringVar(&a.absent, "absent", "", "the bucket of who sends no key, or of the parts that are empty; with absent: client, of the network of this `address` (--absent=ADDRESS)")
		f.Lookup("absent").NoOptDefVal = noAddress
		outputFlag(sub, &a.output)
		c.AddCommand(sub)
	}
	return c
}

// askedBucket is which bucket is meant.
type askedBucket struct {
	config, output string
	name           policy.BucketName
	absent         string // an address, or noAddress; empty: no part is absent
}

// noAddress is what --absent is without a value.
const noAddress = "-"

// bucketState is the result, as JSON has it: tokens are whole, and reset is in seconds.
type bucketState struct {
	Limit  string `json:"limit"`
	Key    string `json:"key"`
	Exists bool   `json:"exists"`
	Tokens int64  `json:"tokens"`
	Burst  int64  `json:"burst"`
	Rate   string `json:"rate"`
	Reset  int64  `json:"reset"`
}

// bucket looks at a bucket, after it has refilled it where reset says so.
func (p *program) bucket(ctx context.Context, a *askedBucket, reset bool) error {
	asJSON, err := isJSON(a.output)
	if err != nil {
		return err
	}
	name := a.name
	switch {
	case name.Limit == "":
		return usageError{errors.New("--limit is missing: the name of a limit")}
	case name.Key != "" && (len(name.Parts) > 0 || a.absent != ""):
		return usageError{errors.New("--key-hash is the whole key; leave --key and --absent out")}
	}
	if name.Absent = a.absent != ""; a.absent != noAddress {
		name.Client = a.absent
	}
	if a.config == "" {
		a.config, _ = p.getenv("SLUICE_CONFIG")
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
		return errors.New("the config has no Redis: the buckets are in the sidecar's own process, where no other can look")
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
		Limit: name.Limit, Key: b.Key, Exists: exists, Tokens: v.Remaining, Burst: b.Charge.Bucket.Burst(), Rate: b.Rate,
		Reset: int64((v.FullAfter + time.Second - 1) / time.Second),
	}
	if asJSON {
		return p.printJSON(s)
	}
	full := "full"
	switch {
	case s.Reset > 0:
		full = fmt.Sprintf("full in %d s", s.Reset)
	case !s.Exists && !existed:
		full = "full: there is no such bucket, as it was not used or has refilled since"
	}
	_, err = fmt.Fprintf(p.stdout, "%s {%s}: %d of %d tokens, refilled at %s, %s\n", s.Limit, s.Key, s.Tokens, s.Burst, s.Rate, full)
	return err
}
