package authz

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter"
)

// TestQuota checks what a client sees of a limit with a quota: the x-ratelimit
// headers and the metadata speak of the bucket that tells, the standard's fields of
// both, and a denial by the quota lasts until its window ends.
func TestQuota(t *testing.T) {
	type answer struct{ at, want string } // at is in RFC 3339, and in order
	for name, tt := range map[string]struct {
		limits  string
		answers []answer
	}{
		"a quota that tells": {"{name: api, key: client.ip, rate: 60/h, burst: 10, quota: 2/month}", []answer{
			{"2000-02-10T12:00:00Z", `status 0
allow
client x-ratelimit-limit: 2
client x-ratelimit-remaining: 1
client x-ratelimit-reset: 1684800
client ratelimit-policy: "api";q=10;w=600, "api/quota";q=2;w=2505600
client ratelimit: "api";r=9;t=60, "api/quota";r=1;t=1684800
metadata cost=1 decision="allowed" key="=11.203.0.113.7" limit="api/quota" remaining=1 shadow=[] source="memory"
`},
			{"2000-02-29T23:59:00Z", `status 0
allow
client x-ratelimit-limit: 2
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client ratelimit-policy: "api";q=10;w=600, "api/quota";q=2;w=2505600
client ratelimit: "api";r=9;t=60, "api/quota";r=0;t=60
metadata cost=1 decision="allowed" key="=11.203.0.113.7" limit="api/quota" remaining=0 shadow=[] source="memory"
`},
			{"2000-02-29T23:59:58.5Z", `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 2
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 2
client ratelimit-policy: "api";q=10;w=600, "api/quota";q=2;w=2505600
client ratelimit: "api";r=9;t=2, "api/quota";r=0;t=2
client retry-after: 2
` + exceeded("api/quota", 2) +
				`metadata cost=1 decision="limited" key="=11.203.0.113.7" limit="api/quota" remaining=0 retry_after=2 ` +
				`shadow=[] source="memory"
`},
			{"2000-03-01T00:00:00Z", `status 0
allow
client x-ratelimit-limit: 2
client x-ratelimit-remaining: 1
client x-ratelimit-reset: 2678400
client ratelimit-policy: "api";q=10;w=600, "api/quota";q=2;w=2678400
client ratelimit: "api";r=9;t=60, "api/quota";r=1;t=2678400
metadata cost=1 decision="allowed" key="=11.203.0.113.7" limit="api/quota" remaining=1 shadow=[] source="memory"
`},
		}},
		"a rate that tells": {"{name: api, rate: 1/h, burst: 1, quota: 100/day, time_zone: Europe/Berlin}", []answer{
			{"2000-03-26T12:00:00Z", `status 0
allow
client x-ratelimit-limit: 1
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 3600
client ratelimit-policy: "api";q=1;w=3600, "api/quota";q=100;w=82800
client ratelimit: "api";r=0;t=3600, "api/quota";r=99;t=36000
metadata cost=1 decision="allowed" key="-" limit="api" remaining=0 shadow=[] source="memory"
`},
			{"2000-03-26T12:10:00Z", `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 1
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 3000
client ratelimit-policy: "api";q=1;w=3600, "api/quota";q=100;w=82800
client ratelimit: "api";r=0;t=3000, "api/quota";r=99;t=35400
client retry-after: 3000
` + exceeded("api", 3000) +
				`metadata cost=1 decision="limited" key="-" limit="api" remaining=0 retry_after=3000 shadow=[] source="memory"
`},
		}},
		"a quota alone, named as its limit": {"{name: api, quota: 1/year}", []answer{
			{"2000-12-31T23:00:00Z", `status 0
allow
client x-ratelimit-limit: 1
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 3600
client ratelimit-policy: "api";q=1;w=31622400
client ratelimit: "api";r=0;t=3600
metadata cost=1 decision="allowed" key="-" limit="api" remaining=0 shadow=[] source="memory"
`},
		}},
		"a shadow": {"{name: api, rate: 1/h, burst: 9, quota: 1/day, mode: shadow}", []answer{
			{"2000-02-10T12:00:00Z", `status 0
allow
metadata cost=null decision="allowed" key=null limit=null remaining=null shadow=[] source="none"
`},
			{"2000-02-10T12:00:01Z", `status 0
allow
upstream x-sluice-shadow: api/quota
metadata cost=null decision="allowed" key=null limit=null remaining=null shadow=[api/quota] shadow_keys=[-] source="none"
`},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _, _ := newServer(t, "headers: [x-ratelimit, ratelimit, retry-after]\nlimits: ["+tt.limits+"]",
					limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
				for _, a := range tt.answers {
					at, err := time.Parse(time.RFC3339Nano, a.at)
					if err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Until(at)) // by synctest's clock
					if got := spell(s.Check(t.Context(), checkOf())); got != a.want {
						t.Errorf("at %s\n%s\nwant\n%s", a.at, got, a.want)
					}
				}
			})
		})
	}
}
