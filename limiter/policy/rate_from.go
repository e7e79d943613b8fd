package policy

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"cel.dev/cel-go/common/types"

	"github.com/sluiceproxy/sluice/limiter"
)

// rateFrom is the field rate_from of a limit: the rate that a request brings, such
// as in a claim.
type rateFrom struct {
	expression *expression
	max        string // max_rate, as the config writes it
	// tokens each period is the most that a request may bring.
	tokens int64
	period time.Duration
	// own is the period of a rate that is a number alone.
	own time.Duration
	// burst is that of the limit; 0: the tokens of the rate, and at most those of
	// max_rate.
	burst int64
}

// broughtRate is the rate that a request has brought.
type broughtRate struct {
	isKnown bool // the request has one
	isCut   bool // it was above max_rate
	tokens  int64
	period  time.Duration // with tokens; both are 0 if the rate is none
}

// String returns the rate as the config would write it.
func (b broughtRate) String() string {
	if b.tokens == 0 {
		return noneRate
	}
	unit := DurationText(b.period)
	for short, period := range map[string]time.Duration{
		"d": 24 * time.Hour, "h": time.Hour, "m": time.Minute, "s": time.Second, "ms": time.Millisecond,
	} {
		if b.period == period {
			unit = short
		}
	}
	return fmt.Sprintf("%d/%s", b.tokens, unit)
}

// errNoRate is the mistake of a config by which a request brings something else
// than a rate. It does not quote that, which the client may have sent.
var errNoRate = errors.New(`must be a rate such as "600/m", a number >= 0, "unlimited" or "none"`)

// longestRate is the maximum length of a rate's text in bytes.
const longestRate = 64

// evaluate returns the rate that a request brings.
func (r *rateFrom) evaluate(s *subject) (b broughtRate, err error) {
	v, err := r.expression.eval(s)
	if err != nil || v == nil {
		return b, err
	}
	b.isKnown = true
	switch v := v.(type) {
	case types.String:
		b.tokens, b.period, err = r.parse(strings.TrimSpace(string(v)))
	case types.Int:
		b.tokens, b.period = int64(v), r.own
	case types.Uint:
		b.tokens, b.period = int64(min(uint64(v), math.MaxInt64)), r.own
	case types.Double:
		b.tokens, b.period, err = r.number(float64(v))
	default:
		err = errNoRate
	}
	switch {
	case err != nil || b.tokens < 0:
		return b, errNoRate
	case b.tokens == 0:
		b.period = 0
	case exceeds(b.tokens, b.period, r.tokens, r.period):
		b.tokens, b.period, b.isCut = r.tokens, r.period, true
	}
	return b, nil
}

// number returns the rate of a number of tokens each period of the limit's own
// rate, rounded down.
func (r *rateFrom) number(f float64) (int64, time.Duration, error) {
	if !(f >= 0) { // NaN, too
		return 0, 0, errNoRate
	}
	return int64(min(math.Floor(f), 1e18)), r.own, nil
}

// parse returns the rate of a text: as the config writes one, or a number.
func (r *rateFrom) parse(s string) (tokens int64, period time.Duration, err error) {
	switch {
	case s == unlimitedRate:
		return math.MaxInt64, 1, nil
	case s == noneRate:
		return 0, 0, nil
	case len(s) > longestRate:
		return 0, 0, errNoRate
	}
	count, every, hasPeriod := strings.Cut(s, "/")
	if !hasPeriod {
		f, err := strconv.ParseFloat(s, 64)
		if err != nil || strings.Trim(s, "0123456789.eE+") != "" {
			return 0, 0, errNoRate
		}
		return r.number(f)
	}
	if tokens, err = strconv.ParseInt(count, 10, 64); err != nil || count[0] == '+' {
		return 0, 0, errNoRate
	}
	if period, err = parsePeriod(every); err != nil || period <= 0 {
		return 0, 0, errNoRate
	}
	return tokens, period, nil
}

// exceeds reports whether a tokens each p are more than b tokens each q. All are
// above 0.
func exceeds(a int64, p time.Duration, b int64, q time.Duration) bool {
	h1, l1 := bits.Mul64(uint64(a), uint64(q))
	h2, l2 := bits.Mul64(uint64(b), uint64(p))
	return h1 > h2 || h1 == h2 && l1 > l2
}

// tierOf returns the tier of a rate that a request has brought, with the quota of the
// limit's own tier.
func (r *rateFrom) tierOf(b broughtRate, own *tier) (*tier, error) {
	if b.tokens == 0 {
		return &tier{none: true}, nil
	}
	burst := r.burst
	if burst == 0 {
		burst = min(b.tokens, r.tokens)
	}
	tokens, period := b.tokens, b.period
	if n := (tokens-1)/limiter.MaxTokens + 1; n > 1 { // more than a rate has: as many in less time
		tokens, period = tokens/n, (period/time.Duration(n)).Truncate(time.Microsecond)+time.Microsecond
	}
	// A rate that is slow for the burst fills as much of it as it can.
	if fills := .999999 * float64(limiter.MaxFill) / float64(period) * float64(tokens); float64(burst) > fills {
		burst = max(1, int64(fills))
	}
	bucket, err := limiter.NewBucket(tokens, period, burst)
	if err != nil { // with a period that no rate has
		return nil, errNoRate
	}
	return &tier{bucket: bucket, quota: own.quota, quotaText: own.quotaText}, nil
}

// readMaxRate checks the fields rate_from and max_rate of a draft, and sets what
// the limit makes of them. The limit's own rate was read before. Unless complete is
// set, a field may only seem to be missing.
func (lr *limitReader) readMaxRate(d *draft, complete bool) {
	switch {
	case (d.rateFromAt.Node == nil || d.maxRate.Node == nil) && !complete:
		return
	case d.rateFromAt.Node == nil && d.maxRate.Node != nil:
		lr.wrong(d.maxRate, "has no effect without rate_from")
		return
	case d.rateFromAt.Node == nil:
		return
	case d.maxRate.Node == nil:
		lr.wrong(d.rateFromAt, "requires max_rate, the most that a request may bring, such as max_rate: 10000/m")
		return
	}
	before := len(lr.mistakes)
	const want = "tokens/period such as 10000/m"
	text := lr.readText(d.maxRate, want)
	if len(lr.mistakes) > before {
		return
	}
	tokens, period, err := parseRate(text)
	switch {
	case errors.As(err, new(*advice)): // which may be none, unlimited or a quota
		lr.wrongError(d.maxRate, &advice{fmt.Sprintf("invalid rate %q", text), mendTokensPerPeriod(text), "want " + want})
		return
	case err != nil:
		lr.wrongError(d.maxRate, err)
		return
	case period == 0:
		lr.wrong(d.maxRate, "must be a rate with a period such as 10000/m, not %s", text)
		return
	}
	if d.tier == nil || d.rateFrom.expression == nil {
		return // a mistake that is reported
	}
	if d.tier.rate == "" {
		lr.wrong(d.rateFromAt, "requires rate, which requests without a rate of their own have")
		return
	}
	if d.rateFrom.expression.constant {
		lr.wrong(d.rateFromAt, "is the same for every request; write it as the rate")
	}
	d.rateFrom.max, d.rateFrom.tokens, d.rateFrom.period = text, tokens, period
	if _, d.rateFrom.own, _ = parseRate(d.tier.rate); d.rateFrom.own == 0 {
		d.rateFrom.own = period // the limit's own is unlimited or none
	}
	p := lr.plans[d.tier.plan]
	if d.granted.burst.Node != nil || p != nil && p.grants.burst != "" {
		d.rateFrom.burst = d.tier.bucket.Burst()
	}
}

// clientFilters are filters of Envoy whose metadata is what a client has sent, in
// a body or a header.
var clientFilters = []string{
	"envoy.filters.http.json_to_metadata", "envoy.filters.http.header_to_metadata",
	"envoy.filters.http.proto_message_extraction",
}

// warnOfRateFrom warns of a rate that clients can choose, of one that several of
// a bucket's users may have differently, and of a max_rate below the rate.
func (l *linter) warnOfRateFrom(d *draft) {
	r := d.rateFrom
	if r == nil {
		return
	}
	for _, read := range r.expression.reads {
		switch read.attribute {
		case "request.headers":
			if slices.Contains(fromEnvoy, read.entry) {
				continue
			}
		case filterMetadata:
			if !slices.Contains(clientFilters, read.entry) {
				continue
			}
		case requestParams, requestCookies, "request.query", "request.path", "request.url_path":
		default:
			continue
		}
		l.warn(d.rateFromAt, "%s may be written by the client, who then chooses a rate of up to max_rate; read a claim, "+
			"such as %s, or have Envoy set it before sluice is asked", read, strings.Replace(claimName, "NAME", "rate", 1))
		break
	}
	if !d.keyHoldsSubject() {
		l.warn(d.rateFromAt, "the key does not say whose rate this is, so that one request with a low rate cuts the bucket "+
			"of others; add to the key what names the rate's owner, such as %s", strings.Replace(claimName, "NAME", "sub", 1))
	}
	if d.tier.hasBucket() {
		if tokens, period, err := parseRate(d.tier.rate); err == nil && exceeds(tokens, period, r.tokens, r.period) {
			l.warn(d.maxRate, "%s is below the rate of %s, which requests without a rate of their own have; raise it", r.max,
				d.tier.rate)
		}
	}
}

// keyHoldsSubject reports whether a part of the key is read from where rate_from
// is, such as another claim of the same token.
func (d *draft) keyHoldsSubject() bool {
	fromClient := []string{"request.headers", requestParams, requestCookies}
	for _, of := range d.rateFrom.expression.reads {
		for _, e := range d.key {
			if e.text == d.rateFrom.expression.text {
				continue // the rate itself names nobody
			}
			for _, part := range e.reads {
				switch {
				case of.attribute == filterMetadata && part.attribute == filterMetadata:
					if of.entry == part.entry || of.entry == "" || part.entry == "" {
						return true
					}
				case of.attribute == filterMetadata:
				case part.attribute == of.attribute && part.entry != of.entry,
					slices.Contains(fromClient, of.attribute) &&
						(slices.Contains(fromClient, part.attribute) || part.attribute == filterMetadata):
					return true
				}
			}
		}
	}
	return false
}

// sameRateFrom reports whether two limits take rates from requests alike. Both may
// be nil.
func sameRateFrom(a, b *rateFrom) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.expression.text == b.expression.text && a.max == b.max && a.own == b.own && a.burst == b.burst
}
