package backtest

import (
	"fmt"
	"strconv"
	"strings"
)

// Verdict says whether a run is good, and whether the limits let enough pass. The
// exit status is 0 if it passed.
type Verdict struct {
	Passed bool `json:"passed"`
	// MaxLimited is the largest percentage of requests that may be denied, such as
	// 0.1%; empty if any may.
	MaxLimited string `json:"max_limited,omitempty"`
	// Reasons are why it did not pass.
	Reasons []string `json:"reasons"`

	// share is what MaxLimited is compared with, in words.
	share string
}

// maxSkipped is the largest part of the lines that may be unreadable, as one in
// so many.
const maxSkipped = 100

// judge returns the verdict on a report. failed is the error of a log that could
// not be read, or nil.
func (r *run) judge(out *Report, failed error) Verdict {
	v := Verdict{Reasons: []string{}}
	wrong := func(format string, args ...any) { v.Reasons = append(v.Reasons, fmt.Sprintf(format, args...)) }
	if out.Interrupted {
		wrong("interrupted after %d lines", out.Lines)
	}
	if failed != nil {
		v.Reasons = append(v.Reasons, strings.Split(failed.Error(), "\n")...)
	}
	if out.Skipped*maxSkipped > out.Lines {
		first := ""
		if len(out.Unreadable) > 0 {
			first = "; the first is " + out.Unreadable[0].String()
		}
		wrong("%d of %d lines cannot be read, more than 1%%%s", out.Skipped, out.Lines, first)
	}
	if out.Requests == 0 && !out.Interrupted && failed == nil {
		if out.Outside > 0 {
			wrong("all %d requests are outside of --since and --until", out.Outside)
		} else {
			wrong("no requests in the logs")
		}
	}
	if r.MaxLimited != nil {
		v.MaxLimited = strconv.FormatFloat(*r.MaxLimited, 'f', -1, 64) + "%"
		limited := 100 * float64(out.Limited) / float64(max(1, out.Requests))
		v.share = fmt.Sprintf("%d of %s would be denied, %.4g%%; --max-limited is %s", out.Limited,
			plural(out.Requests, "request"), limited, v.MaxLimited)
		if limited > *r.MaxLimited {
			v.Reasons = append(v.Reasons, v.share)
		}
	}
	v.Passed = len(v.Reasons) == 0
	return v
}
