package authz

import "github.com/sluiceproxy/sluice/limiter"

// disposition is how a check with a certain outcome is answered.
type disposition uint8

const (
	_        disposition = iota
	allow                // an OkHttpResponse, with rate-limit headers if a limit applied
	deny                 // a DeniedHttpResponse with 429
	refuse               // a DeniedHttpResponse with failure_status: not the client's fault
	delegate             // a gRPC error, so that Envoy's failure_mode_allow decides
	cancel               // a gRPC error that nobody receives
)

// class is what follows from an outcome.
type class struct {
	disposition disposition
	// isFailure marks a check in which the store or the config failed. Its
	// span has the status Error.
	isFailure bool
}

// classes has the class of every limiter.Outcome. The names of outcomes in
// metadata, metrics and logs are their String.
var classes = [...]class{
	limiter.Unmatched:    {disposition: allow},
	limiter.Allowed:      {disposition: allow},
	limiter.Exempt:       {disposition: allow},
	limiter.Limited:      {disposition: deny},
	limiter.Canceled:     {disposition: cancel},
	limiter.Invalid:      {disposition: refuse, isFailure: true},
	limiter.FailedOpen:   {disposition: allow, isFailure: true},
	limiter.FailedClosed: {disposition: refuse, isFailure: true},
	limiter.Delegated:    {disposition: delegate, isFailure: true},
	// No decision has this outcome, see countedAs.
	limiter.FailedLocal: {disposition: allow, isFailure: true},
}

// IsDenial reports whether a request with the outcome o was answered, and not
// with an allow.
func IsDenial(o limiter.Outcome) bool {
	d := classes[o].disposition
	return d != allow && d != cancel
}

// countedAs returns the outcome that metrics and spans show for d. A decision
// that this process made in the store's place is Allowed or Limited in the
// metadata and FailedLocal here.
func countedAs(d *limiter.Decision) limiter.Outcome {
	if d.Local && (d.Outcome == limiter.Allowed || d.Outcome == limiter.Limited) {
		return limiter.FailedLocal
	}
	return d.Outcome
}
